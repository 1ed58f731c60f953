"""LR-QAT (arXiv 2406.06385): low-rank adapters inside the rounding of frozen weights.

    W^ = s * clip(round(Phi0 + (alpha/r) A B), -2^(b-1), 2^(b-1)-1)          (eq. 8)
    Phi0 = phi(clip(W0 / s0))  frozen, in one of three downcasts phi:
        fixed    Q_b.(8-b) fixed point in an int8: b bits of integer, 8-b of fraction        (eq. 7)
        int      the b-bit codes alone, two to a byte up to 4 bits
        bf16     bfloat16

Trained: A [O, R] (Kaiming), B [R, I] (zero), and s. With u = Phi0 + (alpha/r) A B, c = clip(round(u)), the
straight-through estimator (round' = 1, clip' = 1 inside the range, 0 outside) gives

    dL/du = dL/dW * s * [u inside],   dA = (alpha/r) dL/du B^T,   dB = (alpha/r) A^T dL/du,
    ds    = sum over the group of dL/dW * c                            (Phi0 is frozen at s0)

Scales are trained as s = wire(s0 * gain): Adam's step on a gain is relative, so one learning rate fits
layers whose scales differ by orders of magnitude. wire() is passed by straight through.

Unlike the paper's eq. 7, the fraction of the fixed point is kept strictly inside its code (at most
2^(7-b) - 1 steps away): rounding W0/s0 to a fraction first and to a code later would move codes near .5, and
training would start beside its own start. "fixed" and "int" always round to exactly the start's codes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lrqat.errors import LrqatError
from lrqat.grid import Grid, expand_groups
from lrqat.methods.base import WeightQuantizer
from lrqat.ranges import row_tiles
from lrqat.settings import DOWNCASTS


class LRQAT(WeightQuantizer):
    """LR-QAT of one weight.

    Args:
        weight_OI: the pretrained weight, any float dtype; not kept.
        scales_OG: s0, float32 wire scales.
        grid: a symmetric grid.
        rank: R.
        alpha: the adapter's multiplier is alpha / rank.
        downcast: how Phi0 is stored: "fixed", "int" or "bf16".
        learn_scales: train the gains; otherwise s = s0.
        generator: draws A.
    """

    phi: Tensor
    start_scales_OG: Tensor

    def __init__(
        self,
        weight_OI: Tensor,
        scales_OG: Tensor,
        grid: Grid,
        *,
        rank: int,
        alpha: float,
        downcast: str,
        learn_scales: bool,
        generator: torch.Generator,
    ) -> None:
        rows, columns = weight_OI.shape
        super().__init__(grid, (rows, columns))
        if downcast not in DOWNCASTS:
            raise LrqatError(f"downcast: expected one of {', '.join(DOWNCASTS)}, got {downcast!r}")
        if not 1 <= rank <= min(rows, columns):
            raise LrqatError(f"rank: expected 1 to {min(rows, columns)} for a {rows}x{columns} weight, got {rank}")
        self.downcast = downcast
        self.multiplier = alpha / rank
        self.register_buffer("phi", self._store(weight_OI, scales_OG), persistent=False)
        self.register_buffer("start_scales_OG", scales_OG, persistent=False)
        a_OR = torch.empty(rows, rank)
        nn.init.kaiming_uniform_(a_OR, a=5**0.5, generator=generator)
        self.a_OR = nn.Parameter(a_OR.to(weight_OI.device))
        self.b_RI = nn.Parameter(torch.zeros(rank, columns, device=weight_OI.device))
        self.gain_OG = nn.Parameter(torch.ones_like(scales_OG), requires_grad=learn_scales)

    def _store(self, weight_OI: Tensor, scales_OG: Tensor) -> Tensor:
        """phi(W0 / s0), tile by tile."""
        tiles = []
        for rows in row_tiles(*self.shape):
            x_KI = weight_OI[rows].float() / expand_groups(scales_OG[rows], self.shape[1])
            x_KI.clamp_(-self.grid.midpoint, self.grid.midpoint - 1)
            codes_KI = self.round(x_KI)
            if self.downcast == "bf16":
                tiles.append(x_KI.to(torch.bfloat16))
            elif self.downcast == "fixed":
                one = 1 << (8 - self.grid.bits)
                most = max(one // 2 - 1, 0)
                fraction_KI = x_KI.sub_(codes_KI).mul_(one).round_().clamp_(-most, most)
                tiles.append((codes_KI * one + fraction_KI).to(torch.int8))
            else:
                tiles.append(self._pack((codes_KI + self.grid.midpoint).to(torch.uint8)))
        return torch.cat(tiles)

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

    def frozen(self, rows: slice) -> Tensor:
        """Phi0, float32 [rows, I]."""
        if self.downcast == "int":
            return self._unpack(self.phi[rows]).float().sub_(self.grid.midpoint)
        return self.phi[rows].float().mul_(2.0 ** (self.grid.bits - 8) if self.downcast == "fixed" else 1.0)

    def latent(self, rows: slice) -> Tensor:
        """u = Phi0 + (alpha/r) A B."""
        return self.frozen(rows).addmm_(self.a_OR[rows].detach(), self.b_RI.detach(), alpha=self.multiplier)

    def scales(self, rows: slice) -> Tensor:
        """s = wire(s0 * gain)."""
        return self.grid.to_wire(self.start_scales_OG[rows] * self.gain_OG[rows].detach())

    def backward_rows(
        self, grad_KI: Tensor, latent_KI: Tensor, codes_KI: Tensor, rows: slice, grads: dict[str, Tensor]
    ) -> None:
        """The equations of the module's docstring, for one row tile."""
        count, columns = grad_KI.shape
        grouped = (count, self.start_scales_OG.shape[1], -1)
        if "gain_OG" in grads:
            ds_KG = (grad_KI * codes_KI).view(grouped).sum(2)
            grads["gain_OG"][rows] += ds_KG * self.start_scales_OG[rows]
        low, high = -self.grid.midpoint - 0.5, self.grid.midpoint - 0.5
        grad_KI = torch.ops.aten.hardtanh_backward(grad_KI, latent_KI, low, high)  # the derivative of the clip
        du_KI = grad_KI.view(grouped).mul_(self.scales(rows)[:, :, None]).view(count, columns)
        grads["a_OR"][rows].addmm_(du_KI, self.b_RI.detach().T, alpha=self.multiplier)
        grads["b_RI"].addmm_(self.a_OR[rows].detach().T, du_KI, alpha=self.multiplier)
