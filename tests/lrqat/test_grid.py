"""The grid: its spelling, its refusals, the scales that the wire can store, exact dequantization."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lrqat.errors import LrqatError
from lrqat.fused import FusedTensor
from lrqat.grid import Grid
from lrqat.grids.affine import AffineGrid
from lrqat.grids.wire import MAX_SCALE, MIN_SCALE

GRIDS = st.builds(
    AffineGrid,
    bits=st.integers(2, 8),
    group_size=st.just(-1) | st.integers(1, 4096),
    zero=st.sampled_from(["midpoint", "integer"]),
    scale_precision=st.sampled_from(sorted(MAX_SCALE)),
) | st.builds(
    AffineGrid,
    bits=st.integers(2, 8),
    group_size=st.just(-1) | st.integers(1, 4096),
    zero=st.just("minimum"),
    scale_precision=st.just("fp16"),
)
PRECISIONS = pytest.mark.parametrize("precision", sorted(MAX_SCALE))
FLOATS = st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=64)


def storable(precision: str) -> torch.Tensor:
    """Every positive scale that the wire has, ascending, float64: enumerated from the 16-bit patterns."""
    dtype = torch.bfloat16 if precision == "portable" else torch.float16
    values = torch.arange(0x8000, dtype=torch.int32).to(torch.int16).view(dtype).double()
    return values[(values >= MIN_SCALE[precision]) & (values <= MAX_SCALE[precision])]


@given(GRIDS)
def test_a_grid_is_read_back_as_it_was_printed(grid: AffineGrid) -> None:
    assert Grid.parse(str(grid)) == grid


@pytest.mark.parametrize(
    ("text", "grid"),
    [
        ("w4g32", AffineGrid(4, 32)),
        ("w3g64-asym", AffineGrid(3, 64, "integer")),
        ("w2", AffineGrid(2, -1)),
        ("w4g32-fp16", AffineGrid(4, 32, scale_precision="fp16")),
        ("w4g32-min", AffineGrid(4, 32, "minimum", "fp16")),
        ("w8-asym-fp16", AffineGrid(8, -1, "integer", "fp16")),
    ],
)
def test_the_spellings_of_the_design_are_understood(text: str, grid: AffineGrid) -> None:
    assert Grid.parse(text) == grid and str(grid) == text


@pytest.mark.parametrize(
    "text", ["", "w1", "w9", "w16", "4", "W4", "w4g", "w4g0", "w4g-1", "w4g32-sym", "w4-fp16-asym", "w4g32 ", "q9_k"]
)
def test_another_spelling_is_refused_in_one_line_that_shows_a_right_one(text: str) -> None:
    with pytest.raises(LrqatError, match=r"^grid [^\n]*for example w4g32[^\n]*$"):
        Grid.parse(text)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((1,), "bits"),
        ((9,), "bits"),
        ((4, 0), "group_size"),
        ((4, -2), "group_size"),
        ((4, 32, "midpoint", "bf16"), "bf16"),
        ((4, 32, "minimum"), "fp16"),
    ],
)
def test_a_grid_that_no_format_has_cannot_be_made(arguments: tuple[object, ...], named: str) -> None:
    with pytest.raises(LrqatError, match=rf"^grid: [^\n]*{named}[^\n]*$"):
        AffineGrid(*arguments)  # type: ignore[arg-type]


@given(GRIDS, st.integers(1, 1 << 14))
def test_a_group_divides_the_columns_or_is_refused_with_a_grid_that_does(grid: AffineGrid, columns: int) -> None:
    if grid.group_size == -1:
        assert grid.columns_per_group(columns) == columns
    elif columns % grid.group_size == 0:
        assert grid.columns_per_group(columns) == grid.group_size
    else:
        with pytest.raises(LrqatError, match=r"^layer: group_size \d+ does not divide in_features \d+; [^\n]*$") as e:
            grid.columns_per_group(columns, "layer")
        words = str(e.value).split("--grid ")[1].split()
        offered = [AffineGrid.parse(word) for word in words if word.startswith("w") and word[1].isdigit()]
        assert offered and all(g.columns_per_group(columns) for g in offered)


@PRECISIONS
@given(numbers=FLOATS)
def test_a_wire_scale_is_the_nearest_that_the_format_stores(precision: str, numbers: list[float]) -> None:
    scales = torch.tensor(numbers)
    wire = AffineGrid(4, 32, scale_precision=precision).wire(scales)
    stored = storable(precision)
    wanted = scales.double().abs().clamp(MIN_SCALE[precision], MAX_SCALE[precision])
    least = (stored[None] - wanted[:, None]).abs().amin(1)
    assert torch.equal((wire.double().abs() - wanted).abs(), least)
    assert torch.isin(wire.double().abs(), stored).all()
    assert torch.equal(wire < 0, scales < 0)


@PRECISIONS
@given(numbers=FLOATS)
def test_a_wire_scale_stays_as_it_is(precision: str, numbers: list[float]) -> None:
    grid = AffineGrid(4, 32, scale_precision=precision)
    once = grid.wire(torch.tensor(numbers))
    assert once.dtype == torch.float32
    assert torch.equal(grid.wire(once), once)


@PRECISIONS
def test_every_wire_scale_is_exact_in_the_dtypes_it_promises(precision: str) -> None:
    scales = storable(precision).float()
    assert torch.equal(AffineGrid(4, scale_precision=precision).wire(scales), scales)
    assert torch.equal(scales.half().float(), scales)
    assert torch.equal(scales.bfloat16().float(), scales) == (precision == "portable")


@PRECISIONS
def test_scales_beyond_the_range_are_clamped_and_zero_is_no_scale(precision: str) -> None:
    least, most = MIN_SCALE[precision], MAX_SCALE[precision]
    wire = AffineGrid(4, scale_precision=precision).wire(torch.tensor([0.0, -0.0, 1e-9, -1e-9, 1e9, -torch.inf]))
    assert wire.tolist() == [least, least, least, -least, most, -most]


@pytest.mark.parametrize("name", ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_0"])
def test_ggml_names_of_affine_types_are_understood(name: str) -> None:
    grid = Grid.parse(name)
    assert isinstance(grid, AffineGrid) and grid.scale_precision == "fp16" and Grid.parse(str(grid)) == grid


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        *[("q2_k", 2.625), ("q3_k", 3.4375), ("q4_k", 4.5), ("q5_k", 5.5), ("q6_k", 6.5625), ("iq4_nl", 4.5)],
        *[("mxfp4", 4.25), ("tq2_0", 2.0625), ("q4_0", 4.5), ("q4_1", 5.0), ("q5_1", 6.0), ("q8_0", 8.5)],
        *[("q2_0", 2.25), ("w4", 4 + 16 / 256), ("w4g32-asym", 4 + 20 / 32), ("w2g64-asym", 2 + 18 / 64)],
    ],
)
def test_bits_a_weight_are_those_of_the_format(name: str, bits: float) -> None:
    assert Grid.parse(name).bits_per_weight(8, 256) == bits
    assert str(Grid.parse(str(Grid.parse(name)))) == str(Grid.parse(name))


@given(
    codes=hnp.arrays("uint8", (3, 8)),
    scales=hnp.arrays("float16", (3, 2), elements=st.floats(-65504, 65504, width=16)),
    zeros=hnp.arrays("uint8", (3, 2)),
)
def test_dequantization_is_exact(codes: object, scales: object, zeros: object) -> None:
    codes_OI, scales_OG, zeros_OG = (torch.from_numpy(a) for a in (codes, scales, zeros))  # type: ignore[arg-type]
    spread = lambda t: t.repeat_interleave(4, 1).double()  # noqa: E731
    asymmetric = FusedTensor(codes_OI, {"scales": scales_OG, "zeros": zeros_OG}, Grid.parse("w8g4-asym"))
    exact = (codes_OI.double() - spread(zeros_OG)) * spread(scales_OG)
    assert torch.equal(asymmetric.dequantize().double(), exact)
    symmetric = FusedTensor(codes_OI, {"scales": scales_OG}, Grid.parse("w8g4"))
    assert torch.equal(symmetric.dequantize().double(), (codes_OI.double() - 128) * spread(scales_OG))


def test_dequantization_on_paper() -> None:
    codes_OI = torch.tensor([[0, 15, 8, 9]], dtype=torch.uint8)
    scales = {"scales": torch.tensor([[0.5, -2.0]], dtype=torch.float16)}
    assert FusedTensor(codes_OI, scales, Grid.parse("w4g2")).dequantize().tolist() == [[-4.0, 3.5, 0.0, -2.0]]
    zeros = {**scales, "zeros": torch.tensor([[1, 10]], dtype=torch.uint8)}
    assert FusedTensor(codes_OI, zeros, Grid.parse("w4g2-asym")).dequantize().tolist() == [[-0.5, 7.0, 4.0, 2.0]]
    minimums = {**scales, "minimums": torch.tensor([[1, 10]], dtype=torch.float16)}
    assert FusedTensor(codes_OI, minimums, Grid.parse("w4g2-min")).dequantize().tolist() == [[1.0, 8.5, -6.0, -8.0]]


def test_dequantization_of_blocks_on_paper() -> None:
    codes_OI = torch.zeros(1, 256, dtype=torch.uint8)
    codes_OI[0, :3] = torch.tensor([3, 0, 1])
    codes_OI[0, 16] = 2
    half = lambda *v: torch.tensor([v], dtype=torch.float16)  # noqa: E731
    parts = {
        "super_scales": half(0.5),
        "sub_scales": torch.tensor([[2, 15] + [1] * 14], dtype=torch.uint8),
        "super_minimums": half(0.25),
        "sub_minimums": torch.tensor([[4, 0] + [0] * 14], dtype=torch.uint8),
    }
    weight = FusedTensor(codes_OI, parts, Grid.parse("q2_k")).dequantize()
    assert weight[0, :3].tolist() == [0.5 * 2 * 3 - 1, -1.0, 0.5 * 2 * 1 - 1] and weight[0, 16] == 0.5 * 15 * 2
    codes_OI = torch.arange(16, dtype=torch.uint8).repeat(2)[None]
    fp4 = FusedTensor(codes_OI, {"exponents": torch.tensor([[128]], dtype=torch.uint8)}, Grid.parse("mxfp4"))
    assert fp4.dequantize()[0, :16].tolist() == [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12]
