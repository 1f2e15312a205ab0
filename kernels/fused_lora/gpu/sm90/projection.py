"""The pass over x for s on sm_90, which draws the dropout masks that it applies.

Drawing is bound by arithmetic and reading x by memory, so they overlap: one warp orders copies, four draw masks, four
mask and multiply. In the graph of a linear of 8192 x 4096 on an H200 it takes 33 us, where two kernels took 13 and
31; x alone takes the memory 16.

Written in Gluon for what Triton does not do, warp roles and this: x goes from where the copy engine put it straight to
the registers that the matrix unit reads, is masked there, and is multiplied from there.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fused_lora.gpu.portable.masks import drawn, without_dropped
from fused_lora.gpu.sm90.ring import HALF, HALF_WORDS, LOADER_REGISTERS, PART, after

PROJECT_ROWS, PROJECT_COLUMNS = 64, 128  # of a tile, and of a step of it
WARPS = 4  # that multiply; as many draw

ROWS, STEP = gl.constexpr(PROJECT_ROWS), gl.constexpr(PROJECT_COLUMNS)
STEP_WORDS = gl.constexpr(PROJECT_COLUMNS // 32)
ROLE_WARPS = gl.constexpr(WARPS)
WORD_SLOTS = gl.constexpr(4)  # steps whose masks are drawn ahead
WORDS = gl.constexpr(gl.SliceLayout(2, HALF_WORDS.value))  # a step's mask words, who holds an element holding its word
DRAWN = gl.constexpr(gl.BlockedLayout([1, 2], [16, 2], [WARPS, 1], [1, 0]))
WORDS_SHARED = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
SCAN = gl.constexpr(gl.BlockedLayout([1], [32], [WARPS], [0]))


@gluon.jit
def _sum_of_two(first, second):
    return first + second


@gluon.jit
def _tile_of_segment(offsets, tile, tokens, segments, SEGMENTS: gl.constexpr):
    """As of `segments.tile_of_segment`, with tiles of ROWS rows."""
    index = gl.arange(0, SEGMENTS, SCAN)
    inside = index < segments
    starts = gl.minimum(gl.load(offsets + index, mask=inside, other=0), tokens)
    stops = gl.minimum(gl.load(offsets + index + 1, mask=inside, other=0), tokens)
    tiles = (stops - starts + ROWS - 1) // ROWS
    segment = gl.sum((gl.associative_scan(tiles, 0, _sum_of_two) <= tile).to(gl.int32), 0)
    is_segment = index == segment
    before = gl.sum(gl.where(index < segment, tiles, 0), 0)
    first = gl.sum(gl.where(is_segment, starts, 0), 0) + (tile - before) * ROWS
    return segment, first, gl.minimum(first + ROWS, gl.sum(gl.where(is_segment, stops, 0), 0))


@gluon.jit
def _barriers(COUNT: gl.constexpr):
    """Two barriers for each slot of a ring: it is filled, it is emptied."""
    filled = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    emptied = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(COUNT):
        mbarrier.init(filled.index(slot), count=1)
        mbarrier.init(emptied.index(slot), count=1)
    return filled, emptied


@gluon.jit
def _load(x, a, ring, first, a_rows, start, stop, LINEARS: gl.constexpr):
    """Order the tiles of x and of each linear's a, step by step of columns."""
    x_slots, a_slots, filled, emptied = ring
    slot, phase = gl.to_tensor(0), gl.to_tensor(0)
    for column in range(start, stop, STEP):
        bar = filled.index(slot)
        mbarrier.wait(emptied.index(slot), phase ^ 1)
        mbarrier.expect(bar, x.block_type.nbytes + LINEARS * a.block_type.nbytes)
        tma.async_copy_global_to_shared(x, [first, column], bar, x_slots.index(slot))
        for linear in gl.static_range(LINEARS):
            a_slot = a_slots.index(slot * LINEARS + linear)
            tma.async_copy_global_to_shared(a, [a_rows[linear], column], bar, a_slot)
        slot, phase = after(slot, phase, ring)


