"""The seam of every method: a WeightQuantizer turns trained parameters into codes, in one place.

    latent   x_OI      real numbers in units of levels, whatever the method makes them of
    level    l = nearest level of the grid to x                 Grid.nearest: the only rounding site
    weight   w = s * l + m                                      lrqat.grid.dequantize

s and m are made of the grid's parts (`WeightQuantizer.parts`), which are small: autograd differentiates them.
The rest is large and differentiated by hand.

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
from lrqat.grid import Affine, Grid, dequantize
from lrqat.ranges import row_tiles


class WeightQuantizer(nn.Module):
    """Base of every method. Subclasses define `latent`, `parts`, `large` and `backward_rows`.

    Attributes:
        grid: the grid of the codes.
        shape: (O, I) of the weight.
        name: the weight's parameter name in checkpoints, once it is part of a model.
    """

    name = "weight"

    def __init__(self, grid: Grid, shape: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid
        self.shape = shape

    def latent(self, rows: slice, affine: Affine) -> Tensor:
        """Float32 [rows, I]: the weight in units of levels, before rounding; `affine` is of these rows."""
        raise NotImplementedError

    def parts(self) -> dict[str, Tensor]:
        """The grid's parts, float32 with the exact values of the wire; differentiable."""
        raise NotImplementedError

    def large(self) -> dict[str, nn.Parameter]:
        """Parameters that `latent` reads, by name: `backward_rows` differentiates them."""
        raise NotImplementedError

    def backward_rows(self, tile: Tile, grads: dict[str, Tensor]) -> None:
        """Add what one row tile of dL/dW gives to `grads`: those of `large()` by name, and of "scale" and "offset".

        dL/ds = sum dL/dW * level and dL/dm = sum dL/dW of each group are in "scale" and "offset" already.
        """
        raise NotImplementedError

    def affine(self) -> Affine:
        """s and m of the forward pass; differentiable."""
        return self.grid.affine(self.parts())

    def tiles(self) -> list[slice]:
        """Row slices that keep one tile's temporaries in cache."""
        return row_tiles(*self.shape)

    @torch.no_grad()
    def levels(self, rows: slice, affine: Affine) -> Tensor:
        """Float32 [rows, I]; `affine` is of the whole weight."""
        return self.grid.nearest(self.latent(rows, affine.rows(rows)))

    @torch.no_grad()
    def weight(self, dtype: torch.dtype = torch.float32, affine: Affine | None = None) -> Tensor:
        """The weight of the forward pass, [O, I], built tile by tile."""
        affine = affine or self.affine()
        weight_OI = torch.empty(self.shape, dtype=dtype, device=affine.scale_OG.device)
        for rows in self.tiles():
            weight_OI[rows] = dequantize(self.levels(rows, affine), affine.rows(rows))
        return weight_OI

    @torch.no_grad()
    def fuse(self) -> FusedTensor:
        """Codes and parts, on the CPU."""
        parts = self.parts()
        affine = self.grid.affine(parts)
        codes_OI = torch.cat([self.grid.encode(self.levels(rows, affine)) for rows in self.tiles()])
        return FusedTensor.make(codes_OI, parts, self.grid)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T + bias, with gradients for x, bias and this method's parameters."""
        affine = self.affine()
        large = [p for p in self.large().values() if p.requires_grad]
        return QuantizedLinear.apply(x, bias, self, affine.scale_OG, affine.offset_OG, *large)


class Tile:
    """One row tile in backward.

    Attributes:
        rows: which rows of the weight these are.
        affine: s and m of these rows.
        grad_KI: dL/dW, float32; may be overwritten.
        latent_KI: the latent weights.
        levels_KI: their levels.
    """

    def __init__(self, rows: slice, affine: Affine, grad_KI: Tensor, latent_KI: Tensor, levels_KI: Tensor) -> None:
        self.rows = rows
        self.affine = affine
        self.grad_KI = grad_KI
        self.latent_KI = latent_KI
        self.levels_KI = levels_KI

    def groups(self, values_KI: Tensor) -> Tensor:
        """[K, I] -> [K, G, columns of a group]."""
        return values_KI.view(len(values_KI), self.affine.scale_OG.shape[1], -1)

    def inside(self, grid: Grid) -> Tensor:
        """dL/dW where the latent is not clipped, else 0: the derivative of the clip. Overwrites nothing."""
        masked: Tensor = torch.ops.aten.hardtanh_backward(self.grad_KI, self.latent_KI, *grid.bounds)
        return masked


class QuantizedLinear(torch.autograd.Function):
    """F.linear with a weight that is computed, used and dropped, in forward and again in backward.

    dX = dY W;  dL/dW = dY^T X, formed one row tile at a time and handed to the method at once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        quantizer: WeightQuantizer,
        scale_OG: Tensor,
        offset_OG: Tensor | None,
        *large: Tensor,
    ) -> Tensor:
        """[..., I] -> [..., O]; keeps x and the small s and m."""
        ctx.save_for_backward(x, scale_OG, offset_OG)
        ctx.quantizer = quantizer
        ctx.has_bias = bias is not None
        return F.linear(x, quantizer.weight(x.dtype, Affine(scale_OG, offset_OG)), bias)

    @staticmethod
    def backward(ctx: Any, *output_grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, bias, s and m; those of the large parameters come from `backward_rows`."""
        x, scale_OG, offset_OG = ctx.saved_tensors
        quantizer: WeightQuantizer = ctx.quantizer
        affine = Affine(scale_OG, offset_OG)
        grad_TO = output_grads[0].reshape(-1, quantizer.shape[0])
        x_TI = x.reshape(-1, quantizer.shape[1])
        weight_OI = torch.empty(quantizer.shape, dtype=x.dtype, device=x.device)
        large = {name: p for name, p in quantizer.large().items() if p.requires_grad}
        grads = {name: torch.zeros_like(p) for name, p in large.items()}
        if ctx.needs_input_grad[3]:
            grads["scale"] = torch.zeros_like(scale_OG)
        if ctx.needs_input_grad[4]:
            grads["offset"] = torch.zeros_like(offset_OG)
        for rows in quantizer.tiles():
            part = affine.rows(rows)
            latent_KI = quantizer.latent(rows, part)
            levels_KI = quantizer.grid.nearest(latent_KI.clone())
            weight_OI[rows] = dequantize(levels_KI, part)
            if not grads:
                continue
            tile = Tile(rows, part, (grad_TO[:, rows].T @ x_TI).float(), latent_KI, levels_KI)
            if "scale" in grads:
                grads["scale"][rows] = tile.groups(tile.grad_KI * levels_KI).sum(2)
            if "offset" in grads:
                grads["offset"][rows] = tile.groups(tile.grad_KI).sum(2)
            quantizer.backward_rows(tile, grads)
        grad_x = (grad_TO @ weight_OI).view_as(x) if ctx.needs_input_grad[0] else None
        grad_bias = grad_TO.sum(0) if ctx.has_bias and ctx.needs_input_grad[1] else None
        scale, offset = grads.pop("scale", None), grads.pop("offset", None)
        return grad_x, grad_bias, None, scale, offset, *grads.values()
