"""LSQ: full quantization-aware training of weights and grid (eq. 3 of arXiv 2406.06385; Esser et al., 1902.08153).

    W^ = s * nearest((W - m) / s) + m,   W [O, I] and the grid's parts trained

The gradients stand in `lrqat.methods.gains`. LSQ's gradient scale 1 / sqrt(N * qmax) has no place here: gains make
the step relative, and Adam does not see a constant factor.

Memory: W, its gradient and Adam's two moments, [O, I] each in float32: the yardstick that low rank is measured against.
The codes that it began with, for `moved`, are half a byte a weight.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lrqat.grid import Grid, Parts, Rows
from lrqat.methods.gains import WeightDomain
from lrqat.methods.tiles import Pieces
from lrqat.ranges import fill


class LSQ(WeightDomain):
    """LSQ of one weight.

    Args:
        weight_OI: the weight it begins with, any float dtype; copied.
        start: the grid's parts that it is rounded with at the start.
        grid: any grid.
        learn_scales: train gains on the parts; otherwise they stay as they are.
    """

    begun: Tensor
    immutable = ("begun",)

    def __init__(self, weight_OI: Tensor, start: Parts, grid: Grid, *, learn_scales: bool) -> None:
        super().__init__(grid, (weight_OI.shape[0], weight_OI.shape[1]), start, learn_scales)
        self.weight_OI = nn.Parameter(weight_OI.detach().to(torch.float32, copy=True))
        affine = grid.affine(start)
        begun = fill(weight_OI, lambda rows: self._pack(grid.encode(self.levels(rows, affine))))
        self.register_buffer("begun", begun, persistent=False)

    def pieces(self, rows: Rows) -> Pieces:
        """W."""
        return (self.weight_OI.detach()[rows],)

    def started(self, rows: slice) -> Tensor:
        """The levels of W as it was given."""
        return self.grid.decode(self._unpack(self.stored("begun", rows, self.weight_OI.device)))

    def large(self) -> dict[str, nn.Parameter]:
        """W."""
        return {"weight_OI": self.weight_OI}

    def absorb(self, rows: Rows, large_KI: Tensor, grads: dict[str, Tensor]) -> None:
        """dL/dW itself."""
        grads["weight_OI"][rows] = large_KI
