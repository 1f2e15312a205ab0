"""The GEMMs with the LoRA term inside for sm_90, warp-specialised: y = x w^T + s b^T + bias, dx = dy w + m(ds a).

Written in Gluon, Triton's lower level, because at 4096 columns, where a tile takes 45 us, it decides that the next
tile's operands are on their way while a tile is stored, and the operands of the LoRA term with them. One warp, the
loader, only orders copies, of all that a tile needs and in its order, into a ring of slots; two warpgroups, the
multiplier, compute with what has arrived. The LoRA term is one more slot for each segment, linear and chunk of ranks,
the mask words of dx one more for each linear. On an H200, 8192 x 4096 x 4096, y takes 1.01 of the frozen linear's time
and 1.01 with four adapters; the same kernel left to Triton's own pipelining took 1.06.

Factors are padded: every adapter has WIDTH ranks, those beyond its own being zero. Elements have 16 bits, and rows are
such as the copy engine can fetch. `launch` sees to both.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_wait

from fused_lora.gpu.choices import TILE_COLUMNS, TILE_ROWS

DEPTH = 64  # of a step along the inner dimension
WARPS = 8  # of the multiplier: two warpgroups, 64 rows each
REGISTERS = 168  # a thread of three warpgroups, the loader's among them; the multiplier's get what the loader leaves

ROWS, COLUMNS, STEP = gl.constexpr(TILE_ROWS), gl.constexpr(TILE_COLUMNS), gl.constexpr(DEPTH)
HALF = gl.constexpr(TILE_COLUMNS // 2)
LOADER_REGISTERS = gl.constexpr(24)
PRODUCT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, TILE_COLUMNS, 16]))
HALF_PRODUCT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, TILE_COLUMNS // 2, 16]))
# Half a tile with its columns as words and bits: who holds an element of the product holds its word of the mask.
HALF_WORDS = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 0, 1], [8, 0, 0], [0, 0, 8], [0, 0, 16], [0, 1, 0], [0, 2, 0]],
        lane_bases=[[0, 0, 2], [0, 0, 4], [1, 0, 0], [2, 0, 0], [4, 0, 0]],
        warp_bases=[[16, 0, 0], [32, 0, 0], [64, 0, 0]],
        block_bases=[],
        shape=[TILE_ROWS, TILE_COLUMNS // 2 // 32, 32],
    )
)


@gluon.jit
def _tile_place(tile, tokens, columns, GROUP: gl.constexpr):
    """First row and column of a tile, and the row where it ends: GROUP row tiles go through the columns together, so
    that they share what is in L2."""
    per_group = GROUP * gl.cdiv(columns, COLUMNS)
    first = tile // per_group * GROUP
    height = gl.minimum(gl.cdiv(tokens, ROWS) - first, GROUP)
    row = (first + tile % per_group % height) * ROWS
    return row, gl.minimum(row + ROWS, tokens), tile % per_group // height * COLUMNS


@gluon.jit
def _count_below(borders, limit, segments, STEPS: gl.constexpr):
    """How many of the rising borders [segments] are below a limit, by STEPS halvings."""
    low, high = 0, segments
    for _ in gl.static_range(STEPS):
        middle = (low + high) // 2
        below = (low < high) & (gl.load(borders + gl.minimum(middle, segments - 1)) < limit)
        low, high = gl.where(below, middle + 1, low), gl.where(below, high, middle)
    return low


@gluon.jit
def _segments_meeting(offsets, row, row_stop, segments, STEPS: gl.constexpr):
    """The segments that have rows in [row, row_stop), as a range of their indices; empty ones may be among them.

    STEPS: halvings that find one among all segments, 0 for a single one."""
    if STEPS == 0:
        return 0, 1
    return _count_below(offsets + 1, row + 1, segments, STEPS), _count_below(offsets, row_stop, segments, STEPS)


@gluon.jit
def _span(offsets, adapters, segment, row, row_stop):
    """First and end row of a segment within a tile; empty where it has no adapter."""
    start = gl.maximum(gl.load(offsets + segment), row)
    stop = gl.minimum(gl.load(offsets + segment + 1), row_stop)
    return start, gl.where(gl.load(adapters + segment) >= 0, stop, start)


@gluon.jit
def _made_ring(x, w, SLOTS: gl.constexpr):
    """Slots for tiles of x and w, and two barriers for each: it is filled, it is emptied."""
    x_slots = gl.allocate_shared_memory(x.dtype, [SLOTS] + x.block_type.shape, x.layout)
    w_slots = gl.allocate_shared_memory(w.dtype, [SLOTS] + w.block_type.shape, w.layout)
    filled = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    emptied = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(filled.index(slot), count=1)
        mbarrier.init(emptied.index(slot), count=1)
    return x_slots, w_slots, filled, emptied


@gluon.jit
def _after(slot, phase, ring):
    """The next slot of the ring, and the parity of its turn."""
    SLOTS: gl.constexpr = ring[0].type.shape[0]
    last = slot == SLOTS - 1
    return gl.where(last, 0, slot + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def _before(slot, ring):
    # Computed, not carried from step to step: the compiler takes a variable that begins as a copy for a constant.
    SLOTS: gl.constexpr = ring[0].type.shape[0]
    return gl.where(slot == 0, SLOTS, slot) - 1


@gluon.jit
def _seen_as(slots, slot, descriptor):
    """A slot's memory as a tile of another descriptor."""
    return slots.index(slot)._reinterpret(descriptor.dtype, descriptor.block_type.shape, descriptor.layout)


