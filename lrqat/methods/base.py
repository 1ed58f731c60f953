"""The seam of every method: a WeightQuantizer turns trained parameters into codes, in one place.

    latent   x_OI        real numbers in units of codes, whatever the method makes them of
    codes    q = clip(round(x) + z, 0, 2^b - 1)                      the only rounding site
    weight   w = s * (q - z)                                         lrqat.grid.dequantize

All work goes row tile by row tile, so temporaries stay in cache and no second O x I tensor exists.
`QuantizedLinear` recomputes W in backward and hands the method dL/dW tile by tile: between forward and
backward a layer keeps its input and nothing else.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrqat.fused import FusedTensor
from lrqat.grid import Grid, dequantize
from lrqat.ranges import row_tiles


class WeightQuantizer(nn.Module):
    """Base of every method. Subclasses define `latent`, `scales` and `backward_rows`.

    Attributes:
        grid: the grid of the codes.
        shape: (O, I) of the weight.
    """

    def __init__(self, grid: Grid, shape: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid
        self.shape = shape

    def latent(self, rows: slice) -> Tensor:
        """Float32 [rows, I]: the weight in units of codes, before rounding."""
        raise NotImplementedError

    def scales(self, rows: slice) -> Tensor:
        """Float32 [rows, G]: scales with the exact values of the wire."""
        raise NotImplementedError

    def backward_rows(
        self, grad_KI: Tensor, latent_KI: Tensor, codes_KI: Tensor, rows: slice, grads: dict[str, Tensor]
    ) -> None:
        """Add what one row tile of dL/dW gives to `grads`, by parameter name.

        Args:
            grad_KI: dL/dW of the tile, float32; may be overwritten.
            latent_KI: the tile's latent weights.
            codes_KI: the tile's signed codes, `round(latent_KI)`.
            rows: which rows of the weight these are.
            grads: gradients of `trained()`, same names and shapes, to be added to.
        """
        raise NotImplementedError

    def trained(self) -> dict[str, Tensor]:
        """Parameters that require a gradient, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def round(self, latent_KI: Tensor) -> Tensor:
        """clip(round(x)), float32, signed: q - z. Nothing else in lrqat rounds a weight in training."""
        low = -self.grid.midpoint
        return latent_KI.round().clamp_(low, low + self.grid.levels - 1)

    def codes(self, rows: slice) -> Tensor:
        """uint8 [rows, I], unsigned."""
        return (self.round(self.latent(rows)) + self.grid.midpoint).to(torch.uint8)

    def tiles(self) -> list[slice]:
        """Row slices that keep one tile's temporaries in cache."""
        return row_tiles(*self.shape)

    @torch.no_grad()
    def weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight of the forward pass, [O, I], built tile by tile."""
        weight_OI = torch.empty(self.shape, dtype=dtype, device=self.scales(slice(0, 1)).device)
        for rows in self.tiles():
            weight_OI[rows] = dequantize(self.round(self.latent(rows)), self.scales(rows), 0)
        return weight_OI

    @torch.no_grad()
    def fuse(self) -> FusedTensor:
        """Codes and wire scales, on the CPU."""
        codes_OI = torch.cat([self.codes(rows) for rows in self.tiles()])
        scales_OG = self.scales(slice(None)).to(torch.float16)
        return FusedTensor(codes_OI.cpu(), scales_OG.cpu(), None, self.grid)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T + bias, with gradients for x, bias and this method's parameters."""
        return QuantizedLinear.apply(x, bias, self, *self.trained().values())


class QuantizedLinear(torch.autograd.Function):
    """F.linear with a weight that is computed, used and dropped, in forward and again in backward.

    dX = dY W;  dL/dW = dY^T X, formed one row tile at a time and handed to the method at once.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, quantizer: WeightQuantizer, *parameters: Tensor) -> Tensor:
        """[..., I] -> [..., O]; keeps x alone."""
        ctx.save_for_backward(x)
        ctx.quantizer = quantizer
        ctx.has_bias = bias is not None
        return F.linear(x, quantizer.weight(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x and bias; those of the parameters come from `backward_rows`."""
        (x,) = ctx.saved_tensors
        quantizer: WeightQuantizer = ctx.quantizer
        grad_TO = grads[0].reshape(-1, quantizer.shape[0])
        x_TI = x.reshape(-1, quantizer.shape[1])
        weight_OI = torch.empty(quantizer.shape, dtype=x.dtype, device=x.device)
        parameter_grads = {name: torch.zeros_like(p) for name, p in quantizer.trained().items()}
        for rows in quantizer.tiles():
            latent_KI = quantizer.latent(rows)
            codes_KI = quantizer.round(latent_KI)
            weight_OI[rows] = dequantize(codes_KI, quantizer.scales(rows), 0)
            if parameter_grads:
                grad_KI = (grad_TO[:, rows].T @ x_TI).float()
                quantizer.backward_rows(grad_KI, latent_KI, codes_KI, rows, parameter_grads)
        grad_x = (grad_TO @ weight_OI).view_as(x) if ctx.needs_input_grad[0] else None
        grad_bias = grad_TO.sum(0) if ctx.has_bias and ctx.needs_input_grad[1] else None
        return grad_x, grad_bias, None, *parameter_grads.values()
