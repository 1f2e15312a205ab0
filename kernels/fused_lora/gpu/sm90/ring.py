"""What the GEMMs for sm_90 are made of: a ring of slots in shared memory, and who fills, multiplies and empties it.

One warp, the loader, only orders copies, of all that a tile needs and in its order; two warpgroups, the multipliers,
compute half a tile's rows each with what has arrived. They do not wait for each other, so that one multiplies while the
other stores. Written in Gluon, Triton's lower level: `sm90.gemms` says why.
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

TILE_ROWS, TILE_COLUMNS = 128, 256  # of our GEMM
DEPTH = 64  # of a step along the inner dimension
WARPS = 4  # of each multiplier
REGISTERS = 168  # a thread, were all alike: three warpgroups share 64512, the loader's being the third

ROWS, COLUMNS, STEP = gl.constexpr(TILE_ROWS), gl.constexpr(TILE_COLUMNS), gl.constexpr(DEPTH)
MULTIPLIER_WARPS = gl.constexpr(WARPS)
PART = gl.constexpr(TILE_ROWS // 2)  # rows of a multiplier
UPPER, LOWER = gl.constexpr(0), gl.constexpr(1)  # half of a tile's rows: the places of the multipliers
HALF = gl.constexpr(TILE_COLUMNS // 2)
MULTIPLIER_REGISTERS, LOADER_REGISTERS = gl.constexpr(240), gl.constexpr(24)
PRODUCT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, TILE_COLUMNS, 16]))
HALF_PRODUCT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, TILE_COLUMNS // 2, 16]))
# Half a tile with its columns as words and bits: who holds an element of the product holds its word of the mask.
HALF_WORDS = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 0, 1], [8, 0, 0], [0, 0, 8], [0, 0, 16], [0, 1, 0], [0, 2, 0]],
        lane_bases=[[0, 0, 2], [0, 0, 4], [1, 0, 0], [2, 0, 0], [4, 0, 0]],
        warp_bases=[[16, 0, 0], [32, 0, 0]],
        block_bases=[],
        shape=[TILE_ROWS // 2, TILE_COLUMNS // 2 // 32, 32],
    )
)


@gluon.jit
def tile_place(tile, tokens, columns, GROUP: gl.constexpr):
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
def segments_meeting(offsets, row, row_stop, segments, STEPS: gl.constexpr):
    """The segments that have rows in [row, row_stop), as a range of their indices; empty ones may be among them.

    STEPS: halvings that find one among all segments, 0 for a single one."""
    if STEPS == 0:
        return 0, 1
    return _count_below(offsets + 1, row + 1, segments, STEPS), _count_below(offsets, row_stop, segments, STEPS)


@gluon.jit
def span(offsets, adapters, segment, row, row_stop):
    """First and end row of a segment within a tile; empty where it has no adapter."""
    start = gl.maximum(gl.load(offsets + segment), row)
    stop = gl.minimum(gl.load(offsets + segment + 1), row_stop)
    return start, gl.where(gl.load(adapters + segment) >= 0, stop, start)


@gluon.jit
def made_ring(x, w, SLOTS: gl.constexpr):
    """Slots for tiles of x and w, and two barriers for each: it is filled, it is emptied by both multipliers."""
    x_slots = gl.allocate_shared_memory(x.dtype, [SLOTS] + x.block_type.shape, x.layout)
    w_slots = gl.allocate_shared_memory(w.dtype, [SLOTS] + w.block_type.shape, w.layout)
    filled = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    emptied = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(filled.index(slot), count=1)
        mbarrier.init(emptied.index(slot), count=2)
    return x_slots, w_slots, filled, emptied


@gluon.jit
def after(slot, phase, ring):
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
def seen_as(slots, slot, descriptor):
    """A slot's memory as a tile of another descriptor."""
    return slots.index(slot)._reinterpret(descriptor.dtype, descriptor.block_type.shape, descriptor.layout)


@gluon.jit
def load_product(x, w, ring, row, column, inner, slot, phase, TRANSPOSED: gl.constexpr):
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
        slot, phase = after(slot, phase, ring)
    return slot, phase


