"""Ranges: min-max clips nothing, the L^p search never loses to it, damaged weights are refused."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lrqat.errors import LrqatError
from lrqat.grid import Grid
from lrqat.grids.affine import AffineGrid
from lrqat.grids.wire import MIN_SCALE
from lrqat.ptq import rtn
from lrqat.ranges import row_tiles, start, tile_weights, weight_tiles

# A wire scale lies within half a unit of 8 significant bits of the scale that was asked for.
WIRE_ROUNDING = 2.0**-9
# The search sums float32 powers of at most 64 float32 errors: 64 * 2^-24 relative, with room for pow.
FLOAT32_SUM = 1e-5

BITS = st.integers(2, 8)
SEEDS = st.integers(0, 2**32)


def minmax_scales(values: torch.Tensor, grid: AffineGrid) -> torch.Tensor:
    """The scale [N] of whole rows without a search."""
    return grid.fit(values, None)["scales"].squeeze(1)


def lp_scales(values: torch.Tensor, grid: AffineGrid, p: float) -> torch.Tensor:
    """The scale [N] of whole rows by the search."""
    return grid.fit(values, p)["scales"].squeeze(1)


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
    grid, values = AffineGrid(bits), groups(seed)
    scales = minmax_scales(values, grid)
    codes = (values / scales[:, None]).round()
    assert codes.min() >= -grid.midpoint and codes.max() <= grid.midpoint - 1
    x = (values / scales[:, None]).double()
    reach = torch.maximum(-x.amin(1) / grid.midpoint, x.amax(1) / (grid.midpoint - 1))
    assert torch.all((reach - 1).abs()[scales.abs() > MIN_SCALE["portable"]] <= 2 * WIRE_ROUNDING)


@given(BITS, SEEDS)
def test_minmax_takes_the_sign_that_allows_the_smaller_scale(bits: int, seed: int) -> None:
    grid, values = AffineGrid(bits), groups(seed)
    low, high = -values.amin(1).clamp(max=0).double(), values.amax(1).clamp(min=0).double()
    upright = torch.maximum(low / grid.midpoint, high / (grid.midpoint - 1))
    turned = torch.maximum(high / grid.midpoint, low / (grid.midpoint - 1))
    scales = minmax_scales(values, grid)
    assert torch.equal(scales.abs(), grid.wire(torch.minimum(upright, turned).float()))
    clear = (upright - turned).abs() > 1e-6 * upright
    assert torch.equal((scales < 0)[clear], (turned < upright)[clear])


def test_minmax_on_paper() -> None:
    values = torch.tensor([[-8.0, 7.0], [8.0, -7.0], [7.0, 0.0], [0.0, 0.0]])
    assert minmax_scales(values, AffineGrid(4)).tolist() == [1.0, -1.0, -0.875, MIN_SCALE["portable"]]


@given(BITS, SEEDS, st.floats(1.0, 5.0))
@settings(max_examples=40)
def test_the_search_never_loses_to_minmax_in_its_own_norm(bits: int, seed: int, p: float) -> None:
    grid, values = AffineGrid(bits), groups(seed)

    def error(scales: torch.Tensor) -> torch.Tensor:
        codes = (values / scales[:, None]).round().clamp(-grid.midpoint, grid.midpoint - 1)
        return (codes.double() * scales[:, None] - values).abs().pow(p).sum(1)

    found = lp_scales(values, grid, p)
    assert torch.all(error(found) <= error(minmax_scales(values, grid)) * (1 + FLOAT32_SUM))
    assert torch.equal(grid.wire(found), found)


def test_the_search_gains_where_an_outlier_rules_a_group() -> None:
    values = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    grid = AffineGrid(3)
    assert torch.all(lp_scales(values, grid, 2.0).abs() < minmax_scales(values, grid).abs())


@pytest.mark.parametrize("p", [None, 2.0, 3.5])
@pytest.mark.parametrize("spelling", ["w4g32", "w3", "w8g16"])
def test_scales_of_a_tiled_matrix_are_those_of_its_groups(
    p: float | None, spelling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lrqat.ranges.TILE_WEIGHTS", 200)
    grid, weight_OI = Grid.parse(spelling), groups(1, 96)
    assert len(weight_tiles(weight_OI)) > 1
    scales_OG = start(weight_OI, grid, p)["scales"]
    whole = AffineGrid(grid.bits).fit(weight_OI.view(-1, grid.columns_per_group(96)), p)["scales"]
    assert torch.equal(scales_OG, whole.view(16, -1))


@given(st.integers(1, 5000), st.integers(1, 1 << 20))
def test_row_tiles_cover_every_row_once(rows: int, columns: int) -> None:
    assert [i for tile in row_tiles(rows, columns) for i in range(rows)[tile]] == list(range(rows))


def test_a_gpu_works_on_sixteen_times_as_much_at_once() -> None:
    here, there = torch.empty(4096, 1024, dtype=torch.bfloat16), torch.empty(4096, 1024, device="meta")
    assert (len(weight_tiles(here)), len(weight_tiles(there))) == (16, 1)
    assert tile_weights(there.device, compiled=True) == tile_weights(there.device)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("p", [None, 3.5])
def test_damaged_weights_are_refused_by_name(bad: float, p: float | None) -> None:
    weight_OI = torch.ones(4, 64)
    weight_OI[3, 17] = bad
    with pytest.raises(LrqatError, match=r"^layers\.0\.up: [^\n]*NaN[^\n]*$"):
        start(weight_OI, AffineGrid(4, 32), p, "layers.0.up")


def test_what_does_not_divide_is_refused_with_a_remedy() -> None:
    with pytest.raises(LrqatError, match=r"up: group_size 48 does not divide in_features 64; use --grid w4g64"):
        start(torch.ones(4, 64), AffineGrid(4, 48), None, "up")
    with pytest.raises(LrqatError, match=r"up: super-blocks of 256 [^\n]*64; [^\n]*--override"):
        start(torch.ones(4, 64), Grid.parse("q4_k"), None, "up")


@pytest.mark.parametrize(
    ("finer", "coarser"),
    [
        ("w4g32-asym", "w3g32-asym"),
        ("w4g32-min", "w4g32"),
        ("w4g32-min", "w4-asym"),
        ("q4_k", "q2_k"),
        ("q6_k", "q3_k"),
        ("q5_k", "q4_k"),
        ("w4g32", "mxfp4"),
        ("iq4_nl", "w4g32"),
        ("w2g64", "tq2_0"),
    ],
)
def test_finer_grids_come_nearer_to_gaussian_weights(finer: str, coarser: str) -> None:
    weight_OI = torch.randn(64, 512, generator=torch.Generator().manual_seed(0)) * 0.05

    def error(spelling: str) -> float:
        return float((rtn(weight_OI, Grid.parse(spelling), 2.0).dequantize() - weight_OI).square().mean())

    assert error(finer) < error(coarser)


@pytest.mark.parametrize(
    "spelling", ["w4g32-asym", "w4g32-min", "q4_k", "q2_k", "q3_k", "q6_k", "iq4_nl", "mxfp4", "tq2_0"]
)
@pytest.mark.parametrize("p", [2.0, 3.5])
def test_the_search_gains_over_the_whole_range_on_every_grid(spelling: str, p: float) -> None:
    weight_OI = torch.randn(64, 512, generator=torch.Generator().manual_seed(0)) * 0.05
    grid = Grid.parse(spelling)

    def error(found: float | None) -> float:
        return float((rtn(weight_OI, grid, found).dequantize() - weight_OI).abs().pow(p).mean())

    assert error(p) <= error(None)


@pytest.mark.parametrize(
    "spelling", ["w4g32-asym", "w4g32-min", "q4_k", "q2_k", "q3_k", "q6_k", "iq4_nl", "mxfp4", "tq2_0"]
)
@given(seed=SEEDS, kind=st.sampled_from(["zero", "constant", "tiny", "huge", "negative"]))
@settings(max_examples=10)
def test_degenerate_weights_stay_finite_and_on_the_grid(spelling: str, seed: int, kind: str) -> None:
    weight_OI = torch.randn(4, 512, generator=torch.Generator().manual_seed(seed))
    weight_OI = {
        "zero": weight_OI * 0,
        "constant": torch.full_like(weight_OI, 0.3),
        "tiny": weight_OI * 1e-7,
        "huge": weight_OI * 1e3,
        "negative": -weight_OI.abs() - 1,
    }[kind]
    fused = rtn(weight_OI, Grid.parse(spelling), 3.5)
    fused.check("weight")
    error = (fused.dequantize() - weight_OI).abs().amax()
    assert torch.isfinite(error)
    assert error <= weight_OI.abs().amax() + 2.0**-17  # the smallest step there is


@pytest.mark.parametrize(
    "spelling", ["w4g32", "w3", "w4g32-asym", "w4g32-min", "q4_k", "q2_k", "q3_k", "q6_k", "iq4_nl", "mxfp4", "tq2_0"]
)
@given(seed=SEEDS, share=st.floats(0.4, 1.2))
@settings(max_examples=10)
def test_a_share_of_the_range_is_that_share_of_every_step(spelling: str, seed: int, share: float) -> None:
    weight_OI, grid = torch.randn(4, 512, generator=torch.Generator().manual_seed(seed)), Grid.parse(spelling)
    parts = grid.fit(weight_OI, None)
    before, after = grid.affine(parts), grid.affine(grid.scaled(parts, share))
    ratio_OG = after.scale_OG / before.scale_OG
    if spelling == "mxfp4":  # powers of two
        assert ((ratio_OG.log2() - math.log2(share)).abs() <= 0.5 + 1e-5).all()
    else:
        assert torch.allclose(ratio_OG, torch.tensor(share), rtol=2 * WIRE_ROUNDING)
    if before.offset_OG is not None and after.offset_OG is not None:
        assert torch.allclose(after.offset_OG, before.offset_OG * share, rtol=2 * WIRE_ROUNDING, atol=1e-6)
