"""The bytes of ggml's block types: on paper, there and back, and against two independent readers."""

from __future__ import annotations

import ctypes

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from exporters.gguf_blocks import BLOCK_TYPES, Q2_0, BlockType, pack, unpack
from exporters.gguf_carry import block_type, carries, restate
from lrqat.errors import LrqatError
from lrqat.fused import FusedTensor
from lrqat.grid import Grid

KINDS = list(BLOCK_TYPES.values())
ALL_KINDS = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
EDGES = torch.tensor([0x0000, 0x8000, 0x0001, 0x8001, 0x03FF, 0x7BFF, 0xFBFF, 0x3C00]).to(
    torch.int16
)  # 0, 2^-24 .. max


def tensor(grid: Grid, rows: int, columns: int, seed: int = 0) -> FusedTensor:
    """Random codes and parts: any finite fp16, subnormal and of both signs; any integer of the grid."""
    random = torch.Generator().manual_seed(seed)
    codes_OI = torch.randint(0, grid.codes, (rows, columns), generator=random, dtype=torch.uint8)
    parts = {}
    for name, part in grid.parts(rows, columns).items():
        if part.low is None or part.high is None:
            bits = torch.randint(-(2**15), 2**15, part.shape, generator=random, dtype=torch.int16)
            edges = EDGES[torch.randint(0, len(EDGES), part.shape, generator=random)]
            bits = torch.where(torch.rand(part.shape, generator=random) < 0.2, edges, bits)
            parts[name] = torch.where(bits.view(torch.float16).isfinite(), bits, edges).view(torch.float16)
        else:
            parts[name] = torch.randint(part.low, part.high + 1, part.shape, generator=random).to(part.dtype)
    return FusedTensor(codes_OI, parts, grid)


def same(a: FusedTensor, b: FusedTensor) -> bool:
    """Equal in every bit."""
    pairs = [(a.codes_OI, b.codes_OI), *((a.parts[name], b.parts[name]) for name in a.parts)]
    return (a.grid, a.parts.keys()) == (b.grid, b.parts.keys()) and all(
        x.dtype == y.dtype and torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in pairs
    )


def one_block(kind: BlockType, zero: int, codes: dict[int, int], **parts: object) -> str:
    """The bytes of a block of `zero` with some other codes, in hexadecimal."""
    codes_OI = torch.full((1, kind.columns), zero, dtype=torch.uint8)
    for column, code in codes.items():
        codes_OI[0, column] = code
    wire = kind.grid.parts(1, kind.columns)
    made = {name: torch.as_tensor(parts[name]).expand(part.shape).to(part.dtype) for name, part in wire.items()}
    return bytes(pack(FusedTensor(codes_OI, made, kind.grid), kind)[0].tolist()).hex()


