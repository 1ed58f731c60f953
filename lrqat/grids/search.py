"""Ranges of groups: min-max, or the one with the least L^p rounding error.

Where levels reach further below zero than above, the sign of the scale is chosen too: w = s * level with s < 0
puts the spare code on the positive side, wherever the group's largest weight is. llama.cpp's Q4_0 does the same;
every format that lrqat writes multiplies by a signed scale.

The L^p search (LR-QAT section 4; OmniQuant and GPTQ's "mse" option do alike) minimises over c

    sum_group |W - s_c level(q_c)|^p,   s_c = +-c * s_minmax,   c in SHRINK

p = 2 is the mean squared error; a larger p protects the outliers. Candidates are compared after they have passed
through their wire precision, so the winner is the best one that can be stored.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

SHRINK = tuple(1.04 - 0.04 * step for step in range(17))  # 1.04 .. 0.40; two bits prefer strong clipping
SHRINK_RANGE = tuple(1.0 - 0.08 * step for step in range(7))  # of a two-sided range: 1.0 .. 0.52
SIDES = ((0.5, 0.5), (1.0, 0.0), (0.0, 1.0))  # shares of the shrinking that the lower and the upper end take


def scale(
    groups_NK: Tensor,
    low: float,
    high: float,
    nearest: Callable[[Tensor], Tensor],
    wire: Callable[[Tensor], Tensor],
    p: float | None,
) -> Tensor:
    """The scale [N] of groups [N, K] for levels from `low` < 0 to `high` > 0; without p, one that clips nothing."""
    least, most = -groups_NK.amin(1).clamp(max=0), groups_NK.amax(1).clamp(min=0)
    positive = torch.maximum(least / -low, most / high)
    negative = torch.maximum(most / -low, least / high)
    signed = torch.where(negative < positive, -negative, positive)
    if p is None:
        return wire(signed)
    start = wire(signed).abs()
    steps_NK = groups_NK / start[:, None]  # errors in steps: |error|^p stays in float32's range for any weights
    best = start.clone()
    least_error = torch.full_like(best, torch.inf)
    for factor in SHRINK:
        for sign in (1.0, -1.0) if -low != high else (1.0,):
            candidate = wire(sign * factor * start)
            relative = (candidate / start)[:, None]
            error = power(nearest(steps_NK / relative).mul_(relative).sub_(steps_NK).abs_(), p).sum(1)
            better = error < least_error
            least_error = torch.where(better, error, least_error)
            best = torch.where(better, candidate, best)
    return best


def scale_and_offset(
    groups_NK: Tensor,
    top: int,
    wire: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    p: float | None,
    include_zero: bool,
) -> tuple[Tensor, Tensor]:
    """Scale s and offset m, [N] each, of groups [N, K] for levels 0 .. top.

    Args:
        groups_NK: float32.
        top: the greatest level.
        wire: (s, m) -> the nearest (s, m) that the grid has; s must not become zero.
        p: exponent of the search; None: the whole range.
        include_zero: the grid's offset cannot be above zero, nor its greatest value below.
    """
    least, most = groups_NK.amin(1), groups_NK.amax(1)
    if include_zero:
        least, most = least.clamp(max=0), most.clamp(min=0)
    width = (most - least).clamp_min(1e-30)
    best_s, best_m = wire(width / top, least)
    if p is None:
        return best_s, best_m
    least_error = torch.full_like(best_s, torch.inf)
    for factor in SHRINK_RANGE:
        for lower, upper in SIDES if factor < 1 else SIDES[:1]:
            low, high = least + lower * (1 - factor) * width, most - upper * (1 - factor) * width
            s, m = wire((high - low) / top, low)
            levels = ((groups_NK - m[:, None]) / s[:, None]).round_().clamp_(0, top)
            off = levels.mul_(s[:, None]).add_(m[:, None]).sub_(groups_NK).abs_().mul_((top / width)[:, None])
            error = power(off, p).sum(1)
            better = error < least_error
            least_error = torch.where(better, error, least_error)
            best_s, best_m = torch.where(better, s, best_s), torch.where(better, m, best_m)
    return best_s, best_m


def power(x: Tensor, p: float) -> Tensor:
    """x^p for x >= 0; whole and half exponents by multiplication, five times faster than pow."""
    if p < 1 or p > 8 or (2 * p) % 1:
        return x.pow(p)
    result = x.sqrt() if p % 1 else x.clone()
    for _ in range(int(p) - (p % 1 == 0)):
        result.mul_(x)
    return result
