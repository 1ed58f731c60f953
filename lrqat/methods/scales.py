"""Only the grid's parts are trained; the codes stay.

    W^ = s * level + m,   level frozen;   ds = sum over the group of dL/dW^ * level,   dm = sum of dL/dW^

PEQA (arXiv 2305.14152) does this from RTN or GPTQ codes, EfficientQAT's E2E-QP (arXiv 2407.11062) from the codes of
its Block-AP. It is the control of every other method: what they gain beyond it, they gain by moving codes.

Memory: the codes, two to a byte up to 4 bits; nothing else of the weight's size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lrqat.fused import FusedTensor
from lrqat.grid import Affine, Grid, Parts, Rows, to_levels
from lrqat.methods.gains import GainQuantizer
from lrqat.methods.tiles import Pieces
from lrqat.ranges import fill


class Scales(GainQuantizer):
    """The codes that a weight has at the start, under parts that learn.

    Args:
        weight_OI: rounded with `start` to the codes; not kept.
        start: the grid's parts.
        grid: any grid.
    """

    factored = True
    codes: Tensor
    immutable = ("codes",)
    moved_before: Tensor  # by what was trained before these codes were frozen

    def __init__(self, weight_OI: Tensor, start: Parts, grid: Grid) -> None:
        super().__init__(grid, (weight_OI.shape[0], weight_OI.shape[1]), start, learn=True)
        affine = grid.affine(start)

        def codes(rows: slice) -> Tensor:
            return self._pack(grid.encode(to_levels(weight_OI[rows], affine.rows(rows), grid)))

        self.register_buffer("codes", fill(weight_OI, codes), persistent=False)
        moved_before = torch.zeros((), dtype=torch.int64, device=weight_OI.device)
        self.register_buffer("moved_before", moved_before, persistent=False)

    @classmethod
    def from_fused(cls, fused: FusedTensor, device: torch.device | None = None, moved: int = 0) -> Scales:
        """Begin with the very codes and parts of a fused weight, of which some were moved before."""
        start = {name: part.to(device, torch.float32) for name, part in fused.parts.items()}
        quantizer = cls(torch.zeros(fused.codes_OI.shape, device=device), start, fused.grid)
        quantizer.codes = quantizer._pack(fused.codes_OI.to(device))
        quantizer.moved_before.fill_(moved)
        return quantizer

    def pieces(self, rows: Rows) -> Pieces:
        """The codes."""
        return (self._unpack(self.stored("codes", rows, self.moved_before.device)),)

    @staticmethod
    def latent_of(grid: Grid, pieces: Pieces, affine: Affine) -> Tensor:
        """The levels."""
        return grid.decode(pieces[0])

    def started(self, rows: slice) -> Tensor:
        """The levels: they never move here."""
        return self.grid.decode(self.pieces(rows)[0])

    def moved(self) -> int:
        """Those that were moved before."""
        return int(self.moved_before)
