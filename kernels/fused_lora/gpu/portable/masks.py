"""Dropout masks as packed bits: the kernel that draws them, and how other kernels read them.

They are drawn by a kernel of their own, which depends on nothing but keys and positions: drawn by the threads that
multiply they cost more, 55 us for 8192 x 4096 on an H200 against 12 us here and 28 us for the pass that reads them. On
sm_90 `hopper_passes` draws them by other warps of the same pass; there this kernel is for bits that were not kept.
"""

import triton
import triton.language as tl

from fused_lora import philox
from fused_lora.gpu.portable.segments import adapters_of_rows, wait_for_the_kernel_before

ROUNDS = tl.constexpr(philox.ROUNDS)
MULTIPLIER_0, MULTIPLIER_1 = (tl.constexpr(value) for value in philox.MULTIPLIERS)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # inline assembly is for GPUs
WEYL_0, WEYL_1 = (tl.constexpr(value) for value in philox.WEYL)


@triton.jit
def philox4x32(c0, c1, c2, c3, k0, k1):
    """Four random words of 32 bits. Operands may have shapes [rows, 1] and [1, columns]: what depends on one of them
    alone, most of the first two rounds, is computed once for it."""
    for _ in tl.static_range(ROUNDS):
        product_0 = c0.to(tl.uint64) * MULTIPLIER_0
        product_1 = c2.to(tl.uint64) * MULTIPLIER_1
        c0, c1, c2, c3 = (
            (product_1 >> 32).to(tl.uint32) ^ c1 ^ k0,
            product_1.to(tl.uint32),
            (product_0 >> 32).to(tl.uint32) ^ c3 ^ k1,
            product_0.to(tl.uint32),
        )
        k0 = (k0 + WEYL_0).to(tl.uint32)
        k1 = (k1 + WEYL_1).to(tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def _compared(keep, random, threshold, BIT: tl.constexpr):
    """One bit of 32 numbers against the threshold's: where they differ it decides, else the lower bits have."""
    clear = (((threshold >> BIT) & 1) - 1).to(tl.uint32, bitcast=True)  # all ones where the threshold's bit is not set
    return (keep & random) | ((keep | random) & clear)


@triton.jit
def drawn(keep, words, low, high, zero, key_0, key_1, threshold):
    """The mask words [rows, words] of places `words` and positions (low, high [rows, 1]): a bit for each element.

    keep: all ones. zero: [1, 1]. key_0, key_1 and threshold: [rows, 1], or of all rows. Kernels in Gluon call it, too:
    it makes no tensor, so layouts are those of the arguments."""
    for call in tl.static_range(4):
        counter = (words * 4 + call).to(tl.uint32)[None, :]
        random = philox4x32(counter, low, high, zero, key_0, key_1)
        for index in tl.static_range(4):
            keep = _compared(keep, random[index], threshold, 4 * call + index)
    return keep


@triton.jit(do_not_specialize=["tokens", "segments", "adapter_count"])
def draw_masks_kernel(
    bits, positions, thresholds, keys, offsets, adapters, tokens, words, segments, adapter_count,
    POSITION_STRIDE: tl.constexpr, SEGMENTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """bits [P, tokens, words], laid out as `fused_lora.philox` tells. Grid (rows, words, P).

    POSITION_STRIDE: 1 where positions hold each row's, 0 where they hold the first one's.
    """
    wait_for_the_kernel_before(OVERLAP)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    linear = tl.program_id(2)
    adapter = adapters_of_rows(offsets, adapters, rows, tokens, segments, SEGMENTS)
    has_adapter = adapter >= 0
    setting = linear * adapter_count + adapter
    threshold = tl.load(thresholds + setting, mask=has_adapter, other=0)[:, None]  # 0 keeps everything
    key = tl.load(keys + setting, mask=has_adapter, other=0)[:, None]
    if POSITION_STRIDE == 0:
        position = (tl.load(positions) + rows)[:, None]
    else:
        position = tl.load(positions + rows, mask=has_adapter, other=0)[:, None]
    key_0, key_1 = key.to(tl.uint32), (key >> 32).to(tl.uint32)
    low, high = position.to(tl.uint32), (position >> 32).to(tl.uint32)
    keep = tl.full((ROWS, COLUMNS), 0xFFFFFFFF, tl.uint32)
    keep = drawn(keep, columns, low, high, tl.zeros((1, 1), tl.uint32), key_0, key_1, threshold)
    target = bits + (linear * tokens + rows[:, None]).to(tl.int64) * words + columns[None, :]
    inside = (rows < tokens)[:, None] & (columns < words)[None, :]
    tl.store(target, keep.to(tl.int32, bitcast=True), mask=inside)


@triton.jit
def loaded_words(bits, rows, column, words, row_stop, COLUMNS: tl.constexpr):
    """The words that hold the mask of COLUMNS columns from `column`, a multiple of 32: int32 [rows, COLUMNS // 32]."""
    place = column // 32 + tl.arange(0, COLUMNS // 32)
    inside = (rows < row_stop)[:, None] & (place < words)[None, :]
    return tl.load(bits + rows.to(tl.int64)[:, None] * words + place[None, :], mask=inside, other=0)


@triton.jit
def _spread(word, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Each element's word, in registers: a load for each element would go through shared memory, 32 times as much."""
    return tl.reshape(tl.broadcast_to(word[:, :, None], (ROWS, COLUMNS // 32, 32)), (ROWS, COLUMNS))


@triton.jit
def kept(word, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Which elements the words [ROWS, COLUMNS // 32] keep: bool [ROWS, COLUMNS]."""
    return ((_spread(word, ROWS, COLUMNS) >> (tl.arange(0, COLUMNS) % 32)[None, :]) & 1) != 0


@triton.jit
def without_dropped(tile, word, shift):
    """tile of 16-bit elements, zero where an element's word, shifted left, has no sign; all of one shape. Kernels in
    Gluon call it, too, with all in one layout."""
    return tl.inline_asm_elementwise(
        """
        {
            .reg .b32 first, second;
            shl.b32 first, $2, $4;
            shl.b32 second, $3, $5;
            prmt.b32 first, first, second, 0xFFBB;
            and.b32 $0, $1, first;
        }
        """,
        "=r,r,r,r,r,r",
        [tile, word, shift],
        dtype=tile.dtype,
        is_pure=True,
        pack=2,
    )


@triton.jit
def masked(tile, word, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """tile [ROWS, COLUMNS], zero where the words [ROWS, COLUMNS // 32] drop it.

    The passes over x are bound by instructions more than by memory, so the mask must cost few: two for each element of
    16 bits, by moving its bit to a sign and spreading two signs over a register with prmt, in place of five or six.
    """
    if tile.dtype.primitive_bitwidth == 16 and not INTERPRETED:
        shift = tl.broadcast_to((31 - tl.arange(0, COLUMNS) % 32)[None, :], (ROWS, COLUMNS))
        return without_dropped(tile, _spread(word, ROWS, COLUMNS), shift)
    return tl.where(kept(word, ROWS, COLUMNS), tile, tl.zeros_like(tile))