SUBS = {"sub_scales": torch.arange(8) + 56, "sub_minimums": 8 - torch.arange(8)}  # 56 .. 63, 8 .. 1
# sc 56 = 111000b: low 4 bits 8, high 2 bits 3. Bytes 0..3: 56..59 | 3 << 6; 4..7: 8, 7, 6, 5 | 0; 8..11: sc | mn << 4.
SIX_BITS = "f8f9fafb" + "08070605" + "4c" + "3d" + "2e" + "1f"
GOLDEN = {
    "Q4_0": (8, {0: 0, 16: 15, 1: 1, 31: 12}, {"scales": 0.5}, "0038" + "f0" + "81" + "88" * 13 + "c8"),
    "Q4_1": (0, {0: 3, 16: 15}, {"scales": 0.5, "minimums": -2.0}, "0038" + "00c0" + "f3" + "00" * 15),
    # bit 4 is set in columns 0 (31) and 9 (16)
    "Q5_0": (0, {0: 31, 9: 16, 17: 5}, {"scales": -1.0}, "00bc" + "01020000" + "0f" + "50" + "00" * 14),
    "Q5_1": (0, {31: 17}, {"scales": 1.0, "minimums": 0.5}, "003c" + "0038" + "00000080" + "00" * 15 + "10"),
    "Q8_0": (128, {0: 120, 16: 135, 31: 0}, {"scales": -0.5}, "00b8" + "f8" + "00" * 15 + "07" + "00" * 14 + "80"),
    "IQ4_NL": (8, {0: 0, 17: 15}, {"scales": 1.0}, "003c" + "80" + "f8" + "88" * 14),
    "MXFP4": (0, {0: 7, 16: 15}, {"exponents": 128}, "80" + "f7" + "00" * 15),
    # s * (q - 2) = -s * (Q - 1): codes 0, 1, 2, 3 are Q 3, 2, 1, 0: 3 | 2 << 2 | 1 << 4 | 0 << 6
    "Q2_0": (2, {0: 0, 1: 1, 2: 2, 3: 3}, {"scales": 0.5}, "00b8" + "1b" + "55" * 15),
    # columns 0, 32, 64, 96 share a byte
    "TQ2_0": (1, {0: 0, 32: 1, 64: 2, 96: 0, 128: 2}, {"scales": 2.0}, "24" + "55" * 31 + "56" + "55" * 31 + "0040"),
    "Q2_K": (
        0,
        {0: 1, 32: 2, 64: 3, 255: 3},
        {"super_scales": 1.0, "super_minimums": 0.5, "sub_scales": torch.arange(16), "sub_minimums": 15},
        "".join(f"f{i:x}" for i in range(16)) + "39" + "00" * 62 + "c0" + "003c" + "0038",
    ),
    # codes are 4 (bit 2 set) but for 0, 3 and 7; sc + 32 is 0 .. 15 for -32 .. -17, and 63 for 31
    "Q3_K": (
        4,
        {0: 0, 32: 3, 64: 7, 255: 3},
        {"super_scales": 1.0, "sub_scales": torch.tensor([*range(-32, -17), 31])},
        "fc" + "ff" * 30 + "7f" + "3c" + "00" * 62 + "c0" + "8091a2b3c4d5e6f7" + "000000c0" + "003c",
    ),
    "Q4_K": (
        0,
        {0: 1, 32: 2, 64: 3, 255: 15},
        {"super_scales": 1.0, "super_minimums": 0.5, **SUBS},
        "003c" + "0038" + SIX_BITS + "21" + "00" * 31 + "03" + "00" * 94 + "f0",
    ),
    "Q5_K": (
        0,
        {0: 17, 32: 2, 255: 31},
        {"super_scales": 1.0, "super_minimums": 0.5, **SUBS},
        "003c" + "0038" + SIX_BITS + "01" + "00" * 30 + "80" + "21" + "00" * 126 + "f0",
    ),
    # 32 = 10 0000b: high bits 2 everywhere (aa), low bits 0; 63 = 11 1111b, 1 = 00 0001b
    "Q6_K": (
        32,
        {0: 63, 64: 1, 255: 1},
        {"super_scales": -1.0, "sub_scales": torch.arange(16) - 8},
        "1f" + "00" * 126 + "10" + "8b" + "aa" * 62 + "2a" + "f8f9fafbfcfdfeff0001020304050607" + "00bc",
    ),
}


@ALL_KINDS
def test_a_block_has_the_bytes_that_paper_says(kind: BlockType) -> None:
    zero, codes, parts, expected = GOLDEN[kind.name]
    assert one_block(kind, zero, codes, **parts) == expected


@ALL_KINDS
@given(rows=st.integers(1, 5), wide=st.integers(1, 4), seed=st.integers(0, 2**31))
@settings(max_examples=15, deadline=None)
def test_unpack_undoes_pack_in_every_bit(kind: BlockType, rows: int, wide: int, seed: int) -> None:
    weight, untouched = (tensor(kind.grid, rows, wide * kind.columns, seed) for _ in range(2))
    assert same(unpack(pack(weight, kind), kind), untouched)
    assert same(weight, untouched)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind is not Q2_0], ids=lambda kind: kind.name)
@given(seed=st.integers(0, 2**31))
@settings(max_examples=15, deadline=None)
@pytest.mark.filterwarnings("ignore:overflow encountered")  # MXFP4: 6 * 2^127
def test_ggufs_own_dequantizer_finds_our_weights(kind: BlockType, seed: int) -> None:
    weight = tensor(kind.grid, 6, 2 * kind.columns, seed)
    theirs = gguf.quants.dequantize(pack(weight, kind).numpy(), gguf.GGMLQuantizationType(kind.ggml_type))
    assert np.array_equal(theirs, weight.dequantize().numpy())


@ALL_KINDS
def test_llama_cpp_itself_finds_our_weights(kind: BlockType) -> None:
    pytest.importorskip("xllamacpp", reason="pip install 'lrqat[llamacpp]'")
    from serve.llama_abi import library

    weight = tensor(kind.grid, 64, 8 * kind.columns)
    packed = pack(weight, kind).numpy()
    theirs = np.empty(tuple(weight.codes_OI.shape), dtype=np.float32)
    name = kind.name.lower().replace("_k", "_K")
    decode = getattr(library(), f"dequantize_row_{name}")
    decode.restype, decode.argtypes = None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    decode(packed.ctypes.data, theirs.ctypes.data, theirs.size)
    assert np.array_equal(theirs, weight.dequantize().numpy())