@gluon.jit
def _draw(
    bits, positions, thresholds, keys, ring, place, sizes, start, stop,
    LINEARS: gl.constexpr, POSITION_STRIDE: gl.constexpr,
):  # fmt: skip
    """Draw each step's mask words, as `masks.draw_masks_kernel`, for the warps that multiply and for memory."""
    word_slots, filled, emptied = ring
    first, row_stop, adapter = place[0], place[1], place[3]
    tokens, words, adapter_count = sizes[0], sizes[2], sizes[3]
    rows = first + gl.arange(0, ROWS, gl.SliceLayout(1, DRAWN))
    if POSITION_STRIDE == 0:
        position = gl.load(positions) + rows
    else:
        position = gl.load(positions + rows, mask=rows < row_stop, other=0)
    low, high = position.to(gl.uint32)[:, None], (position >> 32).to(gl.uint32)[:, None]
    settings = ()
    for linear in gl.static_range(LINEARS):
        threshold = gl.load(thresholds + linear * adapter_count + adapter)
        key = gl.load(keys + linear * adapter_count + adapter)
        settings = settings + ((threshold, key.to(gl.uint32), (key >> 32).to(gl.uint32)),)
    slot, phase = gl.to_tensor(0), gl.to_tensor(0)
    for column in range(start, stop, STEP):
        word = column // 32 + gl.arange(0, STEP_WORDS, gl.SliceLayout(0, DRAWN))
        mbarrier.wait(emptied.index(slot), phase ^ 1)
        for linear in gl.static_range(LINEARS):
            threshold, key_low, key_high = settings[linear]
            keep = gl.full((ROWS, STEP_WORDS), 0xFFFFFFFF, gl.uint32, DRAWN)
            zero = gl.zeros((1, 1), gl.uint32, DRAWN)
            drawn_words = drawn(keep, word, low, high, zero, key_low, key_high, threshold).to(gl.int32, bitcast=True)
            word_slots.index(slot * LINEARS + linear).store(drawn_words)
            row = linear * gl.to_tensor(tokens).to(gl.int64) + rows
            inside = (rows < row_stop)[:, None] & (word < words)[None, :]
            gl.store(bits + row[:, None] * words + word[None, :], drawn_words, mask=inside)
        mbarrier.arrive(filled.index(slot), count=1)
        slot, phase = after(slot, phase, (filled,))


@gluon.jit
def _masked(tile, word, OPERAND: gl.constexpr):
    """tile, zero where the words drop it: `masks.masked` in the layout of an operand."""
    spread = gl.full((ROWS, STEP_WORDS, 32), 0, gl.int32, HALF_WORDS) + word[:, :, None]
    spread = gl.convert_layout(spread.reshape((ROWS, STEP)), OPERAND, assert_trivial=True)
    shift = (31 - gl.arange(0, STEP, gl.SliceLayout(0, OPERAND)) % 32)[None, :]
    shift = gl.full((ROWS, STEP), 0, gl.int32, OPERAND) + shift
    return without_dropped(tile, spread, shift)


@gluon.jit
def _multiply(
    x, a, outputs, ring, word_ring, place, sizes, start, stop,
    LINEARS: gl.constexpr, MASKED: gl.constexpr, WHOLE: gl.constexpr, RANKS: gl.constexpr,
):  # fmt: skip
    """Sum a tile's products over the columns, and store them."""
    PRODUCT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [ROLE_WARPS, 1], [16, RANKS, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=PRODUCT, k_width=2)
    target, scales, rank_offsets = outputs
    x_slots, a_slots, filled, emptied = ring
    word_slots, ready, used = word_ring
    first, row_stop, rank, adapter = place
    tokens, s_width, _, adapter_count = sizes
    sums = ()
    for _ in gl.static_range(LINEARS):
        sums = sums + (gl.zeros((ROWS, RANKS), gl.float32, PRODUCT),)
    slot, phase = gl.to_tensor(0), gl.to_tensor(0)
    word_slot, word_phase = gl.to_tensor(0), gl.to_tensor(0)
    for _ in range(start, stop, STEP):
        mbarrier.wait(filled.index(slot), phase)
        if MASKED:
            mbarrier.wait(ready.index(word_slot), word_phase)
        x_slot, added = x_slots.index(slot), ()
        for linear in gl.static_range(LINEARS):
            a_slot = a_slots.index(slot * LINEARS + linear).permute((1, 0))
            if MASKED:
                word = word_slots.index(word_slot * LINEARS + linear).load(WORDS)
                kept = _masked(x_slot.load(OPERAND), word, OPERAND)
                added = added + (warpgroup_mma(kept, a_slot, sums[linear]),)
            else:
                added = added + (warpgroup_mma(x_slot, a_slot, sums[linear]),)
        sums = added
        fence_async_shared()
        mbarrier.arrive(emptied.index(slot), count=1)
        slot, phase = after(slot, phase, ring)
        if MASKED:
            mbarrier.arrive(used.index(word_slot), count=1)
            word_slot, word_phase = after(word_slot, word_phase, (ready,))
    rows = first + gl.arange(0, ROWS, gl.SliceLayout(1, PRODUCT))
    ranks = rank + gl.arange(0, RANKS, gl.SliceLayout(0, PRODUCT))
    for linear in gl.static_range(LINEARS):
        total = sums[linear]
        linear_offsets = rank_offsets + linear * (adapter_count + 1) + adapter
        width = gl.load(linear_offsets + 1) - gl.load(linear_offsets)
        if WHOLE:
            scale = gl.load(scales + linear * adapter_count + adapter)
            total = gl.where((ranks < width)[None, :], total * scale, 0.0)
            width = s_width
        s_row = (gl.program_id(2) * LINEARS + linear) * gl.to_tensor(tokens).to(gl.int64) + rows
        inside = (rows < row_stop)[:, None] & (ranks < width)[None, :]
        gl.store(target + s_row[:, None] * s_width + ranks[None, :], total.to(target.dtype.element_ty), mask=inside)


