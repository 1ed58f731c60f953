"""The grid: its spelling, its refusals, the scales that the wire can store, exact dequantization."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lrqat.errors import LrqatError
from lrqat.grid import MAX_SCALE, MIN_SCALE, Grid, dequantize, expand_groups

GRIDS = st.builds(
    Grid,
    bits=st.integers(2, 8),
    group_size=st.just(-1) | st.integers(1, 4096),
    symmetric=st.booleans(),
    scale_precision=st.sampled_from(sorted(MAX_SCALE)),
)
PRECISIONS = pytest.mark.parametrize("precision", sorted(MAX_SCALE))
FLOATS = st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=64)


def storable(precision: str) -> torch.Tensor:
    """Every positive scale that the wire has, ascending, float64: enumerated from the 16-bit patterns."""
    dtype = torch.bfloat16 if precision == "portable" else torch.float16
    values = torch.arange(0x8000, dtype=torch.int32).to(torch.int16).view(dtype).double()
    return values[(values >= MIN_SCALE) & (values <= MAX_SCALE[precision])]


@given(GRIDS)
def test_a_grid_is_read_back_as_it_was_printed(grid: Grid) -> None:
    assert Grid.parse(str(grid)) == grid


@pytest.mark.parametrize(
    ("text", "grid"),
    [
        ("w4g32", Grid(4, 32)),
        ("w3g64-asym", Grid(3, 64, symmetric=False)),
        ("w2", Grid(2, -1)),
        ("w4g32-fp16", Grid(4, 32, scale_precision="fp16")),
        ("w8-asym-fp16", Grid(8, -1, symmetric=False, scale_precision="fp16")),
    ],
)
def test_the_spellings_of_the_design_are_understood(text: str, grid: Grid) -> None:
    assert Grid.parse(text) == grid and str(grid) == text


@pytest.mark.parametrize(
    "text", ["", "w1", "w9", "w16", "4", "W4", "w4g", "w4g0", "w4g-1", "w4g32-sym", "w4-fp16-asym", "w4g32 ", "q4_0"]
)
def test_another_spelling_is_refused_in_one_line_that_shows_a_right_one(text: str) -> None:
    with pytest.raises(LrqatError, match=r"^grid [^\n]*for example w4g32[^\n]*$"):
        Grid.parse(text)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [((1,), "bits"), ((9,), "bits"), ((4, 0), "group_size"), ((4, -2), "group_size"), ((4, 32, True, "bf16"), "bf16")],
)
def test_a_grid_that_no_format_has_cannot_be_made(arguments: tuple[object, ...], named: str) -> None:
    with pytest.raises(LrqatError, match=rf"^grid: [^\n]*{named}[^\n]*$"):
        Grid(*arguments)  # type: ignore[arg-type]


@given(GRIDS, st.integers(1, 1 << 14))
def test_a_group_divides_the_columns_or_is_refused_with_a_grid_that_does(grid: Grid, columns: int) -> None:
    if grid.group_size == -1:
        assert grid.columns_per_group(columns) == columns
    elif columns % grid.group_size == 0:
        assert grid.columns_per_group(columns) == grid.group_size
    else:
        with pytest.raises(LrqatError, match=r"^layer: group_size \d+ does not divide in_features \d+; [^\n]*$") as e:
            grid.columns_per_group(columns, "layer")
        words = str(e.value).split("--grid ")[1].split()
        offered = [Grid.parse(word) for word in words if word.startswith("w") and word[1].isdigit()]
        assert offered and all(g.columns_per_group(columns) for g in offered)


@PRECISIONS
@given(numbers=FLOATS)
def test_a_wire_scale_is_the_nearest_that_the_format_stores(precision: str, numbers: list[float]) -> None:
    scales = torch.tensor(numbers)
    wire = Grid(4, 32, scale_precision=precision).to_wire(scales)
    stored = storable(precision)
    wanted = scales.double().abs().clamp(MIN_SCALE, MAX_SCALE[precision])
    least = (stored[None] - wanted[:, None]).abs().amin(1)
    assert torch.equal((wire.double().abs() - wanted).abs(), least)
    assert torch.isin(wire.double().abs(), stored).all()
    assert torch.equal(wire < 0, scales < 0)


@PRECISIONS
@given(numbers=FLOATS)
def test_a_wire_scale_stays_as_it_is(precision: str, numbers: list[float]) -> None:
    grid = Grid(4, 32, scale_precision=precision)
    once = grid.to_wire(torch.tensor(numbers))
    assert once.dtype == torch.float32
    assert torch.equal(grid.to_wire(once), once)


@PRECISIONS
def test_every_wire_scale_is_exact_in_the_dtypes_it_promises(precision: str) -> None:
    scales = storable(precision).float()
    assert torch.equal(Grid(4, scale_precision=precision).to_wire(scales), scales)
    assert torch.equal(scales.half().float(), scales)
    assert torch.equal(scales.bfloat16().float(), scales) == (precision == "portable")


@PRECISIONS
def test_scales_beyond_the_range_are_clamped_and_zero_is_no_scale(precision: str) -> None:
    most = MAX_SCALE[precision]
    wire = Grid(4, scale_precision=precision).to_wire(torch.tensor([0.0, -0.0, 1e-9, -1e-9, 1e9, -torch.inf]))
    assert wire.tolist() == [MIN_SCALE, MIN_SCALE, MIN_SCALE, -MIN_SCALE, most, -most]


@given(
    codes=hnp.arrays("uint8", (3, 8)),
    scales=hnp.arrays("float16", (3, 2), elements=st.floats(-65504, 65504, width=16)),
    zeros=hnp.arrays("uint8", (3, 2)),
)
def test_dequantization_is_exact(codes: object, scales: object, zeros: object) -> None:
    codes_OI, scales_OG, zeros_OG = (torch.from_numpy(a) for a in (codes, scales, zeros))  # type: ignore[arg-type]
    exact = (codes_OI.double() - expand_groups(zeros_OG, 8).double()) * expand_groups(scales_OG, 8).double()
    assert torch.equal(dequantize(codes_OI, scales_OG, zeros_OG).double(), exact)
    assert torch.equal(
        dequantize(codes_OI, scales_OG, 8).double(), (codes_OI.double() - 8) * expand_groups(scales_OG, 8).double()
    )


def test_dequantization_on_paper() -> None:
    codes_OI = torch.tensor([[0, 15, 8, 9]], dtype=torch.uint8)
    assert dequantize(codes_OI, torch.tensor([[0.5, -2.0]]), 8).tolist() == [[-4.0, 3.5, 0.0, -2.0]]
    zeros_OG = torch.tensor([[1, 10]], dtype=torch.uint8)
    assert dequantize(codes_OI, torch.tensor([[0.5, -2.0]]), zeros_OG).tolist() == [[-0.5, 7.0, 4.0, 2.0]]
