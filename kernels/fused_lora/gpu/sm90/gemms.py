"""The GEMMs with the LoRA term inside for sm_90, warp-specialised: y = x w^T + s b^T + bias, dx = dy w + m(ds a).

At 4096 columns, where a tile takes 45 us, it decides that the next tile's operands are on their way while a tile is
stored, and the operands of the LoRA term with them. It is one more slot of the ring for each segment, linear and chunk
of ranks, and the mask words of dx are one more for each linear. So y takes 0.97 to 1.00 of a library's time for x w^T
alone on an H200 (8192 tokens, five shapes), and dx 0.98 to 1.03; by Triton's own pipelining it was 1.01 to 1.09.

Factors are padded: every adapter has WIDTH ranks, those beyond its own being zero. Elements have 16 bits, and rows are
such as the copy engine can fetch. `gemms` sees to both.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fused_lora.gpu.sm90.ring import (
    COLUMNS,
    HALF,
    HALF_PRODUCT,
    HALF_WORDS,
    LOADER_REGISTERS,
    LOWER,
    MULTIPLIER_REGISTERS,
    MULTIPLIER_WARPS,
    PART,
    PRODUCT,
    ROWS,
    UPPER,
    after,
    joined,
    load_lora,
    load_product,
    load_words,
    made_ring,
    multiply,
    rows_of_segment,
    seen_as,
    segments_meeting,
    span,
    store,
    tile_place,
)


@gluon.jit
def _output_loader(operands, tables, ring, sizes, STEPS: gl.constexpr, GROUP: gl.constexpr):
    x, w, s, b = operands
    tokens, columns, inner, segments = sizes
    slot, phase = gl.to_tensor(0), gl.to_tensor(0)
    tiles = gl.cdiv(tokens, ROWS) * gl.cdiv(columns, COLUMNS)
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        row, row_stop, column = tile_place(tile, tokens, columns, GROUP)
        slot, phase = load_product(x, w, ring, row, column, inner, slot, phase, True)
        gdc_wait()  # before s, of the kernel before; x is older
        first, last = segments_meeting(tables[0], row, row_stop, segments, STEPS)
        slot, phase = load_lora(
            s, b, tables, ring, 0, 0, columns, row, row_stop, column, first, last, slot, phase, True
        )


@gluon.jit
def _output_multiplier(
    operands, y, bias, tables, ring, y_slots, sizes,
    PLACE: gl.constexpr, HAS_BIAS: gl.constexpr, WIDTH: gl.constexpr, STEPS: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    s, b = operands[2], operands[3]
    offsets, adapters = tables
    w_slots, filled, emptied = ring[1], ring[2], ring[3]
    tokens, columns, inner, segments = sizes
    slot, phase = gl.to_tensor(0), gl.to_tensor(0)
    total = gl.zeros((PART, COLUMNS), gl.float32, PRODUCT)
    tiles = gl.cdiv(tokens, ROWS) * gl.cdiv(columns, COLUMNS)
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        row, row_stop, column = tile_place(tile, tokens, columns, GROUP)
        first, last = segments_meeting(offsets, row, row_stop, segments, STEPS)
        total, slot, phase = multiply(total, ring, inner, slot, phase, PLACE, False, True)
        for segment in range(first, last):
            start, stop = span(offsets, adapters, segment, row, row_stop)
            if start < stop:
                for _chunk in range(WIDTH // s.block_type.shape[1]):
                    mbarrier.wait(filled.index(slot), phase)
                    s_tile = rows_of_segment(s, ring, slot, row, start, stop, PLACE, PRODUCT)
                    total = warpgroup_mma(s_tile, seen_as(w_slots, slot, b).permute((1, 0)), total)
                    fence_async_shared()
                    mbarrier.arrive(emptied.index(slot), count=1)
                    slot, phase = after(slot, phase, ring)
        if HAS_BIAS:
            cols = column + gl.arange(0, COLUMNS, gl.SliceLayout(0, PRODUCT))
            total += gl.load(bias + cols, mask=cols < columns, other=0.0).to(gl.float32)[None, :]
        store(y, total, y_slots, row, column, PLACE)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["tokens", "segments"])
def output_gemm_kernel(
    x, w, y, s, b, bias, offsets, adapters, tokens, columns, inner, segments,
    HAS_BIAS: gl.constexpr, WIDTH: gl.constexpr, STEPS: gl.constexpr, GROUP: gl.constexpr,
    SLOTS: gl.constexpr, STORES: gl.constexpr,
):  # fmt: skip
    """y [tokens, columns] = x w^T + s b^T + bias of one linear. Any grid: programs take tiles in turns.

    x [tokens, inner], w [columns, inner], y, s [tokens, WIDTH] and b [adapters * columns, WIDTH]: tensor descriptors.
    STEPS: of `segments_meeting`. SLOTS, STORES: of the ring, and for slices of y that are being stored.
    """
    ring = made_ring(x, w, SLOTS)
    y_slots = gl.allocate_shared_memory(y.dtype, [2 * STORES] + y.block_type.shape, y.layout)
    operands, tables, sizes = (x, w, s, b), (offsets, adapters), (tokens, columns, inner, segments)
    gl.warp_specialize(
        [
            (_output_multiplier, (operands, y, bias, tables, ring, y_slots, sizes,
                                  UPPER, HAS_BIAS, WIDTH, STEPS, GROUP)),
            (_output_multiplier, (operands, y, bias, tables, ring, y_slots, sizes,
                                  LOWER, HAS_BIAS, WIDTH, STEPS, GROUP)),
            (_output_loader, (operands, tables, ring, sizes, STEPS, GROUP)),
        ],
        [MULTIPLIER_WARPS, 1],
        [MULTIPLIER_REGISTERS, LOADER_REGISTERS],
    )  # fmt: skip


@gluon.jit
def _input_loader(
    products, inner, ds, a, bits, tables, ring, sizes,
    LINEARS: gl.constexpr, MASKED: gl.constexpr, WIDTH: gl.constexpr, STEPS: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    tokens, columns, segments, adapter_count = sizes
    slot, phase = gl.to_tensor(0), gl.to_tensor(0)
    tiles = gl.cdiv(tokens, ROWS) * gl.cdiv(columns, COLUMNS)
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        row, row_stop, column = tile_place(tile, tokens, columns, GROUP)
        first, last = segments_meeting(tables[0], row, row_stop, segments, STEPS)
        for linear in gl.static_range(LINEARS):
            s_row, a_row = linear * tokens, linear * adapter_count * WIDTH
            if MASKED:
                slot, phase = load_words(bits, ring, s_row + row, column, slot, phase)
            slot, phase = load_lora(
                ds, a, tables, ring, s_row, a_row, WIDTH, row, row_stop, column, first, last, slot, phase, False
            )
        for linear in gl.static_range(LINEARS):
            dy, w = products[2 * linear], products[2 * linear + 1]
            slot, phase = load_product(dy, w, ring, row, column, inner[linear], slot, phase, False)


@gluon.jit
def _with_term(total, before, ds_tile, a_slot, words, INDEX: gl.constexpr, MASKED: gl.constexpr):
    """total + m(ds a) of half a tile's columns.

    before: the other half, which must be done first. It is not added, but without it the compiler computes both terms
    before it masks the first, and has not the registers for them."""
    if MASKED:
        term = warpgroup_mma(ds_tile, a_slot.slice(INDEX * HALF, HALF, 1), before, use_acc=False)
        shifts = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(1, HALF_WORDS)))
        # Through an instruction that the compiler does not know: it would take all bits apart before the loop.
        word = gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [words[INDEX]], gl.int32, is_pure=False, pack=1)
        kept = ((word[:, :, None] >> shifts[None, None, :]) & 1).reshape((PART, HALF))
        total += gl.where(gl.convert_layout(kept, HALF_PRODUCT, assert_trivial=True) != 0, term, 0.0)
    else:
        total = warpgroup_mma(ds_tile, a_slot.slice(INDEX * HALF, HALF, 1), total)
    return total


@gluon.jit
def _words_of_half(bits_slot, INDEX: gl.constexpr):
    return bits_slot.slice(INDEX * (HALF // 32), HALF // 32, 1).load(gl.SliceLayout(2, HALF_WORDS))


@gluon.jit
def _input_multiplier(
    products, inner, dx, ds, a, bits, tables, ring, dx_slots, sizes,
    PLACE: gl.constexpr, LINEARS: gl.constexpr, MASKED: gl.constexpr, WIDTH: gl.constexpr, STEPS: gl.constexpr,
    GROUP: gl.constexpr,
):  # fmt: skip
    offsets, adapters = tables
    x_slots, w_slots, filled, emptied = ring
    tokens, columns, segments = sizes[0], sizes[1], sizes[2]
    slot, phase = gl.to_tensor(0), gl.to_tensor(0)
    tiles = gl.cdiv(tokens, ROWS) * gl.cdiv(columns, COLUMNS)
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        row, row_stop, column = tile_place(tile, tokens, columns, GROUP)
        first, last = segments_meeting(offsets, row, row_stop, segments, STEPS)
        # By halves, since a whole tile's term beside its sum would take more registers than there are.
        left = gl.zeros((PART, HALF), gl.float32, HALF_PRODUCT)
        right = gl.zeros((PART, HALF), gl.float32, HALF_PRODUCT)
        for _ in gl.static_range(LINEARS):
            words = (0, 0)
            if MASKED:
                mbarrier.wait(filled.index(slot), phase)
                bits_slot = seen_as(x_slots, slot, bits).slice(PLACE * PART, PART, 0)
                words = (_words_of_half(bits_slot, 0), _words_of_half(bits_slot, 1))
                fence_async_shared()
                mbarrier.arrive(emptied.index(slot), count=1)
                slot, phase = after(slot, phase, ring)
            for segment in range(first, last):
                start, stop = span(offsets, adapters, segment, row, row_stop)
                if start < stop:
                    for _chunk in range(WIDTH // ds.block_type.shape[1]):
                        mbarrier.wait(filled.index(slot), phase)
                        ds_tile = rows_of_segment(ds, ring, slot, row, start, stop, PLACE, HALF_PRODUCT)
                        a_slot = seen_as(w_slots, slot, a)
                        left = _with_term(left, right, ds_tile, a_slot, words, 0, MASKED)
                        right = _with_term(right, left, ds_tile, a_slot, words, 1, MASKED)
                        fence_async_shared()
                        mbarrier.arrive(emptied.index(slot), count=1)
                        slot, phase = after(slot, phase, ring)
        total = gl.convert_layout(joined(left, right), PRODUCT, assert_trivial=True)
        for linear in gl.static_range(LINEARS):
            total, slot, phase = multiply(total, ring, inner[linear], slot, phase, PLACE, True, False)
        store(dx, total, dx_slots, row, column, PLACE)
    tma.store_wait(0)


# A count of 1 would be a constant, whose loop of one turn the compiler unrolls: then the terms of two linears spill.
@gluon.jit(do_not_specialize=["tokens", "segments", "adapter_count"])
def input_gemm_kernel(
    dy_0, w_0, dy_1, w_1, dy_2, w_2, dx, ds, a, bits, offsets, adapters,
    tokens, columns, inner_0, inner_1, inner_2, segments, adapter_count,
    LINEARS: gl.constexpr, MASKED: gl.constexpr, WIDTH: gl.constexpr, STEPS: gl.constexpr, GROUP: gl.constexpr,
    SLOTS: gl.constexpr, STORES: gl.constexpr, NEXT_MAY_BEGIN: gl.constexpr,
):  # fmt: skip
    """dx [tokens, columns] = the sum over up to three linears of dy w + m(ds a). Any grid: programs take turns.

    dy [tokens, inner], w [inner, columns], dx, ds [linears * tokens, WIDTH], a [linears * adapters * WIDTH, columns]
    and bits [linears * tokens, words]: tensor descriptors. The LoRA terms come first: a mask can be applied to them
    only before anything else is added. NEXT_MAY_BEGIN: the next kernel may begin once all programs have their
    multiprocessors; what it reads before it waits for this one must be older. The other constants: as of
    `output_gemm_kernel`.
    """
    gdc_wait()
    if NEXT_MAY_BEGIN:
        gdc_launch_dependents()
    ring = made_ring(dy_0, w_0, SLOTS)
    dx_slots = gl.allocate_shared_memory(dx.dtype, [2 * STORES] + dx.block_type.shape, dx.layout)
    products, inner = (dy_0, w_0, dy_1, w_1, dy_2, w_2), (inner_0, inner_1, inner_2)
    tables, sizes = (offsets, adapters), (tokens, columns, segments, adapter_count)
    gl.warp_specialize(
        [
            (_input_multiplier, (products, inner, dx, ds, a, bits, tables, ring, dx_slots, sizes,
                                 UPPER, LINEARS, MASKED, WIDTH, STEPS, GROUP)),
            (_input_multiplier, (products, inner, dx, ds, a, bits, tables, ring, dx_slots, sizes,
                                 LOWER, LINEARS, MASKED, WIDTH, STEPS, GROUP)),
            (_input_loader, (products, inner, ds, a, bits, tables, ring, sizes,
                             LINEARS, MASKED, WIDTH, STEPS, GROUP)),
        ],
        [MULTIPLIER_WARPS, 1],
        [MULTIPLIER_REGISTERS, LOADER_REGISTERS],
    )  # fmt: skip
