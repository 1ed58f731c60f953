"""The seam of every method: a WeightQuantizer turns trained parameters into codes, in one place.

    latent   x_OI      real numbers in units of levels, whatever the method makes them of
    level    l = nearest level of the grid to x                 Grid.nearest: the only rounding site
    weight   w = s * l + m                                      lrqat.grid.dequantize

s and m are made of the grid's parts (`WeightQuantizer.parts`), which are small: autograd differentiates them.
The rest is large and differentiated by hand, in two steps: what is done to every weight (`latent_of`, `slopes`;
`lrqat.methods.tiles` runs them, compiled or not) and the matrix products around it (`pieces`, `absorb`).

All work goes row tile by row tile, so temporaries stay in cache and no second O x I tensor exists.
`QuantizedLinear` recomputes W in backward and hands the method dL/dW tile by tile: between forward and
backward a layer keeps its input and nothing else. Where a method's gradients do not need dL/dW (`factored`), it is not
formed; the layer keeps its output too. And where only one decoder layer keeps anything (checkpointing), its codes, a
byte a weight: what is rounded in the second forward pass is not rounded once more in backward. That pays where the
element-wise work is compiled; else writing and reading codes costs what it saves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lrqat.fused import FusedTensor
from lrqat.grid import Affine, Grid, Rows
from lrqat.methods.factored import clipped_slopes, scale_slopes
from lrqat.methods.place import passing
from lrqat.methods.products import product, product_dtype
from lrqat.methods.tiles import Kernels, Pieces, Slopes, by_group, kernels
from lrqat.pages import give_back
from lrqat.ranges import row_tiles, tile_weights


class WeightQuantizer(nn.Module):
    """Base of every method. Subclasses define `pieces`, `latent_of`, `slopes`, `parts`, `large` and `absorb`.

    Attributes:
        grid: the grid of the codes.
        shape: (O, I) of the weight.
        name: the weight's parameter name in checkpoints, once it is part of a model.
        compiled: `latent_of` and `slopes` run through torch.compile.
        factored: dL/ds and dL/dm are those under frozen levels, and `absorb_product` gives the rest: with one s a row,
            dL/dW is not formed.
        checkpointed: forward runs again just before backward.
        immutable: names of the tensors of the weight's size that never change (`stored` reads them).
        mapped: they lie in a mapped file (`lrqat.offload`).
    """

    name = "weight"
    compiled = False
    factored = False
    checkpointed = False
    immutable: tuple[str, ...] = ()
    mapped = False

    def __init__(self, grid: Grid, shape: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid
        self.shape = shape

    def pieces(self, rows: Rows) -> Pieces:
        """Tensors [rows, I] that the latent weights are made of."""
        raise NotImplementedError

    @staticmethod
    def latent_of(grid: Grid, pieces: Pieces, affine: Affine) -> Tensor:
        """Float32 [rows, I]: the weight in units of levels, before rounding; pieces and `affine` are of these rows."""
        raise NotImplementedError

    @staticmethod
    def slopes(grid: Grid, affine: Affine, latent_KI: Tensor, levels_KI: Tensor, grad_KI: Tensor) -> Slopes:
        """Gradients of a row tile from dL/dW^, float32 [rows, I]; by default those of s and m under frozen levels."""
        scale_KG = by_group(grad_KI * levels_KI, grid).sum(2)
        return Slopes(None, scale_KG, None if affine.offset_OG is None else by_group(grad_KI, grid).sum(2))

    def stored(self, name: str, rows: Rows, device: torch.device) -> Tensor:
        """Rows of a frozen tensor, wherever it lies, on the device of the rest."""
        tensor: Tensor = getattr(self, name)
        there = rows if isinstance(rows, slice) else rows.to(tensor.device)
        return tensor[there].to(device, non_blocking=True)

    def release(self) -> None:
        """Let go of the memory that frozen tensors in a mapped file take up; it is read again when it is needed."""
        for name in self.immutable if self.mapped else ():
            give_back(getattr(self, name))

    def parts(self) -> dict[str, Tensor]:
        """The grid's parts, float32 with the exact values of the wire; differentiable."""
        raise NotImplementedError

    def large(self) -> dict[str, nn.Parameter]:
        """Parameters that `pieces` reads, by name: `absorb` differentiates them. By default none."""
        return {}

    def absorb(self, rows: Rows, large_KI: Tensor, grads: dict[str, Tensor]) -> None:
        """Add to `grads`, which are those of `large()` by name, what `Slopes.large_KI` of these rows gives."""
        raise NotImplementedError

    def absorb_product(self, grad_TO: Tensor, x_TI: Tensor, scale_O: Tensor, grads: dict[str, Tensor]) -> None:
        """Add to `grads` what all of dL/du = s * (dY^T X) gives, as if nothing were clipped. By default nothing."""

    def latent(self, rows: Rows, affine: Affine) -> Tensor:
        """Float32 [rows, I]; `affine` is of these rows."""
        return self.latent_of(self.grid, self.pieces(rows), affine)

    def kernels(self) -> Kernels:
        """What is done to every weight of a row tile, compiled or not."""
        return kernels(self.latent_of, self.slopes, self.grid, self.compiled)

    def affine(self) -> Affine:
        """s and m of the forward pass; differentiable."""
        return self.grid.affine(self.parts())

    def tiles(self, affine: Affine) -> list[slice]:
        """Row slices that keep one tile's temporaries in cache, or a GPU busy; `affine` lies where the work is done."""
        return row_tiles(*self.shape, tile_weights(affine.scale_OG.device))

    def calls(self, affine: Affine) -> list[slice]:
        """Row slices of one call of a kernel: compiled ones have no temporaries but what `pieces` are made in."""
        return row_tiles(*self.shape, tile_weights(affine.scale_OG.device, self.compiled))

    @torch.no_grad()
    def levels(self, rows: slice, affine: Affine) -> Tensor:
        """Float32 [rows, I]; `affine` is of the whole weight."""
        return self.grid.nearest(self.latent(rows, affine.rows(rows)))

    @torch.no_grad()
    def weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight of the forward pass, [O, I], built tile by tile."""
        affine = self.affine()
        weight_OI = torch.empty(self.shape, dtype=dtype, device=affine.scale_OG.device)
        self.weigh(affine, weight_OI)
        return weight_OI

    def weigh(self, affine: Affine, weight_OI: Tensor) -> None:
        """Fill in the weight."""
        weigh = self.kernels().weigh
        for rows in self.calls(affine):
            weigh(self.pieces(rows), affine.rows(rows), weight_OI[rows])

    @torch.no_grad()
    def fuse(self) -> FusedTensor:
        """Codes and parts, on the CPU."""
        parts = self.parts()
        affine = self.grid.affine(parts)
        codes_OI = torch.cat([self.grid.encode(self.levels(rows, affine)) for rows in self.tiles(affine)])
        return FusedTensor.make(codes_OI, parts, self.grid)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T + bias, with gradients for x, bias and this method's parameters."""
        affine = self.affine()
        large = [p for p in self.large().values() if p.requires_grad]
        return QuantizedLinear.apply(x, bias, self, affine.scale_OG, affine.offset_OG, *large)


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
        """[..., I] -> [..., O]; keeps x and the small s and m, and the output where dL/dW is not formed."""
        affine = Affine(scale_OG, offset_OG)
        ctx.quantizer = quantizer
        exact = bias is None or x.dtype == torch.float32  # a narrow Y has lost X W^T where the bias is large
        ctx.factored = quantizer.factored and scale_OG.shape[1] == 1 and exact
        codes_OI = ends = None
        weight_OI = passing(quantizer.shape, x.dtype, x.device)
        if ctx.factored and large and quantizer.checkpointed and quantizer.compiled:
            codes_OI = torch.empty(quantizer.shape, dtype=torch.uint8, device=scale_OG.device)
            ends = weigh_reaching(quantizer, affine, codes_OI, weight_OI)
        else:
            quantizer.weigh(affine, weight_OI)
        output = product(x.reshape(-1, x.shape[-1]), weight_OI.T, bias).view(*x.shape[:-1], quantizer.shape[0])
        needs_output = ctx.factored and any(ctx.needs_input_grad[3:5])
        kept = (codes_OI, *(ends or (None, None)))
        ctx.save_for_backward(x, bias, scale_OG, offset_OG, output if needs_output else None, *kept)
        return output

    @staticmethod
    def backward(ctx: Any, *output_grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, bias, s, m and the large parameters."""
        x, bias, scale_OG, offset_OG, output, codes_OI, *ends = ctx.saved_tensors
        quantizer: WeightQuantizer = ctx.quantizer
        affine = Affine(scale_OG, offset_OG)
        rows, columns = quantizer.shape
        grad_TO, x_TI = output_grads[0].reshape(-1, rows), x.reshape(-1, columns)
        large = {name: torch.zeros_like(p) for name, p in quantizer.large().items() if p.requires_grad}
        scale = offset = None
        weight_OI = passing(quantizer.shape, x.dtype, x.device)
        if ctx.factored:
            if output is not None:
                dots = quantizer.kernels().dots
                scale, offset = scale_slopes(grad_TO, x_TI, output.reshape(-1, rows), bias, affine, dots)
            if codes_OI is not None:
                weigh_codes(quantizer, affine, codes_OI, weight_OI)
            elif large:
                ends = weigh_reaching(quantizer, affine, None, weight_OI)
            else:
                quantizer.weigh(affine, weight_OI)
            if large:
                quantizer.absorb_product(grad_TO, x_TI, scale_OG[:, 0], large)
                absorb_clipped(quantizer, affine, ends, grad_TO, x_TI, large)
        elif large or any(ctx.needs_input_grad[3:5]):
            scale = torch.empty_like(scale_OG)
            offset = None if offset_OG is None else torch.empty_like(offset_OG)
            differentiate(quantizer, affine, grad_TO, x_TI, weight_OI, large, scale, offset)
        else:
            quantizer.weigh(affine, weight_OI)
        grad_x = product(grad_TO, weight_OI).view_as(x) if ctx.needs_input_grad[0] else None
        grad_bias = grad_TO.sum(0) if ctx.needs_input_grad[1] else None
        scale, offset = (g if n else None for g, n in zip((scale, offset), ctx.needs_input_grad[3:5], strict=True))
        return grad_x, grad_bias, None, scale, offset, *large.values()


def differentiate(
    quantizer: WeightQuantizer,
    affine: Affine,
    grad_TO: Tensor,
    x_TI: Tensor,
    weight_OI: Tensor,
    large: dict[str, Tensor],
    scale: Tensor,
    offset: Tensor | None,
) -> None:
    """Fill in the weight again, and by the way all gradients, from dL/dW one row tile at a time."""
    kernel, dtype = quantizer.kernels().differentiate, product_dtype(x_TI)
    for rows in quantizer.calls(affine):
        slopes_KI = passing((rows.stop - rows.start, x_TI.shape[1]), dtype, x_TI.device, "slopes")
        product(grad_TO[:, rows].T, x_TI, out=slopes_KI)  # dL/dW, of which the kernel makes what is to be absorbed
        scale[rows], offset_KG = kernel(quantizer.pieces(rows), affine.rows(rows), slopes_KI, weight_OI[rows])
        if large:
            quantizer.absorb(rows, slopes_KI, large)
        if offset is not None and offset_KG is not None:
            offset[rows] = offset_KG


def weigh_reaching(
    quantizer: WeightQuantizer, affine: Affine, codes_OI: Tensor | None, weight_OI: Tensor
) -> tuple[Tensor, Tensor]:
    """Fill in the weight, and the codes if there is a place for them; the least and the greatest latent of each row."""
    kernel, found = quantizer.kernels().weigh_reaching, []
    for rows in quantizer.calls(affine):
        codes_KI = None if codes_OI is None else codes_OI[rows]
        found.append(kernel(quantizer.pieces(rows), affine.rows(rows), codes_KI, weight_OI[rows]))
    least, greatest = zip(*found, strict=True)
    return torch.cat(least), torch.cat(greatest)


def weigh_codes(quantizer: WeightQuantizer, affine: Affine, codes_OI: Tensor, weight_OI: Tensor) -> None:
    """Fill in the weight of codes."""
    kernel = quantizer.kernels().weigh_codes
    for rows in quantizer.calls(affine):
        kernel(codes_OI[rows], affine.rows(rows), weight_OI[rows])


def absorb_clipped(
    quantizer: WeightQuantizer,
    affine: Affine,
    ends: Sequence[Tensor],
    grad_TO: Tensor,
    x_TI: Tensor,
    large: dict[str, Tensor],
) -> None:
    """Take off again what `absorb_product` added for clipped weights. Rows that hold one are looked at again: few."""
    low, high = quantizer.grid.bounds
    least_O, greatest_O = ends
    clipped_C = ((least_O <= low) | (greatest_O >= high)).nonzero()[:, 0]
    for rows in clipped_C.split(quantizer.tiles(affine)[0].stop) if len(clipped_C) else ():
        part = affine.rows(rows)
        latent_CI = quantizer.latent(rows, part)
        quantizer.absorb(rows, -clipped_slopes(quantizer.grid, part, latent_CI, grad_TO[:, rows], x_TI), large)
