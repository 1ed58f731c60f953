"""Ranges: min-max clips nothing, the L^p search never loses to it, damaged weights are refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lrqat.errors import LrqatError
from lrqat.grid import MIN_SCALE, Grid, expand_groups
from lrqat.ranges import initial_scales, lp_scales, minmax_scales, row_tiles

# A wire scale lies within half a unit of 8 significant bits of the scale that was asked for.
WIRE_ROUNDING = 2.0**-9
# The search sums float32 powers of at most 64 float32 errors: 64 * 2^-24 relative, with room for pow.
FLOAT32_SUM = 1e-5

BITS = st.integers(2, 8)
SEEDS = st.integers(0, 2**32)


def groups(seed: int, size: int = 64) -> torch.Tensor:
    """16 groups [N, K]: skewed, one-sided, heavy-tailed, of magnitudes from 1e-4 to 1e2."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(16, size, generator=generator) + torch.randn(16, 1, generator=generator)
    values[:4] = values[:4].abs()
    values[4:8] = -values[4:8].abs()
    values[8:12] = values[8:12] ** 3
    return values * 10 ** (torch.rand(16, 1, generator=generator) * 6 - 4)


@given(BITS, SEEDS)
def test_minmax_clips_no_weight_and_leaves_no_code_unused(bits: int, seed: int) -> None:
    grid, values = Grid(bits), groups(seed)
    scales = minmax_scales(values, grid)
    codes = (values / scales[:, None]).round()
    assert codes.min() >= -grid.midpoint and codes.max() <= grid.midpoint - 1
    x = (values / scales[:, None]).double()
    reach = torch.maximum(-x.amin(1) / grid.midpoint, x.amax(1) / (grid.midpoint - 1))
    assert torch.all((reach - 1).abs()[scales.abs() > MIN_SCALE] <= 2 * WIRE_ROUNDING)


@given(BITS, SEEDS)
def test_minmax_takes_the_sign_that_allows_the_smaller_scale(bits: int, seed: int) -> None:
    grid, values = Grid(bits), groups(seed)
    low, high = -values.amin(1).clamp(max=0).double(), values.amax(1).clamp(min=0).double()
    upright = torch.maximum(low / grid.midpoint, high / (grid.midpoint - 1))
    turned = torch.maximum(high / grid.midpoint, low / (grid.midpoint - 1))
    scales = minmax_scales(values, grid)
    assert torch.equal(scales.abs(), grid.to_wire(torch.minimum(upright, turned).float()))
    clear = (upright - turned).abs() > 1e-6 * upright
    assert torch.equal((scales < 0)[clear], (turned < upright)[clear])


def test_minmax_on_paper() -> None:
    values = torch.tensor([[-8.0, 7.0], [8.0, -7.0], [7.0, 0.0], [0.0, 0.0]])
    assert minmax_scales(values, Grid(4)).tolist() == [1.0, -1.0, -0.875, MIN_SCALE]


@given(BITS, SEEDS, st.floats(1.0, 5.0))
@settings(max_examples=40)
def test_the_search_never_loses_to_minmax_in_its_own_norm(bits: int, seed: int, p: float) -> None:
    grid, values = Grid(bits), groups(seed)

    def error(scales: torch.Tensor) -> torch.Tensor:
        codes = (values / scales[:, None]).round().clamp(-grid.midpoint, grid.midpoint - 1)
        return (codes.double() * scales[:, None] - values).abs().pow(p).sum(1)

    found = lp_scales(values, grid, p)
    assert torch.all(error(found) <= error(minmax_scales(values, grid)) * (1 + FLOAT32_SUM))
    assert torch.equal(grid.to_wire(found), found)


def test_the_search_gains_where_an_outlier_rules_a_group() -> None:
    values = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    grid = Grid(3)
    assert torch.all(lp_scales(values, grid, 2.0).abs() < minmax_scales(values, grid).abs())


@pytest.mark.parametrize("p", [None, 2.0, 3.5])
@pytest.mark.parametrize("spelling", ["w4g32", "w3", "w8g16"])
def test_scales_of_a_tiled_matrix_are_those_of_its_groups(
    p: float | None, spelling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lrqat.ranges.TILE_WEIGHTS", 200)
    grid, weight_OI = Grid.parse(spelling), groups(1, 96)
    assert len(row_tiles(16, 96)) > 1
    scales_OG = initial_scales(weight_OI, grid, p)
    size = grid.columns_per_group(96)
    parts = weight_OI.view(-1, size)
    expected = minmax_scales(parts, grid) if p is None else lp_scales(parts, grid, p)
    assert torch.equal(scales_OG, expected.view(16, -1))
    assert expand_groups(scales_OG, 96).shape == weight_OI.shape


@given(st.integers(1, 5000), st.integers(1, 1 << 20))
def test_row_tiles_cover_every_row_once(rows: int, columns: int) -> None:
    assert [i for tile in row_tiles(rows, columns) for i in range(rows)[tile]] == list(range(rows))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("p", [None, 3.5])
def test_damaged_weights_are_refused_by_name(bad: float, p: float | None) -> None:
    weight_OI = torch.ones(4, 64)
    weight_OI[3, 17] = bad
    with pytest.raises(LrqatError, match=r"^layers\.0\.up: [^\n]*NaN[^\n]*$"):
        initial_scales(weight_OI, Grid(4, 32), p, "layers.0.up")


def test_what_does_not_divide_or_is_asymmetric_is_refused_with_a_remedy() -> None:
    with pytest.raises(LrqatError, match=r"up: group_size 48 does not divide in_features 64; use --grid w4g64"):
        initial_scales(torch.ones(4, 64), Grid(4, 48), None, "up")
    with pytest.raises(LrqatError, match=r"up: grid w4g32-asym is asymmetric[^\n]*--grid w4"):
        initial_scales(torch.ones(4, 64), Grid(4, 32, symmetric=False), None, "up")
