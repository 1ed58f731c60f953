"""Coordinate descent behind GPTQ: each move is the best one there is, and none makes outputs worse."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lrqat.fused import FusedTensor
from lrqat.grid import Grid, dequantize
from lrqat.ranges import start
from lrqat.starts.codes import rounded
from lrqat.starts.descent import best_shares, descend, sweep, with_ranges
from lrqat.starts.gptq import DAMP, gptq

ROWS, COLUMNS = 12, 256
FLOAT32_SUMS = 1e-4  # relative: sums of 256 x 256 products in float32, in other orders
GRIDS = ["w4g32", "w3", "w2g64", "w4g32-asym", "w3g64-min", "iq4_nl", "mxfp4", "tq2_0", "q2_k", "q3_k", "q4_k", "q6_k"]


def problem(seed: int = 0, tokens: int = 512) -> tuple[Tensor, Tensor]:
    """A weight, and the Hessian of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    weight_OI = torch.randn(ROWS, COLUMNS, generator=generator) * 0.05
    mix_II = torch.randn(COLUMNS, COLUMNS, generator=generator) / 4 + torch.eye(COLUMNS)
    x_TI = torch.randn(tokens, COLUMNS, generator=generator) @ mix_II
    return weight_OI, x_TI.T @ x_TI / tokens


def damped(hessian_II: Tensor) -> Tensor:
    """As GPTQ has it where every input fires."""
    return hessian_II + DAMP * hessian_II.diagonal().mean() * torch.eye(COLUMNS)


def errors(weight_OI: Tensor, value_OI: Tensor, damped_II: Tensor) -> Tensor:
    """Float64 [O]: d H d^T."""
    off_OI = (weight_OI - value_OI).double()
    return ((off_OI @ damped_II.double()) * off_OI).sum(1)


@pytest.mark.parametrize("spelling", GRIDS)
@given(seed=st.integers(0, 2**31))
@settings(max_examples=5)
def test_no_row_gets_worse_and_all_together_better(spelling: str, seed: int) -> None:
    weight_OI, hessian_II = problem(seed)
    begun = gptq(weight_OI, hessian_II, Grid.parse(spelling), 2.0)
    found = descend(weight_OI, hessian_II, begun, DAMP)
    found.check("weight")
    before_O, after_O = (errors(weight_OI, fused.dequantize(), damped(hessian_II)) for fused in (begun, found))
    assert (after_O <= before_O * (1 + FLOAT32_SUMS)).all()
    assert after_O.sum() < 0.97 * before_O.sum()


@pytest.mark.parametrize("spelling", ["w4g32", "w3g64-min", "iq4_nl", "q4_k"])
def test_a_code_moves_to_where_its_row_errs_the_least_of_all_codes(spelling: str) -> None:
    weight_OI, hessian_II = problem()
    grid, damped_II = Grid.parse(spelling), damped(hessian_II)
    parts = start(weight_OI, grid, 2.0)
    affine, column = grid.affine(parts), COLUMNS - 1  # the last: what a sweep moves it by is not moved on
    levels_OI = grid.decode(rounded(weight_OI, parts, grid).codes_OI)
    swept_OI = levels_OI.clone()
    pull_OI = (weight_OI - dequantize(levels_OI, affine)) @ damped_II
    assert sweep(swept_OI, pull_OI, damped_II, grid, parts)
    tried = []
    for level in grid.decode(torch.arange(grid.codes, dtype=torch.uint8)):
        other_OI = swept_OI.clone()
        other_OI[:, column] = level
        tried.append(errors(weight_OI, dequantize(other_OI, affine), damped_II))
    chosen_O = errors(weight_OI, dequantize(swept_OI, affine), damped_II)
    assert torch.allclose(chosen_O, torch.stack(tried).amin(0), rtol=FLOAT32_SUMS)
    followed_OI = (weight_OI - dequantize(swept_OI, affine)) @ damped_II
    assert torch.allclose(pull_OI, followed_OI, atol=FLOAT32_SUMS * followed_OI.abs().max().item())


