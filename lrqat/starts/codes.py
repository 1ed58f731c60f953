"""Begin from given codes: a start is (W', parts) such that rounding W' with the parts gives those codes.

Every method begins from a float weight and a grid's parts, and rounds. So any codes can be a start, if the weight
goes along: W' is the weight nearest to W whose latents lie inside the codes' cells,

    x' = clip((W - m) / s, l - 0.4 (l - below), l + 0.4 (above - l)),    W' = s x' + m

with l the level of the code, below and above its neighbours. Where the code is round-to-nearest's, W' keeps W but for
a fifth of the cell at its edges; where it is not (GPTQ made up for an error elsewhere), W' lies at the edge towards W,
so that the code still knows which neighbour is second best. Nothing is clipped: every weight has a gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lrqat.errors import LrqatError
from lrqat.fused import FusedTensor
from lrqat.grid import Grid, Parts, dequantize, to_latent, to_levels
from lrqat.ranges import fill, weight_tiles

WITHIN = 0.4  # of the distance to the neighbouring level; the cell ends at half of it


class Start(NamedTuple):
    """Where a method begins: a weight [O, I] in any float dtype, and the grid's parts in float32."""

    weight_OI: Tensor
    parts: dict[str, Tensor]


def rounded(weight_OI: Tensor, parts: Parts, grid: Grid) -> FusedTensor:
    """The codes of a start."""
    affine = grid.affine(parts)
    codes = [grid.encode(to_levels(weight_OI[rows], affine.rows(rows), grid)) for rows in weight_tiles(weight_OI)]
    return FusedTensor.make(torch.cat(codes), parts, grid)


def nearest(weight_OI: Tensor, parts: Parts, grid: Grid) -> Tensor:
    """What the codes of a start stand for, float32 [O, I] where the weight is."""
    affine = grid.affine(parts)

    def make(rows: slice) -> Tensor:
        return dequantize(to_levels(weight_OI[rows], affine.rows(rows), grid), affine.rows(rows))

    return fill(weight_OI, make)


def cells(grid: Grid, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """All levels ascending, with the least and the greatest latent that a start may have there."""
    levels_L = torch.tensor(
        sorted(set(grid.decode(torch.arange(grid.codes, dtype=torch.uint8)).tolist())), device=device
    )
    gaps = levels_L.diff()
    below, above = torch.cat((gaps[:1], gaps)), torch.cat((gaps, gaps[-1:]))
    return levels_L, levels_L - WITHIN * below, levels_L + WITHIN * above


def from_fused(weight_OI: Tensor, fused: FusedTensor) -> Tensor:
    """x', float32 [O, I]: the latents nearest to the weight's that round to the fused codes."""
    device = weight_OI.device
    affine = fused.grid.affine({name: part.to(device) for name, part in fused.parts.items()})
    levels_L, low_L, high_L = cells(fused.grid, device)
    tiles = []
    for rows in weight_tiles(weight_OI):
        level_KI = torch.bucketize(fused.grid.decode(fused.codes_OI[rows].to(device)), levels_L)
        x_KI = to_latent(weight_OI[rows], affine.rows(rows))
        tiles.append(torch.minimum(torch.maximum(x_KI, low_L[level_KI]), high_L[level_KI]))
    return torch.cat(tiles)


def start_from(weight_OI: Tensor, fused: FusedTensor, name: str = "weight") -> Start:
    """(W', parts) in the weight's dtype and on its device.

    A narrow dtype may carry x' over the edge of its cell; there W' is the code's own value.

    Raises:
        LrqatError: not even that rounds to the code: the dtype is too narrow for this grid.
    """
    device, grid = weight_OI.device, fused.grid
    parts = {part: values.to(device, torch.float32) for part, values in fused.parts.items()}
    affine, codes_OI = grid.affine(parts), fused.codes_OI.to(device)
    adjusted_OI = dequantize(from_fused(weight_OI, fused), affine).to(weight_OI.dtype)
    for rows in weight_tiles(weight_OI):
        part, levels_KI = affine.rows(rows), grid.decode(codes_OI[rows])
        moved_KI = to_levels(adjusted_OI[rows], part, grid) != levels_KI
        adjusted_OI[rows] = torch.where(moved_KI, dequantize(levels_KI, part).to(weight_OI.dtype), adjusted_OI[rows])
        if not torch.equal(to_levels(adjusted_OI[rows], part, grid), levels_KI):
            raise LrqatError(f"{name}: {weight_OI.dtype} does not hold the codes of {grid}; use --dtype float32")
    return Start(adjusted_OI, parts)