@ALL_KINDS
def test_sizes_and_numbers_are_ggufs(kind: BlockType) -> None:
    if kind is Q2_0:  # newer than the gguf package: ggml.h and llama.h
        assert (kind.ggml_type, kind.columns, kind.nbytes, kind.file_type) == (42, 64, 18, 41)
        return
    theirs = gguf.GGMLQuantizationType[kind.name]
    assert (theirs.value, gguf.GGML_QUANT_SIZES[theirs]) == (kind.ggml_type, (kind.columns, kind.nbytes))
    endings = {"Q3_K": "_M", "Q4_K": "_M", "Q5_K": "_M", "MXFP4": "_MOE"}
    assert gguf.LlamaFileType[f"MOSTLY_{kind.name}{endings.get(kind.name, '')}"].value == kind.file_type


@ALL_KINDS
def test_a_matrix_packs_like_its_rows(kind: BlockType) -> None:
    weight = tensor(kind.grid, 20, 2 * kind.columns)
    rows = [pack(weight.rows(slice(i, i + 1)), kind) for i in range(20)]
    assert torch.equal(pack(weight, kind), torch.cat(rows))


@ALL_KINDS
def test_a_types_own_grid_is_written_as_that_type(kind: BlockType) -> None:
    assert block_type(kind.grid, (64, 512)) is kind


@pytest.mark.parametrize(
    ("grid", "columns", "name"),
    [
        ("w2", 512, "Q2_0"),
        ("w2g64", 192, "Q2_0"),
        ("w2g128-fp16", 512, "Q2_0"),
        ("w2", 96, "Q4_0"),
        ("w2g32", 512, "Q4_0"),
        ("w3", 512, "Q3_K"),
        ("w3g256", 512, "Q3_K"),
        ("w3g128", 512, "Q4_0"),
        ("w3", 576, "Q4_0"),
        ("w4", 512, "Q4_0"),
        ("w4g128", 512, "Q4_0"),
        ("w5g64", 512, "Q5_0"),
        ("w5", 512, "Q5_0"),
        ("w6", 512, "Q8_0"),
        ("w8g32", 512, "Q8_0"),
        ("w2-asym", 512, "Q2_K"),
        ("w3-asym", 512, "Q4_K"),
        ("w4-asym", 512, "Q4_K"),
        ("w4g256-asym", 512, "Q4_K"),
        ("w5-asym-fp16", 512, "Q5_K"),
        ("w3g32-min", 512, "Q4_1"),
        ("w4g64-min", 512, "Q4_1"),
        ("w4-min", 96, "Q4_1"),
        ("w5g128-min", 512, "Q5_1"),
    ],
)
def test_a_grid_takes_the_smallest_type_that_holds_every_point_of_it(grid: str, columns: int, name: str) -> None:
    weight = tensor(Grid.parse(grid), 16, columns)
    kind = block_type(weight.grid, (16, columns))
    assert kind.name == name and carries(weight.grid, (16, columns)) is None
    stored = unpack(pack(restate(weight, kind), kind), kind)
    stored.check("weight")
    assert torch.equal(stored.dequantize(), weight.dequantize())


@pytest.mark.parametrize(
    ("grid", "columns", "line"),
    [
        (
            "w4g32-asym",
            64,
            "no integer zeros of this width in groups of 32 exactly (grid w4g32-asym); train on w4g32-min",
        ),
        ("w4-asym", 576, "in groups of 576 exactly (grid w4-asym); train on w4g32-min"),
        ("w8g32-asym", 64, "in groups of 32 exactly (grid w8g32-asym); train on w8g32"),
        ("w6-asym", 512, "(grid w6-asym); train on w6g32"),
        ("w6g32-min", 64, "minimums with up to 5 bits (grid w6g32-min); train on w6g32-fp16"),
        ("w4g16", 64, "blocks of 32 columns, which groups of 16 do not fill; train on w4g32"),
        ("w4g48-min", 96, "which groups of 48 do not fill; train on w4g32-min"),
        ("w8", 80, "which groups of 80 do not fill; skip this layer (--skip)"),
        ("w4-asym", 80, "skip this layer (--skip)"),
    ],
)
def test_grids_that_no_type_holds_are_refused_with_a_remedy(grid: str, columns: int, line: str) -> None:
    refusal = carries(Grid.parse(grid), (64, columns))
    assert refusal is not None and str(refusal).endswith(line)
    with pytest.raises(LrqatError) as refused:
        block_type(Grid.parse(grid), (64, columns))
    assert str(refused.value) == str(refusal)
    if "train on " in line:
        assert carries(Grid.parse(line.rpartition("train on ")[2]), (64, columns)) is None


@pytest.mark.parametrize("grid", ["q4_k", "q6_k", "tq2_0", "mxfp4", "w4g32"])
def test_blocks_that_do_not_divide_the_columns_are_refused(grid: str) -> None:
    with pytest.raises(LrqatError, match=r"^layer: .* in_features 80"):
        carries(Grid.parse(grid), (64, 80), "layer")
