"""Coordinate descent: what one pass over the columns has left to gain.

GPTQ decides on every code once, and only columns that come later make up for it; ranges it takes from the weights.
Here each code, and then each range, is chosen anew beside all others as they are. With d = w - w^ of one row, and H
damped as in GPTQ, d H d^T is the error of its outputs, and never grows:

    code      w^_i <- nearest(w^_i + (d H)_i / H_ii)                            QuantEase (arXiv 2309.01885)
    ranges    w^_g <- t_g w^_g, all of a row at once:  sum_h A_gh (t_h - 1) = sum over i in g of (d H)_i w^_i
              A_gh = w^_g H_gh w^_h^T

A range is what `Grid.scaled` moves: a scale, with the minimum under it; of a K-quant the super-scale. Where the wire
cannot store the ranges that are better, the row keeps its own. Any grid.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lrqat.fused import FusedTensor
from lrqat.grid import Grid, Parts, dequantize
from lrqat.ranges import row_tiles
from lrqat.starts.targets import mean_firing

TURNS = 2  # ranges, then codes
SWEEPS = 2  # over all columns, a turn
SHARES = (0.5, 2.0)  # of a range; further off, A knows too little of it
RIDGE = 1e-4  # share of the mean of diag A
AT_ONCE = 1 << 24  # numbers of a float32 temporary


@torch.no_grad()
def descend(weight_OI: Tensor, hessian_II: Tensor, fused: FusedTensor, damp: float) -> FusedTensor:
    """Codes and parts whose outputs are nearer to the weight's, or the same ones.

    Args:
        weight_OI: what was rounded, any float dtype.
        hessian_II: X^T X / T of its inputs, float32.
        fused: what it was rounded to.
        damp: share of the mean of diag H, of inputs that fire, that is added to it.
    """
    damped_II = hessian_II.clone()
    damped_II.diagonal().add_(damp * mean_firing(hessian_II))
    if not (damped_II.diagonal() > 0).all():  # no input fires
        return fused
    rows, columns = weight_OI.shape
    tiles = row_tiles(rows, columns, AT_ONCE)
    return FusedTensor.stacked([rows_descended(weight_OI[tile].float(), damped_II, fused.rows(tile)) for tile in tiles])


def rows_descended(weight_KI: Tensor, damped_II: Tensor, fused: FusedTensor) -> FusedTensor:
    """`descend`, of some rows."""
    grid, device = fused.grid, weight_KI.device
    levels_KI = grid.decode(fused.codes_OI.to(device))
    parts: Parts = {name: part.to(device, torch.float32) for name, part in fused.parts.items()}
    for _ in range(TURNS):
        parts, pull_KI = with_ranges(weight_KI, levels_KI, damped_II, grid, parts)
        for _ in range(SWEEPS):
            if not sweep(levels_KI, pull_KI, damped_II, grid, parts):
                break
    parts, _ = with_ranges(weight_KI, levels_KI, damped_II, grid, parts)
    return FusedTensor.make(grid.encode(levels_KI), parts, grid)


def with_ranges(
    weight_KI: Tensor, levels_KI: Tensor, damped_II: Tensor, grid: Grid, parts: Parts
) -> tuple[Parts, Tensor]:
    """(parts, d H [K, I]) with every row's ranges as good as its codes allow."""

    def errors(parts: Parts) -> tuple[Tensor, Tensor, Tensor]:
        value_KI = dequantize(levels_KI, grid.affine(parts))
        off_KI = weight_KI - value_KI
        pull_KI = off_KI @ damped_II
        return value_KI, pull_KI, off_KI.mul_(pull_KI).sum(1)

    value_KI, pull_KI, cost_K = errors(parts)
    other = grid.scaled(parts, best_shares(value_KI, pull_KI, damped_II, parts[grid.learned[0]].shape[1]))
    _, other_pull_KI, other_cost_K = errors(other)
    better_K1 = (other_cost_K < cost_K)[:, None]
    chosen = {name: torch.where(better_K1, other[name], part) for name, part in parts.items()}
    return chosen, torch.where(better_K1, other_pull_KI, pull_KI)


def best_shares(value_KI: Tensor, pull_KI: Tensor, damped_II: Tensor, ranges: int) -> Tensor:
    """t [K, G]: by how much each of a row's ranges is to grow, before the wire."""
    columns = value_KI.shape[1]
    width = columns // ranges
    wanted_KG = (pull_KI * value_KI).unflatten(1, (ranges, width)).sum(2)
    found = []
    for tile in row_tiles(len(value_KI), ranges * ranges, AT_ONCE):
        value_LI = value_KI[tile]
        products_LGG = value_LI.new_empty(len(value_LI), ranges, ranges)
        for g in range(ranges):
            own = slice(g * width, (g + 1) * width)
            seen_LI = (value_LI[:, own] @ damped_II[own]).mul_(value_LI)
            products_LGG[:, g] = seen_LI.unflatten(1, (ranges, width)).sum(2)
        diagonal_LG = products_LGG.diagonal(dim1=1, dim2=2)
        diagonal_LG += RIDGE * diagonal_LG.mean(1, keepdim=True) + torch.finfo(torch.float32).tiny
        found.append(torch.linalg.solve(products_LGG, wanted_KG[tile]))
    return (1 + torch.cat(found)).clamp_(*SHARES)


def sweep(levels_KI: Tensor, pull_KI: Tensor, damped_II: Tensor, grid: Grid, parts: Parts) -> int:
    """One code after the other, in place; `pull_KI`, d H, follows. Returns how many have moved."""
    columns, scale_KG, moved = levels_KI.shape[1], grid.affine(parts).scale_OG, 0
    group, diagonal = grid.columns_per_group(columns), damped_II.diagonal().tolist()
    for i in range(columns):
        scale_K = scale_KG[:, i // group]
        step_K = grid.nearest(levels_KI[:, i] + pull_KI[:, i] / (diagonal[i] * scale_K)) - levels_KI[:, i]
        rows = step_K.nonzero().flatten()
        if len(rows):
            levels_KI[:, i] += step_K
            pull_KI.index_add_(0, rows, (step_K * scale_K)[rows, None] * damped_II[i], alpha=-1)
            moved += len(rows)
    return moved