def test_where_inputs_know_nothing_of_each_other_nearest_codes_stay() -> None:
    weight_OI, grid = problem()[0], Grid.parse("w4g32")
    parts = start(weight_OI, grid, 2.0)
    levels_OI = grid.decode(rounded(weight_OI, parts, grid).codes_OI)
    pull_OI = (weight_OI - dequantize(levels_OI, grid.affine(parts))) @ torch.eye(COLUMNS)
    assert sweep(levels_OI, pull_OI, torch.eye(COLUMNS), grid, parts) == 0


@pytest.mark.parametrize("spelling", ["w3", "w4g32", "w4g32-asym", "q4_k"])
def test_ranges_are_those_of_the_normal_equations(spelling: str) -> None:
    weight_OI, hessian_II = problem()
    fused, damped_II = gptq(weight_OI, hessian_II, Grid.parse(spelling), 2.0), damped(hessian_II)
    value_OI = fused.dequantize()
    ranges = fused.parts[fused.grid.learned[0]].shape[1]
    found_OG = best_shares(value_OI, (weight_OI - value_OI) @ damped_II, damped_II, ranges)
    root_II = torch.linalg.cholesky(damped_II.double(), upper=True)
    for row, value_I in enumerate(value_OI.double()):  # min |(w - sum t_g w^_g) R^T|^2
        groups_GI = torch.block_diag(*value_I.view(ranges, -1))
        t_G = torch.linalg.lstsq(root_II @ groups_GI.T, root_II @ weight_OI[row].double()).solution
        # RIDGE draws them to 1 by 1e-4 of what they are off.
        assert torch.allclose(found_OG[row].double(), t_G, atol=2e-3)


def test_ranges_that_the_wire_cannot_store_leave_a_row_its_own() -> None:
    weight_OI, hessian_II = problem()
    fused = gptq(weight_OI, hessian_II, Grid.parse("mxfp4"), 2.0)  # powers of two
    parts = {name: part.float() for name, part in fused.parts.items()}
    levels_OI, damped_II = fused.grid.decode(fused.codes_OI), damped(hessian_II)
    found, pull_OI = with_ranges(weight_OI, levels_OI, damped_II, fused.grid, parts)
    value_OI = dequantize(levels_OI, fused.grid.affine(found))
    assert (
        errors(weight_OI, value_OI, damped_II) <= errors(weight_OI, fused.dequantize(), damped_II) * (1 + FLOAT32_SUMS)
    ).all()
    assert any(torch.equal(found["exponents"][row], parts["exponents"][row]) for row in range(ROWS))
    assert torch.allclose(pull_OI, (weight_OI - value_OI) @ damped_II, atol=1e-5)


@pytest.mark.parametrize("spelling", ["w4g32", "q4_k", "w4g32-min"])
def test_silent_inputs_zero_groups_and_no_inputs_at_all_are_survived(spelling: str) -> None:
    weight_OI, hessian_II = problem()
    weight_OI[:, 32:64] = 0
    hessian_II[:, :40] = hessian_II[:40] = 0
    grid = Grid.parse(spelling)
    fused = gptq(weight_OI, hessian_II, grid, 2.0)
    found = descend(weight_OI, hessian_II, fused, DAMP)
    found.check("weight")
    assert torch.isfinite(found.dequantize()).all()
    still = descend(weight_OI, torch.zeros(COLUMNS, COLUMNS), fused, DAMP)
    assert still.sha256() == fused.sha256()


def test_tiles_of_rows_give_what_all_rows_give(monkeypatch: pytest.MonkeyPatch) -> None:
    weight_OI, hessian_II = problem()
    fused = gptq(weight_OI, hessian_II, Grid.parse("w4g8"), 2.0)
    whole = descend(weight_OI, hessian_II, fused, DAMP)
    monkeypatch.setattr("lrqat.starts.descent.AT_ONCE", 5 * COLUMNS)  # five rows, and one of 32 x 32 products
    tiled: FusedTensor = descend(weight_OI, hessian_II, fused, DAMP)
    assert (whole.codes_OI != tiled.codes_OI).float().mean() < 0.01  # products of fewer rows add in another order
