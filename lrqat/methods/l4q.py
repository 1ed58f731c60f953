"""L4Q (arXiv 2402.04902): low-rank adapters on the weight, below the rounding, with a learned grid.

    W  = W0 + (alpha/r) B A                          eq. 6; W0 frozen in its own dtype, r = 4
    W^ = s * round(clip(x, qn, qp)) + m              eq. 7, x = (W - m) / s; s and m trained
    dB = (alpha/r) dL/dW A^T,  dA = (alpha/r) B^T dL/dW         eq. 10-12
    dW, ds, dm as in `lrqat.methods.gains`, x inside where qn <= x <= qp

The clip comes before the rounding, so gradients end at the outermost levels, half a step before LSQ's and LR-QAT's.
W is recomputed in backward. The paper's offset is real, and grids "-min" have it; of "-asym" it is -s z with an
integer z, and symmetric grids have none. It is that of the middle level there, here of the lowest, so a step of s
moves other levels. A is Kaiming and B zero, as in LoRA. LR-QAT differs in what is frozen, too: it is divided by the
*initial* s, so a moving s moves W0 along; here W0 stays, and s moves the grid below it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lrqat.errors import LrqatError
from lrqat.grid import Affine, Grid, Parts, Rows, to_levels
from lrqat.grids.affine import AffineGrid
from lrqat.grids.wire import to_fp16
from lrqat.methods.gains import WeightDomain, weight_slopes
from lrqat.methods.place import passing
from lrqat.methods.tiles import Pieces, Slopes


class L4Q(WeightDomain):
    """L4Q of one weight.

    Args:
        weight_OI: the pretrained weight, any float dtype; kept as it is, not copied.
        start: the grid's parts that it is rounded with at the start (`l4q_start` for the paper's).
        grid: any grid.
        rank: R.
        alpha: the adapter's multiplier is alpha / rank.
        learn_scales: train gains on the parts; otherwise they stay as they are.
        generator: draws A.
    """

    frozen_OI: Tensor
    immutable = ("frozen_OI",)

    def __init__(
        self,
        weight_OI: Tensor,
        start: Parts,
        grid: Grid,
        *,
        rank: int = 4,
        alpha: float = 4.0,
        learn_scales: bool = True,
        generator: torch.Generator,
    ) -> None:
        rows, columns = weight_OI.shape
        super().__init__(grid, (rows, columns), start, learn_scales)
        if not 1 <= rank <= min(rows, columns):
            raise LrqatError(f"rank: expected 1 to {min(rows, columns)} for a {rows}x{columns} weight, got {rank}")
        self.multiplier = alpha / rank
        self.register_buffer("frozen_OI", weight_OI.detach(), persistent=False)
        a_RI = torch.empty(rank, columns)
        nn.init.kaiming_uniform_(a_RI, a=5**0.5, generator=generator)
        self.a_RI = nn.Parameter(a_RI.to(weight_OI.device))
        self.b_OR = nn.Parameter(torch.zeros(rows, rank, device=weight_OI.device))

    def pieces(self, rows: Rows) -> Pieces:
        """W = W0 + (alpha/r) B A."""
        frozen_KI = self.stored("frozen_OI", rows, self.b_OR.device)
        weight_KI = passing((len(frozen_KI), self.shape[1]), torch.float32, frozen_KI.device, "delta").copy_(frozen_KI)
        return (weight_KI.addmm_(self.b_OR[rows].detach(), self.a_RI.detach(), alpha=self.multiplier),)

    @staticmethod
    def slopes(grid: Grid, affine: Affine, latent_KI: Tensor, levels_KI: Tensor, grad_KI: Tensor) -> Slopes:
        """Eq. 10-13."""
        return weight_slopes(between_ends, grid, affine, latent_KI, levels_KI, grad_KI)

    def started(self, rows: slice) -> Tensor:
        """nearest((W0 - m0) / s0)."""
        affine = self.grid.affine(dict(self.start.named_buffers()))
        return to_levels(self.stored("frozen_OI", rows, self.b_OR.device), affine.rows(rows), self.grid)

    def large(self) -> dict[str, nn.Parameter]:
        """A and B."""
        return {"a_RI": self.a_RI, "b_OR": self.b_OR}

    def absorb(self, rows: Rows, large_KI: Tensor, grads: dict[str, Tensor]) -> None:
        """Eq. 10-12; products in the dtype of dL/dW."""
        a_RI, b_KR = self.a_RI.detach().to(large_KI.dtype), self.b_OR[rows].detach().to(large_KI.dtype)
        grads["b_OR"][rows] += (large_KI @ a_RI.T) * self.multiplier
        grads["a_RI"] += (b_KR.T @ large_KI) * self.multiplier


def between_ends(grid: Grid, latent_KI: Tensor, values_KI: Tensor) -> Tensor:
    """The values where qn <= x <= qp, else 0."""
    low, high = grid.ends
    return torch.where((latent_KI >= low) & (latent_KI <= high), values_KI, 0.0)


def l4q_start(weight_OI: Tensor, grid: Grid, name: str = "weight") -> dict[str, Tensor]:
    """The paper's start, s = max(|min W / qn|, |max W / qp|) and m = 0 at the middle level; affine grids only."""
    if not isinstance(grid, AffineGrid):
        raise LrqatError(f"{name}: L4Q's own start is for affine grids, not {grid}; use the range search")
    rows, columns = weight_OI.shape
    groups_OGK = weight_OI.float().view(rows, -1, grid.columns_per_group(columns, name))
    low, high = groups_OGK.amin(2).clamp(max=0), groups_OGK.amax(2).clamp(min=0)
    scales_OG = grid.wire(torch.maximum(-low / grid.midpoint, high / (grid.midpoint - 1)))
    parts = {"scales": scales_OG}
    if grid.zero == "integer":
        parts["zeros"] = torch.full_like(scales_OG, grid.midpoint)
    elif grid.zero == "minimum":
        parts["minimums"] = to_fp16(-scales_OG * grid.midpoint)
    return parts
