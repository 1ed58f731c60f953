"""LR-QAT (arXiv 2406.06385): low-rank adapters inside the rounding of frozen weights.

    W^ = s * nearest(Phi0 + c A B) + m,    c = (alpha/r) step                (eq. 8, on any grid)
    Phi0 = phi(clip((W0 - m0) / s0))  frozen, in one of these downcasts phi:
        fixed    Q_b.(7-b) fixed point in an int8, and a bit for the side of an edge
        eq7      the paper's fixed point, Q_b.(8-b) in an int8                                (eq. 7)
        int      the codes alone, two to a byte up to 4 bits
        bf16     bfloat16

The grid's step is 1 where levels are integers; a codebook's levels may be further apart (IQ4_NL: 16), and the same
learning rate moves as many of its codes.

Trained: A [O, R] (Kaiming), B [R, I] (zero), and the grid's parts. With u = Phi0 + c A B, the straight-through
estimator (nearest' = 1 inside the range, 0 outside) gives

    dL/du = dL/dW * s * [u inside],   dA = c dL/du B^T,   dB = c A^T dL/du,
    ds    = sum over the group of dL/dW * level,   dm = sum of dL/dW         (Phi0 is frozen at s0, m0)

Parts are trained by gains (`lrqat.methods.gains`). The authors' code draws the factor of the inputs (B here, with the
inputs' fan) and begins that of the outputs at zero; drawn as here the same steps end nearer (docs/log.md).

By eq. 7 one weight in 2^(8-b) lies at an edge between two codes, which rounds to one of them, whichever W0 had; the
others begin at the start's codes, as all weights do by "fixed", "int" and "bf16". By "fixed", of 2 to 5 bits, weights
next to an edge lie at it, each on its own side (`lrqat.grid.Grid.from_fixed`): one in 2^(8-b) follows the sign of A B
at once, twice as many as by eq. 7, and none of the others until A B is a step of the fixed point.
"""

from __future__ import annotations

from math import ceil

import torch
from torch import Tensor, nn

from lrqat.errors import LrqatError
from lrqat.grid import Affine, Grid, Parts, Rows, to_latent
from lrqat.methods.base import WeightQuantizer
from lrqat.methods.gains import GainQuantizer
from lrqat.methods.place import passing
from lrqat.methods.products import product
from lrqat.methods.tiles import Pieces, Slopes, by_group, inside
from lrqat.ranges import fill
from lrqat.settings import DOWNCASTS


