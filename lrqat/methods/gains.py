"""What methods share: parts trained by gains, codes two to a byte, weights that keep the grid's units out.

Parts are trained by gains, s = wire(s0 * gain): Adam's step on a gain is relative, so one learning rate fits
layers whose scales differ by orders of magnitude.

A method whose latent is a real weight in units of the *trained* grid, x = (W - m) / s, has (LSQ, eq. 3 of
arXiv 2406.06385; L4Q, arXiv 2402.04902, appendix A)

    W^ = s * nearest(x) + m
    dW = dL/dW^ * [x inside]
    ds = sum over the group of dL/dW^ * (level - [x inside] * x)
    dm = sum of dL/dW^ * (1 - [x inside])
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lrqat.grid import Affine, Grid, Parts, to_latent
from lrqat.methods.base import WeightQuantizer
from lrqat.methods.tiles import Pieces, Slopes, by_group, inside


class GainQuantizer(WeightQuantizer):
    """A quantizer whose parts are wire(start * gain).

    Args:
        grid: any grid.
        shape: (O, I) of the weight.
        start: the grid's parts that it begins with.
        learn: train gains on the parts; otherwise they stay as they are.
    """

    def __init__(self, grid: Grid, shape: tuple[int, int], start: Parts, learn: bool) -> None:
        super().__init__(grid, shape)
        self.start = nn.Module()
        for name, part in start.items():
            self.start.register_buffer(name, part, persistent=False)
        ones = {name: torch.ones_like(start[name], dtype=torch.float32) for name in self.trains(grid) if learn}
        self.gains = nn.ParameterDict({name: nn.Parameter(one) for name, one in ones.items()})

    @classmethod
    def trains(cls, grid: Grid) -> tuple[str, ...]:
        """Names of the parts that gains are trained on."""
        return grid.learned

    def parts(self) -> dict[str, Tensor]:
        """wire(start * gain)."""
        return self.grid.learn(dict(self.start.named_buffers()), dict(self.gains))

    def started(self, rows: slice) -> Tensor:
        """Float32 [rows, I]: the levels that training began with."""
        raise NotImplementedError

    @torch.no_grad()
    def moved(self) -> int:
        """How many weights have another level than when training began."""
        affine = self.affine()
        return sum(int((self.levels(rows, affine) != self.started(rows)).sum()) for rows in self.tiles(affine))

    def _pack(self, codes_KI: Tensor) -> Tensor:
        """Two codes a byte, even columns in the low nibble: 3, 10 -> 0xa3; above 4 bits one code a byte."""
        if self.grid.bits > 4 or codes_KI.shape[1] % 2:
            return codes_KI
        return codes_KI[:, 0::2] | (codes_KI[:, 1::2] << 4)

    def _unpack(self, packed: Tensor) -> Tensor:
        """Inverse of `_pack`."""
        if packed.shape[1] == self.shape[1]:
            return packed
        return torch.stack((packed & 15, packed >> 4), dim=2).view(packed.shape[0], self.shape[1])


class WeightDomain(GainQuantizer):
    """A quantizer of real weights W, the one piece, whatever they are made of."""

    @classmethod
    def trains(cls, grid: Grid) -> tuple[str, ...]:
        """Integer zeros too."""
        return (*grid.learned, *grid.learned_beneath)

    @staticmethod
    def latent_of(grid: Grid, pieces: Pieces, affine: Affine) -> Tensor:
        """x = (W - m) / s."""
        return to_latent(pieces[0], affine)

    @staticmethod
    def slopes(grid: Grid, affine: Affine, latent_KI: Tensor, levels_KI: Tensor, grad_KI: Tensor) -> Slopes:
        """LSQ's: clipped is what is rounded beyond the ends."""
        return weight_slopes(inside, grid, affine, latent_KI, levels_KI, grad_KI)


def weight_slopes(
    kept: Callable[[Grid, Tensor, Tensor], Tensor],
    grid: Grid,
    affine: Affine,
    latent_KI: Tensor,
    levels_KI: Tensor,
    grad_KI: Tensor,
) -> Slopes:
    """The equations of the module's docstring, kept(grid, x, v) = v [x inside]; `large_KI` is dL/dW.

    level - x is formed before any sum: at 8 bits the two alone would cancel to a hundredth of their size.
    """
    masked_KI = kept(grid, latent_KI, grad_KI)
    off_KI = (levels_KI - kept(grid, latent_KI, latent_KI)) * grad_KI
    offset_KG = None if affine.offset_OG is None else by_group(grad_KI - masked_KI, grid).sum(2)
    return Slopes(masked_KI, by_group(off_KI, grid).sum(2), offset_KG)
