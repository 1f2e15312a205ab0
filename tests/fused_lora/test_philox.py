"""Philox against published vectors and plain integers; masks as a pure function of what they may depend on."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fused_lora.philox import drop_threshold, keep_mask, keep_words, mask_key, philox4x32, unpack, word_count

ONES = 0xFFFFFFFF
PINNED_KEY = 0x74FFD76CE5CBDB3C
# Random123's known-answer vectors for Philox4x32-10: counter, key, result.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter, key, expected):
    words = philox4x32(tuple(torch.tensor(word) for word in counter), key, rounds=10)
    assert tuple(int(word) for word in words) == expected


def plain_philox(counter, key, rounds):
    """The generator in Python's integers, as its paper states it."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(rounds):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & ONES, (p0 >> 32) ^ c3 ^ k1, p0 & ONES
        k0, k1 = (k0 + 0x9E3779B9) & ONES, (k1 + 0xBB67AE85) & ONES
    return c0, c1, c2, c3


@settings(deadline=None)  # a busy machine is no failure
@given(st.tuples(*[st.integers(0, ONES)] * 4), st.tuples(*[st.integers(0, ONES)] * 2), st.integers(1, 10))
def test_any_counter_and_key_agree_with_plain_integers(counter, key, rounds):
    words = philox4x32(tuple(torch.tensor(word) for word in counter), key, rounds)
    assert tuple(int(word) for word in words) == plain_philox(counter, key, rounds)


def plain_number(key, position, column):
    """The 16-bit number that decides about an element, as the layout of `philox` says, in Python's integers."""
    number = 0
    for bit in range(16):
        counter = (4 * (column // 32) + bit // 4, position & ONES, position >> 32 & ONES, 0)
        word = plain_philox(counter, (key & ONES, key >> 32), 7)[bit % 4]
        number |= (word >> column % 32 & 1) << bit
    return number


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9])
def test_the_layout_of_the_bits(p):
    """What every kernel must reproduce."""
    key, position = 0x0123456789ABCDEF, (7 << 32) + 5
    mask = keep_mask(key, torch.tensor([position]), 71, p)[0]
    assert mask.tolist() == [plain_number(key, position, column) >= drop_threshold(p) for column in range(71)]


def test_words_hold_a_bit_for_each_column():
    words = keep_words(7, torch.arange(5), 70, 0.3)
    assert words.shape == (5, word_count(70)) == (5, 3)
    assert torch.equal(unpack(words, 70), keep_mask(7, torch.arange(5), 70, 0.3))
    assert torch.equal(unpack(words.to(torch.int32), 70), unpack(words, 70))


def test_the_probability_is_rounded_to_16_bits():
    assert [drop_threshold(p) for p in (0.0, 0.1, 0.5, 0.3)] == [0, 6554, 32768, 19661]


def test_a_probability_that_rounds_to_one_still_drops():
    assert drop_threshold(1 - 2**-20) == 65535
    assert keep_mask(1, torch.arange(100), 100, 1 - 2**-20).double().mean() < 0.01


@settings(deadline=None, max_examples=30)
@given(
    key=st.integers(0, 2**64 - 1),
    first=st.integers(0, 2**40),
    tokens=st.integers(1, 9),
    columns=st.integers(1, 40),
    p=st.floats(0, 0.99),
)
def test_a_part_of_a_mask_is_the_mask_of_the_part(key, first, tokens, columns, p):
    positions = torch.arange(first, first + tokens)
    whole = keep_mask(key, positions, columns, p)
    shuffled = torch.randperm(tokens, generator=torch.Generator().manual_seed(0))
    assert torch.equal(keep_mask(key, positions[shuffled], columns, p), whole[shuffled])
    assert torch.equal(keep_mask(key, positions, max(1, columns // 2), p), whole[:, : max(1, columns // 2)])


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9])
def test_masks_drop_the_asked_share_evenly(p):
    mask = keep_mask(mask_key(1, 2, "mlp.up_proj"), torch.arange(2000), 200, p)
    share = 1 - mask.double().mean()
    # Six standard deviations of 400000 draws, and the rounding of p to 16 bits.
    assert abs(share - p) <= 6 * (p * (1 - p) / mask.numel()) ** 0.5 + 2**-17
    if p:
        for axis in (0, 1):
            spread = (1 - mask.double().mean(axis)).std()
            expected = (p * (1 - p) / mask.shape[axis]) ** 0.5
            assert spread == pytest.approx(expected, rel=0.25)


def test_masks_of_other_keys_positions_and_columns_are_independent():
    masks = [
        keep_mask(mask_key(seed, layer, module), torch.arange(500) + shift, 64, 0.5).double() - 0.5
        for seed, layer, module, shift in [
            (1, 0, "q_proj", 0),
            (2, 0, "q_proj", 0),
            (1, 1, "q_proj", 0),
            (1, 0, "k_proj", 0),
            (1, 0, "q_proj", 500),
            (1, 0, "q_proj", 2**32),
        ]
    ]
    for index, first in enumerate(masks):
        for second in masks[:index]:
            assert abs((first * second).mean()) < 0.25 * 6 / first.numel() ** 0.5


def test_keys_are_the_same_everywhere():
    assert mask_key(1, 2, "self_attn.q_proj") == PINNED_KEY
    assert mask_key(1, 2, "self_attn.k_proj") != mask_key(1, 2, "self_attn.q_proj")


@pytest.mark.parametrize("p", [-0.1, 1.0, 2.0])
def test_a_probability_out_of_range_is_named(p):
    with pytest.raises(ValueError, match=rf"dropout: expected a probability in \[0, 1\), found {p}"):
        keep_mask(0, torch.arange(2), 3, p)


@pytest.mark.parametrize("key", [-1, 2**64])
def test_a_key_of_more_than_64_bits_is_named(key):
    with pytest.raises(ValueError, match=rf"key: expected an integer in \[0, 2\^64\), found {key}"):
        keep_mask(key, torch.arange(2), 3, 0.5)


def test_negative_columns_are_named():
    with pytest.raises(ValueError, match="columns: expected a count of columns, found -1"):
        keep_mask(0, torch.arange(2), -1, 0.5)


def test_no_positions_or_no_columns_make_an_empty_mask():
    assert keep_mask(0, torch.arange(0), 5, 0.5).shape == (0, 5)
    assert keep_mask(0, torch.arange(4), 0, 0.5).shape == (4, 0)


def test_a_negative_position_counts_as_an_unsigned_word():
    expected = [plain_number(3, 2**64 - 3, column) >= 0x8000 for column in range(8)]
    assert keep_mask(3, torch.tensor([-3]), 8, 0.5)[0].tolist() == expected


def test_positions_of_another_form_are_named():
    with pytest.raises(ValueError, match=r"positions: expected int64 \[M\], found torch.int32 \(2,\)"):
        keep_mask(0, torch.arange(2, dtype=torch.int32), 3, 0.5)
