"""What is done to every weight of a row tile, as pure functions.

    weigh           x = latent(pieces);  l = nearest(x);  W^ = s * l + m
    weigh_counting  the same, and how many x are clipped
    differentiate   the same, and with g = dL/dW^:  dL/d(large) [K, I], dL/ds [K, G], dL/dm [K, G]
    dots            of some tokens, sum of dL/dY * Y (`lrqat.methods.factored`)

Plain torch makes a dozen passes over the tile; torch.compile makes one of each function, with the same bits: nothing
is reordered but the sums of dL/ds and dL/dm.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lrqat.grid import Affine, Grid, dequantize
from lrqat.methods.factored import dots

Pieces = tuple[Tensor, ...]


class Slopes(NamedTuple):
    """Gradients from one row tile.

    Attributes:
        large_KI: what `WeightQuantizer.absorb` makes gradients of the large parameters of; None where there are none.
        scale_KG: dL/ds.
        offset_KG: dL/dm; None where the grid has no offset.
    """

    large_KI: Tensor | None
    scale_KG: Tensor
    offset_KG: Tensor | None


LatentOf = Callable[[Grid, Pieces, Affine], Tensor]
SlopesOf = Callable[[Grid, Affine, Tensor, Tensor, Tensor], Slopes]


class Kernels(NamedTuple):
    """The functions of a method on a grid; those of tiles return the weight in the given dtype first.

    Attributes:
        weigh: (pieces, affine, dtype).
        weigh_counting: (pieces, affine, dtype); and the number of clipped weights, int64.
        differentiate: (pieces, affine, dL/dW^, dtype); and the gradients.
        dots: (dL/dY, Y), of some tokens, -> float32 [O].
    """

    weigh: Callable[[Pieces, Affine, torch.dtype], Tensor]
    weigh_counting: Callable[[Pieces, Affine, torch.dtype], tuple[Tensor, Tensor]]
    differentiate: Callable[[Pieces, Affine, Tensor, torch.dtype], tuple[Tensor, Slopes]]
    dots: Callable[[Tensor, Tensor], Tensor]


@lru_cache
def kernels(latent_of: LatentOf, slopes: SlopesOf, grid: Grid, compiled: bool) -> Kernels:
    """The functions of a method on a grid.

    Args:
        latent_of: (grid, pieces, affine) -> latent weights, float32 [K, I].
        slopes: (grid, affine, latent weights, levels, dL/dW^ in float32) -> gradients.
        grid: of the codes.
        compiled: by torch.compile, at the first call: some ten seconds.
    """

    def weigh(pieces: Pieces, affine: Affine, dtype: torch.dtype) -> Tensor:
        levels_KI = grid.nearest(latent_of(grid, pieces, affine))
        return dequantize(levels_KI, affine).to(dtype)

    def weigh_counting(pieces: Pieces, affine: Affine, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        latent_KI = latent_of(grid, pieces, affine)
        low, high = grid.bounds
        clipped = ((latent_KI <= low) | (latent_KI >= high)).sum()
        return dequantize(grid.nearest(latent_KI), affine).to(dtype), clipped

    def differentiate(pieces: Pieces, affine: Affine, grad_KI: Tensor, dtype: torch.dtype) -> tuple[Tensor, Slopes]:
        latent_KI = latent_of(grid, pieces, affine)
        levels_KI = grid.nearest(latent_KI.clone())
        weight_KI = dequantize(levels_KI, affine).to(dtype)
        return weight_KI, slopes(grid, affine, latent_KI, levels_KI, grad_KI.float())

    functions = Kernels(weigh, weigh_counting, differentiate, dots)
    return Kernels(*[_compiled(function) for function in functions]) if compiled else functions


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel by torch.compile."""
    compiled = torch.compile(function, dynamic=False)

    def call(*given: Any) -> Any:
        any_rows(*(value for one in given for value in (one if isinstance(one, tuple) else (one,))))
        return compiled(*given)

    return call


def any_rows(*values: Any) -> None:
    """One compilation for any number of rows; columns and groups are constants to it, else nothing is vectorized."""
    for value in values:
        if isinstance(value, Tensor):
            torch._dynamo.maybe_mark_dynamic(value, 0)


def by_group(values_KI: Tensor, grid: Grid) -> Tensor:
    """[K, I] -> [K, G, columns of a group]."""
    return values_KI.unflatten(1, (-1, grid.columns_per_group(values_KI.shape[1])))


def inside(grid: Grid, latent_KI: Tensor, values_KI: Tensor) -> Tensor:
    """The values where the latent is not clipped, else 0; of dL/dW^: the derivative of the clip."""
    masked: Tensor = torch.ops.aten.hardtanh_backward(values_KI, latent_KI, *grid.bounds)
    return masked