@gluon.jit(do_not_specialize=["tokens", "segments", "adapter_count"])
def mask_and_project_kernel(
    x, a, bits, target, scales, rank_offsets, offsets, adapters, tokens, columns, s_width, words, segments,
    adapter_count, split_columns, positions, thresholds, keys,
    LINEARS: gl.constexpr, MASKED: gl.constexpr, WHOLE: gl.constexpr, SEGMENTS: gl.constexpr, RANKS: gl.constexpr,
    POSITION_STRIDE: gl.constexpr, SLOTS: gl.constexpr, DRAWING_REGISTERS: gl.constexpr,
):  # fmt: skip
    """What `masks.draw_masks_kernel` and `passes.project_kernel` compute, for elements of 16 bits, by tiles of ROWS
    rows and steps of STEP columns. Rows of bits whose tokens have no adapter, or one without ranks, are not written.

    Grid (row tiles, rank tiles, splits), with one rank tile where MASKED.
    """
    gl.static_assert(ROWS == PART and STEP == HALF)  # whose layout of words the warps that multiply use
    gdc_wait()
    gdc_launch_dependents()
    segment, first, row_stop = _tile_of_segment(offsets, gl.program_id(0), tokens, segments, SEGMENTS)
    adapter = gl.load(adapters + gl.minimum(segment, segments - 1))
    rank = gl.program_id(1) * RANKS
    a_rows, widest = (), 0
    for linear in gl.static_range(LINEARS):
        linear_offsets = rank_offsets + linear * (adapter_count + 1) + gl.maximum(adapter, 0)
        row = gl.load(linear_offsets)
        a_rows = a_rows + (row + rank,)
        widest = gl.maximum(widest, gl.load(linear_offsets + 1) - row)
    # A tile too many, without an adapter or without ranks has no columns; where WHOLE, its rows are zeros nevertheless.
    there = (segment < segments) & (adapter >= 0)
    start = gl.program_id(2) * split_columns
    stop = gl.where(there & (rank < widest), gl.minimum(start + split_columns, columns), start)
    row_stop = gl.where(there, row_stop, first)
    x_slots = gl.allocate_shared_memory(x.dtype, [SLOTS] + x.block_type.shape, x.layout)
    a_slots = gl.allocate_shared_memory(a.dtype, [SLOTS * LINEARS] + a.block_type.shape, a.layout)
    word_slots = gl.allocate_shared_memory(gl.int32, [WORD_SLOTS * LINEARS, ROWS, STEP_WORDS], WORDS_SHARED)
    filled, emptied = _barriers(SLOTS)
    ready, used = _barriers(WORD_SLOTS)
    ring, word_ring = (x_slots, a_slots, filled, emptied), (word_slots, ready, used)
    place, sizes = (first, row_stop, rank, gl.maximum(adapter, 0)), (tokens, s_width, words, adapter_count)
    outputs = (target, scales, rank_offsets)
    if MASKED:
        gl.warp_specialize(
            [
                (_multiply, (x, a, outputs, ring, word_ring, place, sizes, start, stop, LINEARS, True, WHOLE, RANKS)),
                (_draw, (bits, positions, thresholds, keys, word_ring, place, sizes, start, stop,
                         LINEARS, POSITION_STRIDE)),
                (_load, (x, a, ring, first, a_rows, start, stop, LINEARS)),
            ],
            [ROLE_WARPS, 1],
            [DRAWING_REGISTERS, LOADER_REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_multiply, (x, a, outputs, ring, word_ring, place, sizes, start, stop, LINEARS, False, WHOLE, RANKS)),
                (_load, (x, a, ring, first, a_rows, start, stop, LINEARS)),
            ],
            [1],
            [LOADER_REGISTERS],
        )
