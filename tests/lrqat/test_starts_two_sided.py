"""Feedback from both sides: every code is the best one for rows above and columns before it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lrqat.fused import FusedTensor
from lrqat.grid import Grid
from lrqat.ptq import rtn
from lrqat.starts import two_sided as module
from lrqat.starts.descent import descend
from lrqat.starts.factor import inverse_factor, unit_factor
from lrqat.starts.felt import Felt
from lrqat.starts.gptq import DAMP, by_columns, gptq
from lrqat.starts.two_sided import error, two_sided

ROWS, COLUMNS = 24, 64
FLOAT32_SUMS = 1e-4  # relative: sums of some hundred float32 products, in other orders
GRIDS = ["w4g32", "w3", "w2g64", "w4g32-asym", "w3g32-min", "iq4_nl", "mxfp4"]


def correlated(size: int, seed: int) -> Tensor:
    """The Hessian of inputs, or of gradients, that know of each other."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(size, size, generator=generator) * torch.linspace(2, 0.05, size)[:, None]
    return mix.T @ mix / size


def problem(seed: int = 0) -> tuple[Tensor, Felt]:
    weight_OI = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed)) * 0.05
    return weight_OI, Felt(correlated(COLUMNS, seed + 1), correlated(ROWS, seed + 2))


def begun(weight_OI: Tensor, felt: Felt, spelling: str) -> FusedTensor:
    return descend(weight_OI, felt.inputs_II, gptq(weight_OI, felt.inputs_II, Grid.parse(spelling), 2.0), DAMP)


@pytest.mark.parametrize("size", [1, 7, 40])
def test_the_unit_factor_factors_the_damped_hessian(size: int) -> None:
    hessian_KK = correlated(size, 0)
    unit_KK = unit_factor(hessian_KK, DAMP, "weight").double()
    damped_KK = (hessian_KK + DAMP * hessian_KK.diagonal().mean() * torch.eye(size)).double()
    assert torch.equal(unit_KK, unit_KK.triu()) and torch.allclose(unit_KK.diagonal(), torch.ones(size).double())
    between_KK = torch.linalg.solve_triangular(unit_KK, damped_KK, upper=True)
    between_KK = torch.linalg.solve_triangular(unit_KK.T, between_KK, upper=False, left=False)
    assert (between_KK - between_KK.diagonal().diag()).abs().max() < 1e-3 * damped_KK.diagonal().max()
    assert (between_KK.diagonal() > 0).all()


@pytest.mark.parametrize("spelling", GRIDS)
@pytest.mark.parametrize("side", [5, 16, 128])
def test_codes_are_those_of_one_at_a_time(spelling: str, side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SIDE", side)
    monkeypatch.setattr(module, "error", lambda _, fused, __: 0.0 if fused is not first else 1.0)  # take what is found
    weight_OI, felt = problem()
    first = begun(weight_OI, felt, spelling)
    found = two_sided(weight_OI, felt, first, DAMP).dequantize().double()
    row_O, column_I = (
        each.diagonal().argsort(descending=True, stable=True) for each in (felt.outputs_OO, felt.inputs_II)
    )
    above_OO = unit_factor(felt.outputs_OO[row_O][:, row_O], DAMP, "weight").double()
    before_II = unit_factor(felt.inputs_II[column_I][:, column_I], DAMP, "weight").double()
    affine = first.grid.affine(first.parts)
    group = first.grid.columns_per_group(COLUMNS)
    exact_OI, chosen_OI = weight_OI[row_O][:, column_I].double(), found[row_O][:, column_I]
    off = 0
    error_OI = torch.zeros(ROWS, COLUMNS).double()
    for r in range(ROWS):
        for c in range(COLUMNS):
            seen = above_OO[: r + 1, r] @ error_OI[: r + 1, : c + 1] @ before_II[: c + 1, c]
            g = int(column_I[c]) // group
            scale = affine.scale_OG[row_O[r], g].double()
            offset = 0.0 if affine.offset_OG is None else affine.offset_OG[row_O[r], g].double()
            latent = (exact_OI[r, c] + seen - offset) / scale
            nearest = first.grid.nearest(latent.float()[None])[0]
            # at the edge of a cell float32 may fall to the other side
            edge = first.grid.nearest((latent + torch.tensor([-1e-3, 1e-3])).float())
            value = (chosen_OI[r, c] - offset) / scale
            assert min(abs(value - nearest), abs(value - edge[0]), abs(value - edge[1])) < 1e-4
            off += int(abs(value - nearest) > 1e-4)
            error_OI[r, c] = exact_OI[r, c] - chosen_OI[r, c]
    assert off < 10


@pytest.mark.parametrize("spelling", GRIDS)
@given(seed=st.integers(0, 2**31))
@settings(max_examples=5)
def test_never_errs_more_and_keeps_the_ranges(spelling: str, seed: int) -> None:
    weight_OI, felt = problem(seed)
    before = begun(weight_OI, felt, spelling)
    after = two_sided(weight_OI, felt, before, DAMP)
    after.check("weight")
    assert all(torch.equal(after.parts[name], part) for name, part in before.parts.items())
    assert error(weight_OI, after, felt) <= error(weight_OI, before, felt)


@pytest.mark.parametrize("spelling", [each for each in GRIDS if each != "w2g64"])  # has few codes to make up with
def test_errs_less_than_rows_that_do_not_know_of_each_other(spelling: str) -> None:
    errors = []
    for seed in range(8):
        weight_OI, felt = problem(seed)
        before = begun(weight_OI, felt, spelling)
        errors.append([error(weight_OI, one, felt) for one in (two_sided(weight_OI, felt, before, DAMP), before)])
    after, before_all = torch.tensor(errors).sum(0).tolist()
    assert after < 0.9 * before_all


def test_outputs_that_know_nothing_of_each_other_leave_what_gptq_does() -> None:
    weight_OI, felt = problem()
    felt = felt._replace(outputs_OO=torch.eye(ROWS))
    grid = Grid.parse("w4g32")
    fused = rtn(weight_OI, grid, 2.0)
    order_I = felt.inputs_II.diagonal().argsort(descending=True, stable=True)
    factor_II = inverse_factor(felt.inputs_II[order_I][:, order_I], DAMP, "weight")
    levels_IO, _ = by_columns(weight_OI.T[order_I].clone(), order_I, COLUMNS, factor_II, grid, fused.parts)
    found = two_sided(weight_OI, felt, fused, DAMP)
    assert (grid.decode(found.codes_OI)[:, order_I] != levels_IO.T).float().mean() < 2e-3  # ties in float32


def test_codes_that_err_less_already_stay() -> None:
    weight_OI, felt = problem()
    fused = begun(weight_OI, felt, "w4g32")
    exact_OI = fused.dequantize()
    assert error(exact_OI, fused, felt) == 0
    assert torch.equal(two_sided(exact_OI, felt, fused, DAMP).codes_OI, fused.codes_OI)


def test_error_is_the_trace() -> None:
    weight_OI, felt = problem()
    fused = begun(weight_OI, felt, "w3")
    off_OI = (weight_OI - fused.dequantize()).double()
    exact = torch.trace(felt.outputs_OO.double() @ off_OI @ felt.inputs_II.double() @ off_OI.T)
    assert abs(error(weight_OI, fused, felt) - exact) < FLOAT32_SUMS * exact
