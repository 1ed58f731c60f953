import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from exporters.packing import codes_per_block, pack, unpack

WIDTHS = (2, 3, 4, 5, 6, 7, 8)


def as_words(*words: int) -> torch.Tensor:
    return torch.tensor(words, dtype=torch.int64).to(torch.int32)  # wraps as two's complement


def from_stream(words: torch.Tensor, bits: int) -> list[int]:
    """The definition, in Python integers: one number whose bits k*b .. k*b + b are code k."""
    stream = sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(words.tolist()))
    return [stream >> (k * bits) & ((1 << bits) - 1) for k in range(len(words) * 32 // bits)]


@pytest.mark.parametrize(
    ("bits", "codes", "words"),
    [
        (2, [1, 2, 3, 0] * 4, [0x39393939]),
        (3, [1, *[0] * 9, 7, 5, *[0] * 20], [0xC0000001, 0x0000000B, 0]),
        (3, [*[0] * 21, 6, *[0] * 9, 4], [0, 0, 0x80000003]),  # code 21 is bits 63..65
        (4, [1, 2, 3, 4, 5, 6, 7, 8], [0x87654321]),
        (8, [1, 2, 3, 255], [0xFF030201]),
    ],
)
def test_golden_words_written_by_hand(bits: int, codes: list[int], words: list[int]) -> None:
    assert torch.equal(pack(torch.tensor(codes, dtype=torch.uint8), bits), as_words(*words))


@st.composite
def coded(draw: st.DrawFn) -> tuple[int, torch.Tensor]:
    bits = draw(st.sampled_from(WIDTHS))
    shape = (draw(st.integers(0, 4)), draw(st.integers(1, 3)) * codes_per_block(bits))
    seed = draw(st.integers(0, 2**31))
    return bits, torch.randint(0, 1 << bits, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@given(coded())
def test_unpack_inverts_pack_along_both_axes(case: tuple[int, torch.Tensor]) -> None:
    bits, codes = case
    assert torch.equal(unpack(pack(codes, bits), bits), codes)
    assert torch.equal(unpack(pack(codes.T, bits, axis=0), bits, axis=0), codes.T)
    assert torch.equal(pack(codes.T, bits, axis=0), pack(codes, bits).T)


@given(coded())
def test_words_are_one_little_endian_stream_of_bits(case: tuple[int, torch.Tensor]) -> None:
    bits, codes = case
    for row, words in zip(codes, pack(codes, bits), strict=True):
        assert from_stream(words, bits) == row.tolist()


@given(st.sampled_from(WIDTHS), st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=6))
def test_pack_inverts_unpack_so_no_bit_of_a_word_is_lost(bits: int, words: list[int]) -> None:
    packed = torch.tensor(words * bits, dtype=torch.int32)
    assert torch.equal(pack(unpack(packed, bits), bits), packed)


def test_words_that_the_codes_do_not_fill_are_a_bug_of_the_caller() -> None:
    with pytest.raises(AssertionError):
        pack(torch.zeros(8, dtype=torch.uint8), 3)


@pytest.mark.parametrize("bits", WIDTHS)
def test_views_that_start_anywhere_and_single_columns_are_packed_rightly(bits: int) -> None:
    codes = torch.randint(0, 1 << bits, (97,), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    assert torch.equal(pack(codes[1:], bits), pack(codes[1:].clone(), bits))
    column = codes[:96, None].T  # one row, with the strides of a column
    assert torch.equal(pack(column, bits)[0], pack(codes[:96].clone(), bits))


@pytest.mark.parametrize("bits", WIDTHS)
def test_tiles_join_without_a_seam(bits: int) -> None:
    codes = torch.randint(0, 1 << bits, (3, 1 << 17), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    assert torch.equal(unpack(pack(codes, bits), bits), codes)