@gluon.jit
def load_lora(
    s, factor, tables, ring, s_row, factor_row, height, row, row_stop, column, first, last, slot, phase,
    TRANSPOSED: gl.constexpr,
):  # fmt: skip
    """Order the operands of the LoRA terms of segments [first, last).

    s_row, factor_row: where the linear's rows begin. height: rows of one adapter in `factor`."""
    offsets, adapters = tables
    x_slots, w_slots, filled, emptied = ring
    RANKS: gl.constexpr = s.block_type.shape[1]
    for segment in range(first, last):
        start, stop = span(offsets, adapters, segment, row, row_stop)
        place = factor_row + gl.load(adapters + segment) * height
        if start < stop:
            # A constant's turns are unrolled, and this warp's 24 registers do not suffice for the four of 128 ranks.
            for chunk in range(s.shape[1] // RANKS):
                bar = filled.index(slot)
                mbarrier.wait(emptied.index(slot), phase ^ 1)
                mbarrier.expect(bar, s.block_type.nbytes + factor.block_type.nbytes)
                tma.async_copy_global_to_shared(s, [s_row + row, chunk * RANKS], bar, seen_as(x_slots, slot, s))
                factor_slot = seen_as(w_slots, slot, factor)
                if TRANSPOSED:
                    tma.async_copy_global_to_shared(factor, [place + column, chunk * RANKS], bar, factor_slot)
                else:
                    tma.async_copy_global_to_shared(factor, [place + chunk * RANKS, column], bar, factor_slot)
                slot, phase = after(slot, phase, ring)
    return slot, phase


@gluon.jit
def load_words(bits, ring, row, column, slot, phase):
    """Order the mask words of a tile."""
    x_slots, filled, emptied = ring[0], ring[2], ring[3]
    bar = filled.index(slot)
    mbarrier.wait(emptied.index(slot), phase ^ 1)
    mbarrier.expect(bar, bits.block_type.nbytes)
    tma.async_copy_global_to_shared(bits, [row, column // 32], bar, seen_as(x_slots, slot, bits))
    return after(slot, phase, ring)


@gluon.jit
def _start(total, ring, slot, phase, PLACE: gl.constexpr, ADD: gl.constexpr, TRANSPOSED: gl.constexpr):
    """Begin to multiply the tiles in a slot, and wait for the ones before. PLACE: which multiplier this is."""
    x_slots, w_slots, filled = ring[0], ring[1], ring[2]
    mbarrier.wait(filled.index(slot), phase)
    w_slot = w_slots.index(slot)
    if TRANSPOSED:
        w_slot = w_slot.permute((1, 0))
    total = warpgroup_mma(x_slots.index(slot).slice(PLACE * PART, PART, 0), w_slot, total, use_acc=ADD, is_async=True)
    return warpgroup_mma_wait(1, deps=(total,))


@gluon.jit
def multiply(
    total, ring, inner, slot, phase, PLACE: gl.constexpr, ADD: gl.constexpr, TRANSPOSED: gl.constexpr
):  # fmt: skip
    """total + the product whose tiles come next, or without ADD the product. One step is always under way: a slot is
    given back when the next is being multiplied.

    The first step stands before the loop: were total computed by other instructions than the loop's own, ptxas would
    let each of them wait for the one before, and dx took 17 % longer."""
    emptied = ring[3]
    total = _start(total, ring, slot, phase, PLACE, ADD, TRANSPOSED)
    slot, phase = after(slot, phase, ring)
    for _ in range(STEP, inner, STEP):
        total = _start(total, ring, slot, phase, PLACE, True, TRANSPOSED)
        mbarrier.arrive(emptied.index(_before(slot, ring)), count=1)
        slot, phase = after(slot, phase, ring)
    total = warpgroup_mma_wait(0, deps=(total,))
    mbarrier.arrive(emptied.index(_before(slot, ring)), count=1)
    return total, slot, phase


@gluon.jit
def rows_of_segment(s, ring, slot, row, start, stop, PLACE: gl.constexpr, LAYOUT: gl.constexpr):
    """A multiplier's rows of the tile of s in a slot, in registers, rows of other segments zero."""
    OPERAND: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=LAYOUT, k_width=2)
    tile = seen_as(ring[0], slot, s).slice(PLACE * PART, PART, 0).load(OPERAND)
    rows = row + PLACE * PART + gl.arange(0, PART, gl.SliceLayout(1, OPERAND))
    inside = (rows >= start) & (rows < stop)
    return gl.where(inside[:, None], tile, gl.zeros_like(tile))


@gluon.jit
def _halves(tile):
    """The left and the right half of a tile's columns; no element moves."""
    SHAPE: gl.constexpr = tile.type.shape
    return tile.reshape((SHAPE[0], 2, SHAPE[1] // 2)).permute((0, 2, 1)).split()


@gluon.jit
def joined(left, right):
    """The tile whose halves these are."""
    SHAPE: gl.constexpr = left.type.shape
    return gl.join(left, right).permute((0, 2, 1)).reshape((SHAPE[0], 2 * SHAPE[1]))


@gluon.jit
def store(y, total, y_slots, row, column, PLACE: gl.constexpr):
    """Store a multiplier's rows of a tile slice by slice of columns, as wide as the descriptor's: a slice waits until
    its slot is free."""
    SLICES: gl.constexpr = COLUMNS // y.block_type.shape[1]
    SLOTS: gl.constexpr = y_slots.type.shape[0] // 2
    slices = (total,)
    if SLICES > 1:
        slices = _halves(total)
    if SLICES == 4:
        left, right = slices
        slices = _halves(left) + _halves(right)
    for index in gl.static_range(SLICES):
        slot = y_slots.index(PLACE * SLOTS + index % SLOTS)
        tma.store_wait(SLOTS - 1)
        slot.store(slices[index].to(y.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(y, [row + PLACE * PART, column + index * (COLUMNS // SLICES)], slot)
