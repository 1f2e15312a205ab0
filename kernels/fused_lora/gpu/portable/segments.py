"""How kernels find out whose tokens they work on: binary facts about a few offsets, taken from the device.

Tokens of one adapter lie together. Passes that reduce over tokens lay their tiles over each segment apart, so that a
tile has one adapter (`tile_of_segment`); kernels whose tiles are rows of the whole batch ask which segments meet them
(`segments_meeting`). Neither needs the host, or tokens padded to tiles.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def wait_for_the_kernel_before(OVERLAP: tl.constexpr):
    """Call first in every kernel (programmatic dependent launch). Where OVERLAP (sm_90 and later), a kernel is launched
    while the one before it ends, and waits here for its results: that hides a microsecond or two of each launch.

    Exceptions: `output_gemm_kernel` waits just before it reads s, and `input_pass_kernel` may skip the wait beside the
    GEMM for dx. What they read earlier was finished before that kernel began."""
    if OVERLAP:
        gdc_wait()


@triton.jit
def let_the_next_begin(OVERLAP: tl.constexpr):
    """Call after the wait in the passes over large tensors. The kernel that follows a pass is small, or is a GEMM that
    uses its sums: its programs may take multiprocessors that become free one by one.

    Other kernels do not call it, except the GEMM for dx, beside which a pass may run. Programs of a pass that begin
    early crowd where there is room first: the pass over x took 47 us instead of 29.

    It comes after the wait, so that the next kernel may read what is older than this one before its own wait. Beside
    the GEMM one program of the pass waits; the next kernel begins only when all programs have called this."""
    if OVERLAP:
        gdc_launch_dependents()


@triton.jit
def segment_borders(offsets, tokens, segments, SEGMENTS: tl.constexpr):
    """First row and end of each segment, [SEGMENTS], empty beyond `segments`; held within the batch."""
    index = tl.arange(0, SEGMENTS)
    inside = index < segments
    starts = tl.load(offsets + index, mask=inside, other=0)
    stops = tl.load(offsets + index + 1, mask=inside, other=0)
    return index, tl.minimum(starts, tokens), tl.minimum(stops, tokens)


@triton.jit
def tile_of_segment(offsets, tile, tokens, segments, ROWS: tl.constexpr, SEGMENTS: tl.constexpr):
    """Segment, first row and end row of a tile of at most ROWS rows; segment >= `segments` for a tile too many."""
    index, starts, stops = segment_borders(offsets, tokens, segments, SEGMENTS)
    tiles = (stops - starts + ROWS - 1) // ROWS
    segment = tl.sum((tl.cumsum(tiles, 0) <= tile).to(tl.int32), 0)
    is_segment = index == segment
    before = tl.sum(tl.where(index < segment, tiles, 0), 0)
    first = tl.sum(tl.where(is_segment, starts, 0), 0) + (tile - before) * ROWS
    return segment, first, tl.minimum(first + ROWS, tl.sum(tl.where(is_segment, stops, 0), 0))


@triton.jit
def tiles_before(offsets, segment, tokens, segments, ROWS: tl.constexpr, SEGMENTS: tl.constexpr):
    """How many tiles of `tile_of_segment` come before a segment's first, and how many it has."""
    index, starts, stops = segment_borders(offsets, tokens, segments, SEGMENTS)
    tiles = (stops - starts + ROWS - 1) // ROWS
    return tl.sum(tl.where(index < segment, tiles, 0), 0), tl.sum(tl.where(index == segment, tiles, 0), 0)


@triton.jit
def segments_meeting(offsets, first, stop, tokens, segments, SEGMENTS: tl.constexpr):
    """The segments that have rows in [first, stop), as a range of their indices; others may be among them."""
    if SEGMENTS == 1:
        return 0, 1
    index, starts, stops = segment_borders(offsets, tokens, segments, SEGMENTS)
    inside = index < segments
    return tl.sum((inside & (stops <= first)).to(tl.int32), 0), tl.sum((inside & (starts < stop)).to(tl.int32), 0)


@triton.jit
def adapters_of_rows(offsets, adapters, rows, tokens, segments, SEGMENTS: tl.constexpr):
    """The adapter of each row, -1 where it has none: int32, shaped as rows."""
    index, starts, stops = segment_borders(offsets, tokens, segments, SEGMENTS)
    stops = tl.where(index < segments, stops, tokens + 1)
    segment = tl.sum((stops[None, :] <= rows[:, None]).to(tl.int32), 1)
    inside = (segment < segments) & (rows >= tl.load(offsets)) & (rows < tokens)
    return tl.load(adapters + segment, mask=inside, other=-1)