class LRQAT(GainQuantizer):
    """LR-QAT of one weight.

    Args:
        weight_OI: the pretrained weight, any float dtype; not kept.
        start: the grid's parts that it is rounded with at the start (`lrqat.ranges.start`).
        grid: any grid.
        rank: R.
        alpha: the adapter's multiplier is alpha / rank, in steps of the grid.
        downcast: how Phi0 is stored: "fixed", "eq7", "int" or "bf16".
        learn_scales: train gains on the parts; otherwise they stay as they are.
        generator: draws A.
    """

    phi: Tensor
    factored = True
    immutable = ("phi",)

    def __init__(
        self,
        weight_OI: Tensor,
        start: Parts,
        grid: Grid,
        *,
        rank: int,
        alpha: float,
        downcast: str,
        learn_scales: bool,
        generator: torch.Generator,
    ) -> None:
        rows, columns = weight_OI.shape
        super().__init__(grid, (rows, columns), start, learn_scales)
        if downcast not in DOWNCASTS:
            raise LrqatError(f"downcast: expected one of {', '.join(DOWNCASTS)}, got {downcast!r}")
        if not 1 <= rank <= min(rows, columns):
            raise LrqatError(f"rank: expected 1 to {min(rows, columns)} for a {rows}x{columns} weight, got {rank}")
        self.downcast = downcast
        self.multiplier = alpha / rank * grid.step
        self.register_buffer("phi", self._store(weight_OI, grid.affine(start)), persistent=False)
        a_OR = torch.empty(rows, rank)
        nn.init.kaiming_uniform_(a_OR, a=5**0.5, generator=generator)
        self.a_OR = nn.Parameter(a_OR.to(weight_OI.device))
        self.b_RI = nn.Parameter(torch.zeros(rank, columns, device=weight_OI.device))

    def _store(self, weight_OI: Tensor, affine: Affine) -> Tensor:
        """phi((W0 - m0) / s0), tile by tile."""

        def store(rows: slice) -> Tensor:
            x_KI = to_latent(weight_OI[rows], affine.rows(rows)).clamp_(*self.grid.ends)
            if self.downcast == "bf16":
                levels_KI, narrow_KI = self.grid.nearest(x_KI.clone()), x_KI.to(torch.bfloat16)
                back_KI = torch.nextafter(narrow_KI, levels_KI.to(torch.bfloat16))
                return torch.where(self.grid.nearest(narrow_KI.float()) == levels_KI, narrow_KI, back_KI)
            if self.downcast == "fixed":
                return self.grid.to_fixed(x_KI)
            if self.downcast == "eq7":
                origin, one = self._lattice
                return x_KI.sub_(origin).mul_(one).round_().clamp_(-128, 127).to(torch.int8)
            return self._pack(self.grid.encode(self.grid.nearest(x_KI)))

        return fill(weight_OI, store)

    def pieces(self, rows: Rows) -> Pieces:
        """(Phi0 as it is stored, c A B)."""
        a_KR, b_RI = self.a_OR[rows].detach() * self.multiplier, self.b_RI.detach()
        delta_KI = passing((len(a_KR), self.shape[1]), torch.float32, a_KR.device, "delta")
        return self._phi(rows), torch.mm(a_KR, b_RI, out=delta_KI)

    @property
    def _lattice(self) -> tuple[float, float]:
        """(origin, one) of eq. 7: Phi0 is i / one from the code in the middle of the range, i an int8."""
        begin, one = self.grid.fixed_point
        return ceil(begin), one

    def _phi(self, rows: Rows) -> Tensor:
        phi_KI = self.stored("phi", rows, self.a_OR.device)
        if self.downcast == "eq7":
            origin, one = self._lattice
            return phi_KI.float().div_(one).add_(origin)
        return self._unpack(phi_KI) if self.downcast == "int" else phi_KI

    @staticmethod
    def latent_of(grid: Grid, pieces: Pieces, affine: Affine) -> Tensor:
        """u = Phi0 + c A B."""
        phi_KI, delta_KI = pieces
        if phi_KI.dtype == torch.uint8:
            return delta_KI + grid.decode(phi_KI)
        if phi_KI.dtype == torch.int8:
            return delta_KI + grid.from_fixed(phi_KI)
        return delta_KI + phi_KI

    @staticmethod
    def slopes(grid: Grid, affine: Affine, latent_KI: Tensor, levels_KI: Tensor, grad_KI: Tensor) -> Slopes:
        """dL/du, and s and m under frozen levels."""
        du_KGC = by_group(inside(grid, latent_KI, grad_KI), grid) * affine.scale_OG[:, :, None]
        frozen = WeightQuantizer.slopes(grid, affine, latent_KI, levels_KI, grad_KI)
        return frozen._replace(large_KI=du_KGC.view_as(grad_KI))

    def frozen(self, rows: slice) -> Tensor:
        """Phi0, float32 [rows, I]."""
        phi_KI = self._phi(rows)
        return self.latent_of(self.grid, (phi_KI, torch.zeros(phi_KI.shape, device=phi_KI.device)), self.affine())

    def started(self, rows: slice) -> Tensor:
        """nearest(Phi0): LoftQ's adapters move no code."""
        return self.grid.nearest(self.frozen(rows))

    def large(self) -> dict[str, nn.Parameter]:
        """A and B."""
        return {"a_OR": self.a_OR, "b_RI": self.b_RI}

    def absorb(self, rows: Rows, large_KI: Tensor, grads: dict[str, Tensor]) -> None:
        """dA and dB of dL/du; products in its dtype."""
        a_KR, b_RI = self.a_OR[rows].detach().to(large_KI.dtype), self.b_RI.detach().to(large_KI.dtype)
        grads["a_OR"][rows] += (large_KI @ b_RI.T) * self.multiplier
        grads["b_RI"] += (a_KR.T @ large_KI) * self.multiplier

    def absorb_product(self, grad_TO: Tensor, x_TI: Tensor, scale_O: Tensor, grads: dict[str, Tensor]) -> None:
        """dA = c s * (dY^T (X B^T)),  dB = (dY (c s * A))^T X; products in the activations' dtype."""
        times_O1, b_RI = (self.multiplier * scale_O)[:, None], self.b_RI.detach().to(x_TI.dtype)
        grads["a_OR"] += product(product(x_TI, b_RI.T).T, grad_TO).T * times_O1
        ga_TR = product(grad_TO, (self.a_OR.detach() * times_O1).to(x_TI.dtype))
        grads["b_RI"] += product(ga_TR.T, x_TI)
