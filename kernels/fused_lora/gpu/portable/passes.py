"""The passes over the large activations: x for s, dy for ds and db, x again for da.

Each reads its tensor once and computes little beside. Sums over parts of the batch or of the columns are written in
float32 and added by `finish_*` in a fixed order: the same bits at every run, for one more launch and some traffic in
the L2 cache, where atomics would give other bits each time. Shapes are told in `fused_lora.ops`.
"""

import triton
import triton.language as tl

from fused_lora.gpu.portable.masks import loaded_words, masked
from fused_lora.gpu.portable.segments import (
    adapters_of_rows,
    let_the_next_begin,
    tile_of_segment,
    tiles_before,
    wait_for_the_kernel_before,
)


@triton.jit
def _rank_range(rank_offsets, adapter):
    """First row of a, and rank, of one adapter; rank_offsets: of one linear."""
    first = tl.load(rank_offsets + adapter)
    return first, tl.load(rank_offsets + adapter + 1) - first


@triton.jit
def _rank_ranges(rank_offsets, adapter, adapter_count, LINEARS: tl.constexpr):
    """The same of each linear, as tuples, and the largest rank."""
    rows_of_a, ranks, widest = (), (), 0
    for linear in tl.static_range(LINEARS):
        row, rank = _rank_range(rank_offsets + linear * (adapter_count + 1), adapter)
        rows_of_a, ranks, widest = rows_of_a + (row,), ranks + (rank,), tl.maximum(widest, rank)
    return rows_of_a, ranks, widest


