"""Rounded once, trained by nobody: codes as they are. The head and the embeddings of a training model have these."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lrqat.fused import FusedTensor
from lrqat.grid import Affine, Grid, Rows
from lrqat.methods.base import WeightQuantizer
from lrqat.methods.tiles import Pieces


class Rounded(WeightQuantizer):
    """A fused weight in the model, one byte a code."""

    codes_OI: Tensor
    immutable = ("codes_OI",)

    def __init__(self, fused: FusedTensor, device: torch.device) -> None:
        rows, columns = fused.codes_OI.shape
        super().__init__(fused.grid, (rows, columns))
        self.register_buffer("codes_OI", fused.codes_OI.to(device), persistent=False)
        self.wire = nn.Module()
        for name, part in fused.parts.items():
            self.wire.register_buffer(name, part.to(device), persistent=False)

    def pieces(self, rows: Rows) -> Pieces:
        """The codes."""
        return (self.stored("codes_OI", rows, next(self.wire.buffers()).device),)

    @staticmethod
    def latent_of(grid: Grid, pieces: Pieces, affine: Affine) -> Tensor:
        """The levels."""
        return grid.decode(pieces[0])

    def parts(self) -> dict[str, Tensor]:
        """As they were."""
        return {name: part.float() for name, part in self.wire.named_buffers()}
