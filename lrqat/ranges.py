"""Where a group's scale comes from: min-max, or the scale with the least L^p rounding error.

Both choose the sign of the scale too. A symmetric grid has one more code below zero than above; w = s*q with
s < 0 puts that code on the positive side, wherever the group's largest weight is. llama.cpp's Q4_0 does the
same; every format that lrqat writes multiplies by a signed scale.

The L^p search (LR-QAT section 4, OmniQuant and GPTQ's "mse" option do alike) minimises over c

    sum_group |W - s_c clip(round(W / s_c))|^p,   s_c = +-c * s_minmax,   c in SHRINK

p = 2 is the mean squared error; a larger p protects the outliers. Scales are compared after they have passed
through their wire precision, so the winner is the best one that can be stored.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lrqat.errors import LrqatError
from lrqat.grid import Grid
from lrqat.settings import MAX_RANGE_P

SHRINK = [1.04 - 0.04 * step for step in range(17)]  # 1.04 .. 0.40; two bits prefer strong clipping
TILE_WEIGHTS = 1 << 18  # elements that stay in a core's L2 cache with their temporaries


def row_tiles(rows: int, columns: int) -> list[slice]:
    """Slices of rows, each of about TILE_WEIGHTS elements."""
    step = max(1, TILE_WEIGHTS // columns)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def initial_scales(weight_OI: Tensor, grid: Grid, p: float | None, name: str = "weight") -> Tensor:
    """Wire scales [O, G], float32, of a symmetric grid.

    Args:
        weight_OI: float weights [O, I].
        grid: a symmetric grid.
        p: exponent of the search; None for min-max.
        name: named in errors.
    """
    rows, columns = weight_OI.shape
    size = grid.columns_per_group(columns, name)
    if not grid.symmetric:
        symmetric = replace(grid, symmetric=True)
        raise LrqatError(f"{name}: grid {grid} is asymmetric, which no method does yet; use --grid {symmetric}")
    if p is not None and not 0 < p <= MAX_RANGE_P:
        raise LrqatError(f"range_p: expected above 0 and at most {MAX_RANGE_P}, or min-max, got {p}")
    scales = torch.empty(rows, columns // size, device=weight_OI.device)
    for tile in row_tiles(rows, columns):
        groups = weight_OI[tile].float().reshape(-1, size)
        if not torch.isfinite(groups).all():
            raise LrqatError(f"{name}: holds NaN or infinite weights; the model file is damaged")
        found = minmax_scales(groups, grid) if p is None else lp_scales(groups, grid, p)
        scales[tile] = found.view(-1, columns // size)
    return scales


def minmax_scales(groups_NK: Tensor, grid: Grid) -> Tensor:
    """The smallest scale, of either sign, that clips nothing; [N]."""
    most, least = float(grid.midpoint), float(grid.midpoint - 1)
    low, high = -groups_NK.amin(1).clamp(max=0), groups_NK.amax(1).clamp(min=0)
    positive = torch.maximum(low / most, high / least)
    negative = torch.maximum(high / most, low / least)
    return grid.to_wire(torch.where(negative < positive, -negative, positive))


def lp_scales(groups_NK: Tensor, grid: Grid, p: float) -> Tensor:
    """The scale among +-SHRINK * min-max with the least sum |error|^p; [N]."""
    start = minmax_scales(groups_NK, grid).abs()
    steps_NK = groups_NK / start[:, None]  # errors in steps: |error|^p stays in float32's range for any weights
    best = start.clone()
    least_error = torch.full_like(best, torch.inf)
    for factor in SHRINK:
        for sign in (1.0, -1.0):
            scale = grid.to_wire(sign * factor * start)
            relative = (scale / start)[:, None]
            rounded = (steps_NK / relative).round_().clamp_(-grid.midpoint, grid.midpoint - 1)
            error = power(rounded.mul_(relative).sub_(steps_NK).abs_(), p).sum(1)
            better = error < least_error
            least_error = torch.where(better, error, least_error)
            best = torch.where(better, scale, best)
    return best


def power(x: Tensor, p: float) -> Tensor:
    """x^p for x >= 0; whole and half exponents by multiplication, five times faster than pow."""
    if p < 1 or p > 8 or (2 * p) % 1:
        return x.pow(p)
    result = x.sqrt() if p % 1 else x.clone()
    for _ in range(int(p) - (p % 1 == 0)):
        result.mul_(x)
    return result