@gluon.jit
def _load_product(x, w, ring, row, column, inner, slot, phase, TRANSPOSED: gl.constexpr):
    """Order the tiles of one product; TRANSPOSED: w has the output's columns as rows."""
    x_slots, w_slots, filled, emptied = ring
    for depth in range(0, inner, STEP):
        bar = filled.index(slot)
        mbarrier.wait(emptied.index(slot), phase ^ 1)
        mbarrier.expect(bar, x.block_type.nbytes + w.block_type.nbytes)
        tma.async_copy_global_to_shared(x, [row, depth], bar, x_slots.index(slot))
        if TRANSPOSED:
            tma.async_copy_global_to_shared(w, [column, depth], bar, w_slots.index(slot))
        else:
            tma.async_copy_global_to_shared(w, [depth, column], bar, w_slots.index(slot))
        slot, phase = _after(slot, phase, ring)
    return slot, phase


@gluon.jit
def _load_lora(
    s, factor, tables, ring, s_row, factor_row, height, row, row_stop, column, first, last, slot, phase,
    WIDTH: gl.constexpr, TRANSPOSED: gl.constexpr,
):  # fmt: skip
    """Order the operands of the LoRA terms of segments [first, last).

    s_row, factor_row: where the linear's rows begin. height: rows of one adapter in `factor`."""
    offsets, adapters = tables
    x_slots, w_slots, filled, emptied = ring
    RANKS: gl.constexpr = s.block_type.shape[1]
    for segment in range(first, last):
        start, stop = _span(offsets, adapters, segment, row, row_stop)
        place = factor_row + gl.load(adapters + segment) * height
        if start < stop:
            for chunk in range(WIDTH // RANKS):
                bar = filled.index(slot)
                mbarrier.wait(emptied.index(slot), phase ^ 1)
                mbarrier.expect(bar, s.block_type.nbytes + factor.block_type.nbytes)
                tma.async_copy_global_to_shared(s, [s_row + row, chunk * RANKS], bar, _seen_as(x_slots, slot, s))
                factor_slot = _seen_as(w_slots, slot, factor)
                if TRANSPOSED:
                    tma.async_copy_global_to_shared(factor, [place + column, chunk * RANKS], bar, factor_slot)
                else:
                    tma.async_copy_global_to_shared(factor, [place + chunk * RANKS, column], bar, factor_slot)
                slot, phase = _after(slot, phase, ring)
    return slot, phase


@gluon.jit
def _load_words(bits, ring, row, column, slot, phase):
    """Order the mask words of a tile."""
    x_slots, filled, emptied = ring[0], ring[2], ring[3]
    bar = filled.index(slot)
    mbarrier.wait(emptied.index(slot), phase ^ 1)
    mbarrier.expect(bar, bits.block_type.nbytes)
    tma.async_copy_global_to_shared(bits, [row, column // 32], bar, _seen_as(x_slots, slot, bits))
    return _after(slot, phase, ring)


@gluon.jit
def _start(total, ring, slot, phase, ADD: gl.constexpr, TRANSPOSED: gl.constexpr):
    """Begin to multiply the tiles in a slot, and wait for the ones before."""
    x_slots, w_slots, filled = ring[0], ring[1], ring[2]
    mbarrier.wait(filled.index(slot), phase)
    w_slot = w_slots.index(slot)
    if TRANSPOSED:
        w_slot = w_slot.permute((1, 0))
    total = warpgroup_mma(x_slots.index(slot), w_slot, total, use_acc=ADD, is_async=True)
    return warpgroup_mma_wait(1, deps=(total,))


@gluon.jit
def _multiply(total, ring, inner, slot, phase, ADD: gl.constexpr, TRANSPOSED: gl.constexpr):
    """total + the product whose tiles come next, or without ADD the product. One step is always under way: a slot is
    given back when the next is being multiplied.

    The first step stands before the loop: were total computed by other instructions than the loop's own, ptxas would
    let each of them wait for the one before, and dx took 17 % longer."""
    emptied = ring[3]
    total = _start(total, ring, slot, phase, ADD, TRANSPOSED)
    slot, phase = _after(slot, phase, ring)
    for _ in range(STEP, inner, STEP):
        total = _start(total, ring, slot, phase, True, TRANSPOSED)
        mbarrier.arrive(emptied.index(_before(slot, ring)), count=1)
        slot, phase = _after(slot, phase, ring)
    total = warpgroup_mma_wait(0, deps=(total,))
    mbarrier.arrive(emptied.index(_before(slot, ring)), count=1)
    return total, slot, phase


@gluon.jit
def _own_rows(s, ring, slot, row, start, stop, LAYOUT: gl.constexpr):
    """The tile of s in a slot, in registers, rows of other segments zero."""
    OPERAND: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=LAYOUT, k_width=2)
    tile = _seen_as(ring[0], slot, s).load(OPERAND)
    rows = row + gl.arange(0, ROWS, gl.SliceLayout(1, OPERAND))
    own = (rows >= start) & (rows < stop)
    return gl.where(own[:, None], tile, gl.zeros_like(tile))


@gluon.jit
def _halves(tile):
    """The left and the right half of a tile's columns; no element moves."""
    SHAPE: gl.constexpr = tile.type.shape
    return tile.reshape((SHAPE[0], 2, SHAPE[1] // 2)).permute((0, 2, 1)).split()


@gluon.jit
def _beside(left, right):
    """The tile whose halves these are."""
    SHAPE: gl.constexpr = left.type.shape
    return gl.join(left, right).permute((0, 2, 1)).reshape((SHAPE[0], 2 * SHAPE[1]))


@gluon.jit
def _store(y, total, y_slots, row, column):
    """Store a tile slice by slice of columns, as wide as the descriptor's: a slice waits until its slot is free."""
    SLICES: gl.constexpr = COLUMNS // y.block_type.shape[1]
    SLOTS: gl.constexpr = y_slots.type.shape[0]
    slices = (total,)
    if SLICES > 1:
        slices = _halves(total)
    if SLICES == 4:
        left, right = slices
        slices = _halves(left) + _halves(right)
    for index in gl.static_range(SLICES):
        tma.store_wait(SLOTS - 1)
        y_slots.index(index % SLOTS).store(slices[index].to(y.dtype))
        fence_async_shared()
        place = [row, column + index * (COLUMNS // SLICES)]
        tma.async_copy_shared_to_global(y, place, y_slots.index(index % SLOTS))


@gluon.jit
def _output_loader(operands, tables, ring, sizes, WIDTH: gl.constexpr, STEPS: gl.constexpr, GROUP: gl.constexpr):
    x, w, s, b = operands
    tokens, columns, inner, segments = sizes
    slot, phase = gl.to_tensor(0), gl.to_tensor(0)
    tiles = gl.cdiv(tokens, ROWS) * gl.cdiv(columns, COLUMNS)
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        row, row_stop, column = _tile_place(tile, tokens, columns, GROUP)
        slot, phase = _load_product(x, w, ring, row, column, inner, slot, phase, True)
        gdc_wait()  # before s, of the kernel before; x is older
        first, last = _segments_meeting(tables[0], row, row_stop, segments, STEPS)
        slot, phase = _load_lora(
            s, b, tables, ring, 0, 0, columns, row, row_stop, column, first, last, slot, phase, WIDTH, True
        )


@gluon.jit
def _output_multiplier(
    operands, y, bias, tables, ring, y_slots, sizes,
    HAS_BIAS: gl.constexpr, WIDTH: gl.constexpr, STEPS: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    s, b = operands[2], operands[3]
    offsets, adapters = tables
    w_slots, filled, emptied = ring[1], ring[2], ring[3]
    tokens, columns, inner, segments = sizes
    slot, phase = gl.to_tensor(0), gl.to_tensor(0)
    total = gl.zeros((ROWS, COLUMNS), gl.float32, PRODUCT)
    tiles = gl.cdiv(tokens, ROWS) * gl.cdiv(columns, COLUMNS)
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        row, row_stop, column = _tile_place(tile, tokens, columns, GROUP)
        first, last = _segments_meeting(offsets, row, row_stop, segments, STEPS)
        total, slot, phase = _multiply(total, ring, inner, slot, phase, False, True)
        for segment in range(first, last):
            start, stop = _span(offsets, adapters, segment, row, row_stop)
            if start < stop:
                for chunk in range(WIDTH // s.block_type.shape[1]):
                    mbarrier.wait(filled.index(slot), phase)
                    s_tile = _own_rows(s, ring, slot, row, start, stop, PRODUCT)
                    total = warpgroup_mma(s_tile, _seen_as(w_slots, slot, b).permute((1, 0)), total)
                    fence_async_shared()
                    mbarrier.arrive(emptied.index(slot), count=1)
                    slot, phase = _after(slot, phase, ring)
        if HAS_BIAS:
            cols = column + gl.arange(0, COLUMNS, gl.SliceLayout(0, PRODUCT))
            total += gl.load(bias + cols, mask=cols < columns, other=0.0).to(gl.float32)[None, :]
        _store(y, total, y_slots, row, column)
    tma.store_wait(0)


@gluon.jit
def output_gemm_kernel(
    x, w, y, s, b, bias, offsets, adapters, tokens, columns, inner, segments,
    HAS_BIAS: gl.constexpr, WIDTH: gl.constexpr, STEPS: gl.constexpr, GROUP: gl.constexpr,
    SLOTS: gl.constexpr, STORES: gl.constexpr,
):  # fmt: skip
    """y [tokens, columns] = x w^T + s b^T + bias of one linear. Any grid: programs take tiles in turns.

    x [tokens, inner], w [columns, inner], y, s [tokens, WIDTH] and b [adapters * columns, WIDTH]: tensor descriptors.
    STEPS: of `_segments_meeting`. SLOTS, STORES: of the ring, and for slices of y that are being stored.
    """
    ring = _made_ring(x, w, SLOTS)
    y_slots = gl.allocate_shared_memory(y.dtype, [STORES] + y.block_type.shape, y.layout)
    operands, tables, sizes = (x, w, s, b), (offsets, adapters), (tokens, columns, inner, segments)
    gl.warp_specialize(
        [
            (_output_multiplier, (operands, y, bias, tables, ring, y_slots, sizes, HAS_BIAS, WIDTH, STEPS, GROUP)),
            (_output_loader, (operands, tables, ring, sizes, WIDTH, STEPS, GROUP)),
        ],
        [1],
        [LOADER_REGISTERS],
    )


@gluon.jit
def _input_loader(
    products, inner, ds, a, bits, tables, ring, sizes,
    LINEARS: gl.constexpr, MASKED: gl.constexpr, WIDTH: gl.constexpr, STEPS: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    tokens, columns, segments, adapter_count = sizes
    slot, phase = gl.to_tensor(0), gl.to_tensor(0)
    tiles = gl.cdiv(tokens, ROWS) * gl.cdiv(columns, COLUMNS)
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        row, row_stop, column = _tile_place(tile, tokens, columns, GROUP)
        first, last = _segments_meeting(tables[0], row, row_stop, segments, STEPS)
        for linear in gl.static_range(LINEARS):
            s_row, a_row = linear * tokens, linear * adapter_count * WIDTH
            if MASKED:
                slot, phase = _load_words(bits, ring, s_row + row, column, slot, phase)
            slot, phase = _load_lora(
                ds, a, tables, ring, s_row, a_row, WIDTH, row, row_stop, column, first, last, slot, phase, WIDTH, False
            )
        for linear in gl.static_range(LINEARS):
            dy, w = products[2 * linear], products[2 * linear + 1]
            slot, phase = _load_product(dy, w, ring, row, column, inner[linear], slot, phase, False)


@gluon.jit
def _with_term(total, before, ds_tile, a_slot, words, INDEX: gl.constexpr, MASKED: gl.constexpr):
    """total + m(ds a) of half a tile's columns.

    before: the other half, which must be done first. It is not added, but without it the compiler computes both terms
    before it masks the first, and has not the registers for them."""
    term = warpgroup_mma(ds_tile, a_slot.slice(INDEX * HALF, HALF, 1), before, use_acc=False)
    if MASKED:
        shifts = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(1, HALF_WORDS)))
        # Through an instruction that the compiler does not know: it would take all bits apart before the loop.
        own = gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [words[INDEX]], dtype=gl.int32, is_pure=False, pack=1)
        kept = ((own[:, :, None] >> shifts[None, None, :]) & 1).reshape((ROWS, HALF))
        term = gl.where(gl.convert_layout(kept, HALF_PRODUCT, assert_trivial=True) != 0, term, 0.0)
    return total + term


@gluon.jit
def _words_of_half(bits_slot, INDEX: gl.constexpr):
    return bits_slot.slice(INDEX * (HALF // 32), HALF // 32, 1).load(gl.SliceLayout(2, HALF_WORDS))


@gluon.jit
def _input_multiplier(
    products, inner, dx, ds, a, bits, tables, ring, dx_slots, sizes,
    LINEARS: gl.constexpr, MASKED: gl.constexpr, WIDTH: gl.constexpr, STEPS: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    offsets, adapters = tables
    x_slots, w_slots, filled, emptied = ring
    tokens, columns, segments = sizes[0], sizes[1], sizes[2]
    slot, phase = gl.to_tensor(0), gl.to_tensor(0)
    tiles = gl.cdiv(tokens, ROWS) * gl.cdiv(columns, COLUMNS)
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        row, row_stop, column = _tile_place(tile, tokens, columns, GROUP)
        first, last = _segments_meeting(offsets, row, row_stop, segments, STEPS)
        # By halves, since a whole tile's term beside its sum would take more registers than there are.
        left = gl.zeros((ROWS, HALF), gl.float32, HALF_PRODUCT)
        right = gl.zeros((ROWS, HALF), gl.float32, HALF_PRODUCT)
        for _ in gl.static_range(LINEARS):
            words = (0, 0)
            if MASKED:
                mbarrier.wait(filled.index(slot), phase)
                bits_slot = _seen_as(x_slots, slot, bits)
                words = (_words_of_half(bits_slot, 0), _words_of_half(bits_slot, 1))
                fence_async_shared()
                mbarrier.arrive(emptied.index(slot), count=1)
                slot, phase = _after(slot, phase, ring)
            for segment in range(first, last):
                start, stop = _span(offsets, adapters, segment, row, row_stop)
                if start < stop:
                    for chunk in range(WIDTH // ds.block_type.shape[1]):
                        mbarrier.wait(filled.index(slot), phase)
                        ds_tile = _own_rows(ds, ring, slot, row, start, stop, HALF_PRODUCT)
                        a_slot = _seen_as(w_slots, slot, a)
                        left = _with_term(left, right, ds_tile, a_slot, words, 0, MASKED)
                        right = _with_term(right, left, ds_tile, a_slot, words, 1, MASKED)
                        fence_async_shared()
                        mbarrier.arrive(emptied.index(slot), count=1)
                        slot, phase = _after(slot, phase, ring)
        total = gl.convert_layout(_beside(left, right), PRODUCT, assert_trivial=True)
        for linear in gl.static_range(LINEARS):
            total, slot, phase = _multiply(total, ring, inner[linear], slot, phase, True, False)
        _store(dx, total, dx_slots, row, column)
    tma.store_wait(0)


# A count of 1 would be a constant, whose loop of one turn the compiler unrolls: then the terms of two linears spill.
@gluon.jit(do_not_specialize=["segments", "adapter_count"])
def input_gemm_kernel(
    dy_0, w_0, dy_1, w_1, dy_2, w_2, dx, ds, a, bits, offsets, adapters,
    tokens, columns, inner_0, inner_1, inner_2, segments, adapter_count,
    LINEARS: gl.constexpr, MASKED: gl.constexpr, WIDTH: gl.constexpr, STEPS: gl.constexpr, GROUP: gl.constexpr,
    SLOTS: gl.constexpr, STORES: gl.constexpr,
):  # fmt: skip
    """dx [tokens, columns] = the sum over up to three linears of dy w + m(ds a). Any grid: programs take tiles in turns.

    dy [tokens, inner], w [inner, columns], dx, ds [linears * tokens, WIDTH], a [linears * adapters * WIDTH, columns]
    and bits [linears * tokens, words]: tensor descriptors. The LoRA terms come first: a mask can be applied to them
    only before anything else is added. The other constants: as of `output_gemm_kernel`.
    """
    gdc_wait()
    ring = _made_ring(dy_0, w_0, SLOTS)
    dx_slots = gl.allocate_shared_memory(dx.dtype, [STORES] + dx.block_type.shape, dx.layout)
    products, inner = (dy_0, w_0, dy_1, w_1, dy_2, w_2), (inner_0, inner_1, inner_2)
    tables, sizes = (offsets, adapters), (tokens, columns, segments, adapter_count)
    gl.warp_specialize(
        [
            (_input_multiplier, (products, inner, dx, ds, a, bits, tables, ring, dx_slots, sizes,
                                 LINEARS, MASKED, WIDTH, STEPS, GROUP)),
            (_input_loader, (products, inner, ds, a, bits, tables, ring, sizes,
                             LINEARS, MASKED, WIDTH, STEPS, GROUP)),
        ],
        [1],
        [LOADER_REGISTERS],
    )  # fmt: skip
