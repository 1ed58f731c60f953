"""Round with feedback from both sides, where outputs know of each other (YAQA's LDLQ, arXiv 2505.22988).

    E = W - W^,    error = tr(H_O E H_I E^T),    H_O = P D P^T,    H_I = K D' K^T         P, K unit upper
    error = sum D_r D'_c (P^T E K)_rc^2
    w^_rc = nearest(w_rc + what (P^T E K)_rc has of errors that are there already)

so each code is the best that it can be for rows above and columns before it, as GPTQ's is for columns before. Rows and
columns come in falling order of their diagonals. What is on one antidiagonal knows nothing of each other and is rounded
at once; tiles of SIDE x SIDE keep the rest a matrix product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lrqat.fused import FusedTensor
from lrqat.grid import Grid
from lrqat.starts.factor import unit_factor
from lrqat.starts.felt import Felt

SIDE = 128


@torch.no_grad()
def two_sided(weight_OI: Tensor, felt: Felt, fused: FusedTensor, damp: float, name: str = "weight") -> FusedTensor:
    """Other codes in the same ranges, or the same ones where these err less.

    Args:
        weight_OI: what was rounded, any float dtype.
        felt: H_I and H_O.
        fused: what it was rounded to.
        damp: share of the mean of each diagonal that is added to it.
        name: in messages.
    """
    grid, device = fused.grid, weight_OI.device
    rows, columns = weight_OI.shape
    column_I, row_O = (each.diagonal().argsort(descending=True, stable=True) for each in felt)
    above_OO = unit_factor(felt.outputs_OO[row_O][:, row_O], damp, name)
    before_II = unit_factor(felt.inputs_II[column_I][:, column_I], damp, name)
    affine = grid.affine({part: values.to(device, torch.float32) for part, values in fused.parts.items()}).rows(row_O)
    group_I = column_I // grid.columns_per_group(columns)
    exact_OI = weight_OI.float()[row_O][:, column_I]
    levels_OI, errors_OI, passed_OI = (torch.zeros_like(exact_OI) for _ in range(3))  # passed: P^T E
    for r in range(0, rows, SIDE):
        here = slice(r, r + SIDE)
        scale_RG, offset_RG = affine.rows(here)
        for c in range(0, columns, SIDE):
            there = slice(c, c + SIDE)
            scale_RC = scale_RG[:, group_I[there]]
            offset_RC = torch.zeros_like(scale_RC) if offset_RG is None else offset_RG[:, group_I[there]]
            above_RC = above_OO[:r, here].T @ errors_OI[:r, there]
            before_RC = passed_OI[here, :c] @ before_II[:c, there]
            levels_RC = tile(
                exact_OI[here, there] - offset_RC, scale_RC, above_RC, before_RC,
                above_OO[here, here], before_II[there, there], grid,
            )  # fmt: skip
            error_RC = exact_OI[here, there] - (levels_RC * scale_RC + offset_RC)
            levels_OI[here, there], errors_OI[here, there] = levels_RC, error_RC
            passed_OI[here, there] = above_RC + above_OO[here, here].T @ error_RC
    back_O, back_I = row_O.argsort(), column_I.argsort()
    found = FusedTensor.make(grid.encode(levels_OI[back_O][:, back_I]), fused.parts, grid)
    return min((fused, found), key=lambda one: error(weight_OI, one, felt))


def tile(
    weight_RC: Tensor, scale_RC: Tensor, above_RC: Tensor, before_RC: Tensor, above_RR: Tensor, before_CC: Tensor,
    grid: Grid,
) -> Tensor:  # fmt: skip
    """Levels [R, C] of a tile, given what (P^T E K) has of rows above it and of columns before it."""
    rows, columns = weight_RC.shape
    # Turned upside down, an antidiagonal is a diagonal: a stretch of rows beside a stretch of columns.
    weight_RC, scale_RC, above_RC, before_RC = (each.flip(0) for each in (weight_RC, scale_RC, above_RC, before_RC))
    above_RR = above_RR.flip(0, 1).T.contiguous().fill_diagonal_(0)
    before_CC = before_CC.T.contiguous().fill_diagonal_(0)
    levels_RC, passed_RC, errors_CR = (torch.zeros_like(each) for each in (weight_RC, weight_RC, weight_RC.T))
    for number in range(rows + columns - 1):
        first, end = max(0, rows - 1 - number), min(rows, rows - 1 - number + columns)
        down, along = slice(first, end), slice(first + number - rows + 1, end + number - rows + 1)

        def diagonal(values_RC: Tensor, down: slice = down, along: slice = along) -> Tensor:
            return values_RC[down, along].diagonal()

        above_D = diagonal(above_RC) + (above_RR[down] * errors_CR[along]).sum(1)
        before_D = diagonal(before_RC) + (passed_RC[down] * before_CC[along]).sum(1)
        weight_D, scale_D = diagonal(weight_RC), diagonal(scale_RC)
        level_D = grid.nearest((weight_D + above_D + before_D) / scale_D)
        error_D = weight_D - level_D * scale_D
        diagonal(levels_RC).copy_(level_D)
        diagonal(errors_CR.T).copy_(error_D)
        diagonal(passed_RC).copy_(error_D + above_D)
    return levels_RC.flip(0)


def error(weight_OI: Tensor, fused: FusedTensor, felt: Felt) -> float:
    """tr(H_O E H_I E^T)."""
    off_OI = weight_OI.float() - fused.dequantize().to(weight_OI.device, torch.float32)
    return float((felt.outputs_OO @ off_OI @ felt.inputs_II).mul_(off_OI).sum())