@triton.jit
def _zeros(COUNT: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """Sums that begin: a tuple of float32 [HEIGHT, WIDTH]."""
    sums = ()
    for _ in tl.static_range(COUNT):
        sums = sums + (tl.zeros((HEIGHT, WIDTH), tl.float32),)
    return sums


@triton.jit
def _dropped(tile, bits, rows, column, words, tokens, MASKED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    if MASKED:
        tile = masked(tile, loaded_words(bits, rows, column, words, tokens, COLUMNS), ROWS, COLUMNS)
    return tile


@triton.jit
def _sum_of_parts(parts, count, part_size, place, inside, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """The sum of `count` partial sums in a fixed order, float32 [HEIGHT, WIDTH]; AT_ONCE loads are under way, few
    enough that all programs find registers at once."""
    AT_ONCE: tl.constexpr = 8
    total = tl.zeros((HEIGHT, WIDTH), tl.float32)
    for first in range(0, count, AT_ONCE):
        part = first + tl.arange(0, AT_ONCE)
        pointers = parts + part.to(tl.int64)[:, None, None] * part_size + place[None, :, :]
        total += tl.sum(tl.load(pointers, mask=(part < count)[:, None, None] & inside[None, :, :], other=0.0), 0)
    return total


@triton.jit
def _finish_rows(
    parts, target, scales, rank_offsets, offsets, adapters, rows, tokens, s_width, segments, count, part_size,
    SEGMENTS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The sum of a row's partial sums, in their order, times its adapter's scale, and zero beyond its rank; of one
    linear. The sums do not wait until the adapter is known: what nobody wrote is loaded, too, and not used."""
    ranks = tl.arange(0, WIDTH)
    place = rows.to(tl.int64)[:, None] * s_width + ranks[None, :]
    there = (rows < tokens)[:, None] & (ranks < s_width)[None, :]
    total = _sum_of_parts(parts, count, part_size, place, there, ROWS, WIDTH)
    adapter = adapters_of_rows(offsets, adapters, rows, tokens, segments, SEGMENTS)
    has_adapter = adapter >= 0
    end = tl.load(rank_offsets + adapter + 1, mask=has_adapter, other=0)
    rank = end - tl.load(rank_offsets + adapter, mask=has_adapter, other=0)
    scale = tl.load(scales + adapter, mask=has_adapter, other=0.0)[:, None]
    total = tl.where(ranks[None, :] < rank[:, None], total * scale, 0.0)
    tl.store(target + place, total.to(target.dtype.element_ty), mask=has_adapter[:, None] & there)


@triton.jit(do_not_specialize=["tokens", "segments", "adapter_count"])
def project_kernel(
    x, a, bits, target, scales, rank_offsets, offsets, adapters, tokens, columns, s_width, words, segments,
    adapter_count, split_columns,
    LINEARS: tl.constexpr, MASKED: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr,
    SEGMENTS: tl.constexpr, RANKS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """s = scale m(x) a^T of up to three linears, reading x once: where WHOLE, else partial sums without the scale.

    x, a: tensor descriptors. target: s [P, tokens, s_width], or float32 [splits, P, tokens, s_width], each the sums
    over split_columns columns: whole rows may be too few programs to keep the memory busy. Grid (row tiles, rank
    tiles, splits).
    """
    wait_for_the_kernel_before(OVERLAP)
    let_the_next_begin(OVERLAP)
    segment, first, stop = tile_of_segment(offsets, tl.program_id(0), tokens, segments, ROWS, SEGMENTS)
    if segment >= segments:
        return
    adapter = tl.load(adapters + segment)
    if adapter < 0:
        return
    rows = first + tl.arange(0, ROWS)
    rank = tl.program_id(1) * RANKS
    rows_of_a, widths, widest = _rank_ranges(rank_offsets, adapter, adapter_count, LINEARS)
    if not WHOLE and rank >= widest:
        return  # where WHOLE, the zeros of an adapter without factors on these linears are written here, too
    sums = _zeros(LINEARS, ROWS, RANKS)
    plane = tl.cast(tokens, tl.int64) * words
    start = tl.program_id(2) * split_columns
    # Rows of the next segment and ranks of the next adapter may be among those loaded: they meet no others, and their
    # sums are not stored.
    for column in range(start, tl.minimum(start + split_columns, columns), COLUMNS):
        tile, added = x.load([first, column]), ()
        for linear in tl.static_range(LINEARS):
            kept_x = _dropped(tile, bits + linear * plane, rows, column, words, tokens, MASKED, ROWS, COLUMNS)
            a_tile = a.load([rows_of_a[linear] + rank, column]).T
            added = added + (tl.dot(kept_x, a_tile, sums[linear], input_precision=PRECISION),)
        sums = added
    inside = rows < stop
    ranks = rank + tl.arange(0, RANKS)
    s_plane = tl.cast(tokens, tl.int64) * s_width
    place = target + tl.program_id(2) * LINEARS * s_plane + rows.to(tl.int64)[:, None] * s_width + ranks[None, :]
    for linear in tl.static_range(LINEARS):
        total, width = sums[linear], widths[linear]
        if WHOLE:
            scale = tl.load(scales + linear * adapter_count + adapter).to(tl.float32)
            total, width = tl.where((ranks < width)[None, :], total * scale, 0.0), s_width
        mask = inside[:, None] & (ranks < width)[None, :]
        tl.store(place + linear * s_plane, total.to(target.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens", "segments", "adapter_count", "splits"])
def finish_project_kernel(
    s_parts, s, scales, rank_offsets, offsets, adapters, tokens, s_width, segments, adapter_count, splits, part_size,
    SEGMENTS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """s [P, tokens, s_width] = scale m(x) a^T, from `project_kernel`'s partial sums. Grid (row tiles, P)."""
    wait_for_the_kernel_before(OVERLAP)
    linear = tl.program_id(1)
    plane = linear * tl.cast(tokens, tl.int64) * s_width
    _finish_rows(
        s_parts + plane, s + plane, scales + linear * adapter_count, rank_offsets + linear * (adapter_count + 1),
        offsets, adapters, tl.program_id(0) * ROWS + tl.arange(0, ROWS), tokens, s_width, segments, splits, part_size,
        SEGMENTS, WIDTH, ROWS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["tokens", "segments"])
def output_pass_kernel(
    dy, b, s, ds_parts, db_parts, rank_offsets, offsets, adapters, tokens, columns, s_width, segments,
    PRECISION: tl.constexpr, SEGMENTS: tl.constexpr, RANKS: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Partial sums of dy b over COLUMNS columns and of dy^T s over CHUNK rows, of one linear, reading dy once.

    dy, s: tensor descriptors, s of the linear. b: the linear's part of it. rank_offsets: of the linear.
    ds_parts [column tiles, tokens, s_width], db_parts [row tiles, columns, s_width], float32. Grid (row tiles, column
    tiles, rank tiles).
    """
    wait_for_the_kernel_before(OVERLAP)
    let_the_next_begin(OVERLAP)
    tile = tl.program_id(0)
    segment, first, stop = tile_of_segment(offsets, tile, tokens, segments, CHUNK, SEGMENTS)
    if segment >= segments:
        return
    adapter = tl.load(adapters + segment)
    if adapter < 0:
        return
    row_of_a, rank = _rank_range(rank_offsets, adapter)
    if tl.program_id(2) * RANKS >= rank:
        return
    cols = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    ranks = tl.program_id(2) * RANKS + tl.arange(0, RANKS)
    factor = (cols < columns)[:, None] & (ranks < rank)[None, :]
    b_own = b + (row_of_a - tl.load(rank_offsets)).to(tl.int64) * columns
    b_tile = tl.load(b_own + cols[:, None] * rank + ranks[None, :], mask=factor, other=0.0).to(dy.dtype)
    ds_own = ds_parts + tl.program_id(1).to(tl.int64) * tokens * s_width
    column, rank_first = tl.program_id(1) * COLUMNS, tl.program_id(2) * RANKS
    db_sum = tl.zeros((COLUMNS, RANKS), tl.float32)
    whole = first + (stop - first) // ROWS * ROWS
    for row in range(first, whole, ROWS):
        rows = row + tl.arange(0, ROWS)
        dy_tile = dy.load([row, column])
        ds = tl.dot(dy_tile, b_tile, input_precision=PRECISION)
        db_sum = tl.dot(dy_tile.T, s.load([row, rank_first]), db_sum, input_precision=PRECISION)
        tl.store(ds_own + rows.to(tl.int64)[:, None] * s_width + ranks[None, :], ds, mask=(ranks < rank)[None, :])
    if whole < stop:  # the next segment's rows among the last must not be added, not even as zero times infinity
        rows = whole + tl.arange(0, ROWS)
        inside = (rows < stop)[:, None]
        dy_tile = dy.load([whole, column])
        dy_tile = tl.where(inside, dy_tile, tl.zeros_like(dy_tile))
        s_tile = s.load([whole, rank_first])
        s_tile = tl.where(inside, s_tile, tl.zeros_like(s_tile))
        ds = tl.dot(dy_tile, b_tile, input_precision=PRECISION)
        db_sum = tl.dot(dy_tile.T, s_tile, db_sum, input_precision=PRECISION)
        place = rows.to(tl.int64)[:, None] * s_width + ranks[None, :]
        tl.store(ds_own + place, ds, mask=inside & (ranks < rank)[None, :])
    db_own = db_parts + tile.to(tl.int64) * columns * s_width
    tl.store(db_own + cols[:, None] * s_width + ranks[None, :], db_sum, mask=factor)


@triton.jit
def _sum_of_tiles(
    parts, place, inside, part_size, adapter, offsets, adapters, tokens, segments,
    CHUNK: tl.constexpr, SEGMENTS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The partial sums of all row tiles of one adapter, in their order: float32 [HEIGHT, WIDTH]."""
    total = tl.zeros((HEIGHT, WIDTH), tl.float32)
    index = tl.arange(0, SEGMENTS)
    of_adapter = (tl.load(adapters + index, mask=index < segments, other=-1) == adapter) & (index < segments)
    segment = tl.min(tl.where(of_adapter, index, SEGMENTS), 0)
    while segment < SEGMENTS:  # once, but for an adapter in several segments
        before, count = tiles_before(offsets, segment, tokens, segments, CHUNK, SEGMENTS)
        first = parts + before.to(tl.int64) * part_size
        total += _sum_of_parts(first, count, part_size, place, inside, HEIGHT, WIDTH)
        segment = tl.min(tl.where(of_adapter & (index > segment), index, SEGMENTS), 0)
    return total


@triton.jit
def _finish_columns(
    db_parts, db, rank_offsets, offsets, adapters, cols, adapter, tokens, columns, s_width, segments,
    CHUNK: tl.constexpr, SEGMENTS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The sum of some columns' partial sums of one adapter's db, of one linear."""
    ranks = tl.arange(0, WIDTH)
    row_of_a, rank = _rank_range(rank_offsets, adapter)
    inside = (cols < columns)[:, None] & (ranks < rank)[None, :]
    place = cols[:, None] * s_width + ranks[None, :]
    total = _sum_of_tiles(
        db_parts, place, inside, tl.cast(columns, tl.int64) * s_width, adapter, offsets, adapters, tokens, segments,
        CHUNK, SEGMENTS, ROWS, WIDTH,
    )  # fmt: skip
    db_own = db + (row_of_a - tl.load(rank_offsets)).to(tl.int64) * columns
    tl.store(db_own + cols[:, None] * rank + ranks[None, :], total.to(db.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens", "segments", "column_tiles", "ds_programs", "db_programs"])
def finish_output_kernel(
    ds_parts, ds, db_parts, db, scales, rank_offsets, offsets, adapters, tokens, columns, s_width, segments,
    column_tiles, ds_programs, db_programs,
    CHUNK: tl.constexpr, SEGMENTS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """ds [tokens, s_width] = scale dy b and db = dy^T s of one linear, from `output_pass_kernel`'s partial sums.

    Grid: ds_programs row tiles, then for each adapter db_programs column tiles, or none where db is not wanted.
    """
    wait_for_the_kernel_before(OVERLAP)
    program = tl.program_id(0)
    if program < ds_programs:
        _finish_rows(
            ds_parts, ds, scales, rank_offsets, offsets, adapters, program * ROWS + tl.arange(0, ROWS), tokens, s_width,
            segments, column_tiles, tl.cast(tokens, tl.int64) * s_width, SEGMENTS, WIDTH, ROWS,
        )  # fmt: skip
    else:
        program -= ds_programs
        _finish_columns(
            db_parts, db, rank_offsets, offsets, adapters, program % db_programs * ROWS + tl.arange(0, ROWS),
            program // db_programs, tokens, columns, s_width, segments, CHUNK, SEGMENTS, WIDTH, ROWS,
        )  # fmt: skip


@triton.jit
def _is_last_program():
    """Is this the program that begins last?"""
    last = tl.program_id(0) == tl.num_programs(0) - 1
    return last & (tl.program_id(1) == tl.num_programs(1) - 1) & (tl.program_id(2) == tl.num_programs(2) - 1)


@triton.jit
def _add_rows(
    sums, x, ds, bits, row, stop, column, rank_first, words, tokens,
    LINEARS: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr, LAST: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """The sums of `input_pass_kernel` with those of ROWS rows added. LAST: rows from `stop` are the next segment's, and
    must not be added, not even as zero times infinity."""
    rows = row + tl.arange(0, ROWS)
    inside = (rows < stop)[:, None]
    plane = tl.cast(tokens, tl.int64) * words
    x_tile, added = x.load([row, column]), ()
    if LAST:
        x_tile = tl.where(inside, x_tile, tl.zeros_like(x_tile))
    for linear in tl.static_range(LINEARS):
        kept_x = _dropped(x_tile, bits + linear * plane, rows, column, words, tokens, MASKED, ROWS, COLUMNS)
        ds_tile = ds.load([linear * tokens + row, rank_first])
        if LAST:
            ds_tile = tl.where(inside, ds_tile, tl.zeros_like(ds_tile))
        added = added + (tl.dot(ds_tile.T, kept_x, sums[linear], input_precision=PRECISION),)
    return added


@triton.jit(do_not_specialize=["tokens", "segments", "adapter_count", "tiles"])
def input_pass_kernel(
    x, ds, bits, da_parts, rank_offsets, offsets, adapters, tokens, columns, s_width, words, segments, adapter_count,
    tiles,
    LINEARS: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr, SEGMENTS: tl.constexpr, RANKS: tl.constexpr,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CONCURRENT: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Partial sums of ds^T m(x) over CHUNK rows, of up to three linears, reading x once.

    x, ds: tensor descriptors, ds with the linears' rows one after the other. da_parts [P, tiles, s_width, columns],
    float32. Grid (row tiles, column tiles, rank tiles).

    CONCURRENT: the kernel before has let this one begin, and nothing here reads its results. One program waits for it
    nevertheless: kernels that follow wait for this one, and rely on what came before it being done, too.
    """
    if not CONCURRENT or _is_last_program():
        wait_for_the_kernel_before(OVERLAP)
    let_the_next_begin(OVERLAP)
    tile = tl.program_id(0)
    segment, first, stop = tile_of_segment(offsets, tile, tokens, segments, CHUNK, SEGMENTS)
    if segment >= segments:
        return
    adapter = tl.load(adapters + segment)
    if adapter < 0:
        return
    _, _, widest = _rank_ranges(rank_offsets, adapter, adapter_count, LINEARS)
    if tl.program_id(2) * RANKS >= widest:
        return
    column = tl.program_id(1) * COLUMNS
    cols = column + tl.arange(0, COLUMNS)
    ranks = tl.program_id(2) * RANKS + tl.arange(0, RANKS)
    sums = _zeros(LINEARS, RANKS, COLUMNS)
    rank_first = tl.program_id(2) * RANKS
    whole = first + (stop - first) // ROWS * ROWS
    for row in range(first, whole, ROWS):
        sums = _add_rows(
            sums, x, ds, bits, row, stop, column, rank_first, words, tokens,
            LINEARS, MASKED, PRECISION, False, ROWS, COLUMNS,
        )  # fmt: skip
    if whole < stop:
        sums = _add_rows(
            sums, x, ds, bits, whole, stop, column, rank_first, words, tokens,
            LINEARS, MASKED, PRECISION, True, ROWS, COLUMNS,
        )  # fmt: skip
    part_size = tl.cast(s_width, tl.int64) * columns
    place = da_parts + tile * part_size + ranks.to(tl.int64)[:, None] * columns + cols[None, :]
    wanted = (ranks < s_width)[:, None] & (cols < columns)[None, :]
    for linear in tl.static_range(LINEARS):
        tl.store(place + linear * tiles * part_size, sums[linear], mask=wanted)


@triton.jit(do_not_specialize=["tokens", "segments", "adapter_count", "tiles"])
def finish_input_kernel(
    da_parts, da, rank_offsets, offsets, adapters, tokens, columns, s_width, segments, adapter_count, tiles,
    CHUNK: tl.constexpr, SEGMENTS: tl.constexpr, RANKS: tl.constexpr, COLUMNS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """da [R, columns] from `input_pass_kernel`'s partial sums. Grid (column tiles, rank tiles, P times adapters)."""
    wait_for_the_kernel_before(OVERLAP)
    linear = tl.program_id(2) // adapter_count
    adapter = tl.program_id(2) % adapter_count
    row_of_a, rank = _rank_range(rank_offsets + linear * (adapter_count + 1), adapter)
    if tl.program_id(1) * RANKS >= rank:
        return
    cols = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    ranks = tl.program_id(1) * RANKS + tl.arange(0, RANKS)
    inside = (ranks < rank)[:, None] & (cols < columns)[None, :]
    part_size = tl.cast(s_width, tl.int64) * columns
    place = ranks.to(tl.int64)[:, None] * columns + cols[None, :]
    total = _sum_of_tiles(
        da_parts + linear * tiles * part_size, place, inside, part_size, adapter, offsets, adapters, tokens, segments,
        CHUNK, SEGMENTS, RANKS, COLUMNS,
    )  # fmt: skip
    target = da + (row_of_a + ranks).to(tl.int64)[:, None] * columns + cols[None, :]
    tl.store(target, total.to(da.dtype.element_ty), mask=inside)
