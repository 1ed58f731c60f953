"""The bytes of Q4_0 and Q8_0."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from exporters.gguf_blocks import COLUMNS, Q4_0, Q8_0, block_type, pack, unpack
from lrqat.grid import dequantize


def _weight(bits: int, rows: int, columns: int, groups: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    codes_OI = torch.randint(0, 1 << bits, (rows, columns), generator=random, dtype=torch.uint8)
    return codes_OI, torch.randn(rows, groups, generator=random).to(torch.float16)


def test_a_q4_0_block_has_the_bytes_of_the_docstring() -> None:
    codes_OI = torch.full((1, COLUMNS), 8, dtype=torch.uint8)
    codes_OI[0, 0], codes_OI[0, 16], codes_OI[0, 1], codes_OI[0, 31] = 0, 15, 1, 12
    packed = pack(codes_OI, torch.tensor([[0.5]], dtype=torch.float16), bits=4)
    assert bytes(packed[0].tolist()) == bytes.fromhex("0038" + "f0" + "81" + "88" * 13 + "c8")


def test_a_q8_0_block_has_the_bytes_of_the_docstring() -> None:
    codes_OI = torch.full((1, COLUMNS), 128, dtype=torch.uint8)
    codes_OI[0, 0], codes_OI[0, 16], codes_OI[0, 31] = 120, 135, 0
    packed = pack(codes_OI, torch.tensor([[-0.5]], dtype=torch.float16), bits=8)
    assert bytes(packed[0].tolist()) == bytes.fromhex("00b8" + "f8" + "00" * 15 + "07" + "00" * 14 + "80")


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_narrow_codes_shift_to_the_zero_of_q4_0(bits: int) -> None:
    codes_OI = torch.zeros(1, COLUMNS, dtype=torch.uint8)
    codes_OI[0, 16:] = (1 << bits) - 1
    low, high = 8 - (1 << (bits - 1)), 7 + (1 << (bits - 1))
    packed = pack(codes_OI, torch.ones(1, 1, dtype=torch.float16), bits)
    assert set(packed[0, 2:].tolist()) == {low | high << 4}


@given(st.integers(2, 8), st.integers(1, 5), st.integers(1, 4), st.sampled_from([1, 2, 4]), st.integers(0, 2**31))
def test_unpack_undoes_pack_and_ggufs_own_dequantizer_agrees(
    bits: int, rows: int, wide: int, repeat: int, seed: int
) -> None:
    groups, columns = wide, wide * repeat * COLUMNS
    codes_OI, scales_OG = _weight(bits, rows, columns, groups, seed)
    kind = block_type(bits)
    packed = pack(codes_OI, scales_OG, bits)
    q_OI, d_OB = unpack(packed, kind)
    assert torch.equal(q_OI.to(torch.int32), codes_OI.to(torch.int32) - (1 << (bits - 1)))
    assert torch.equal(d_OB, scales_OG.repeat_interleave(repeat, dim=1))
    theirs = gguf.quants.dequantize(packed.numpy(), gguf.GGMLQuantizationType(kind.ggml_type))
    assert np.array_equal(theirs, dequantize(codes_OI, scales_OG, 1 << (bits - 1)).numpy())


@pytest.mark.parametrize("kind", [Q4_0, Q8_0])
def test_sizes_and_numbers_are_ggufs(kind: object) -> None:
    assert isinstance(kind, type(Q4_0))
    theirs = gguf.GGMLQuantizationType[kind.name]
    assert (theirs.value, gguf.GGML_QUANT_SIZES[theirs]) == (kind.ggml_type, (COLUMNS, kind.nbytes))
    assert gguf.LlamaFileType[f"MOSTLY_{kind.name}"].value == kind.file_type


@pytest.mark.parametrize("bits", [3, 8])
def test_a_matrix_of_several_tiles_packs_like_its_rows(bits: int) -> None:
    codes_OI, scales_OG = _weight(bits, rows=200, columns=8192, groups=1)
    rows = [pack(codes_OI[i : i + 1], scales_OG[i : i + 1], bits) for i in range(200)]
    assert torch.equal(pack(codes_OI, scales_OG, bits), torch.cat(rows))
