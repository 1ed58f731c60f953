"""What is done to every weight of a row tile, as pure functions.

    weigh           x = latent(pieces);  l = nearest(x);  W^ = s * l + m, into its place in the weight
    weigh_reaching  the same, and the least and the greatest x of each row; and the codes of l, if asked for
    weigh_codes     W^ of such codes
    differentiate   the same as weigh, and with g = dL/dW^:  dL/d(large) [K, I] in its place, dL/ds [K, G], dL/dm [K, G]
    dots            sums of dL/dY * Y over runs of tokens (`lrqat.methods.factored`)

Plain torch makes a dozen passes over the tile; torch.compile makes one of each function, with the same bits: nothing
is reordered but the sums of dL/ds and dL/dm, and those over tiles (dL/dB of groups), which are larger then.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lrqat.grid import Affine, Grid, dequantize
from lrqat.methods.factored import dots

EXACT_DIVISION = "eager_numerics.division_rounding"  # else Inductor divides approximately on a GPU, and `fuse` does not

Pieces = tuple[Tensor, ...]
Ends = tuple[Tensor, Tensor]  # the least and the greatest latent of each row, float32 [K]
PartSlopes = tuple[Tensor, Tensor | None]  # dL/ds [K, G], and dL/dm where the grid has an offset


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
    """The functions of a method on a grid; those of tiles take where the weight goes last, [K, I] in any float dtype.

    Attributes:
        weigh: (pieces, affine, weight).
        weigh_reaching: (pieces, affine, codes, weight) -> the rows' ends; codes is uint8 [K, I], to be filled, or None.
        weigh_codes: (codes, affine, weight).
        differentiate: (pieces, affine, dL/dW^, weight) -> dL/ds, dL/dm; overwrites dL/dW^ with `Slopes.large_KI`.
        dots: (dL/dY, Y), runs of tokens [N, C, O] -> their sums, float32 [N, O].
    """

    weigh: Callable[[Pieces, Affine, Tensor], None]
    weigh_reaching: Callable[[Pieces, Affine, Tensor | None, Tensor], Ends]
    weigh_codes: Callable[[Tensor, Affine, Tensor], None]
    differentiate: Callable[[Pieces, Affine, Tensor, Tensor], PartSlopes]
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

    def weigh(pieces: Pieces, affine: Affine, weight_KI: Tensor) -> None:
        weight_KI.copy_(dequantize(grid.nearest(latent_of(grid, pieces, affine)), affine))

    def weigh_reaching(pieces: Pieces, affine: Affine, codes_KI: Tensor | None, weight_KI: Tensor) -> Ends:
        latent_KI = latent_of(grid, pieces, affine)
        ends = latent_KI.amin(1), latent_KI.amax(1)
        levels_KI = grid.nearest(latent_KI)
        if codes_KI is not None:
            codes_KI.copy_(grid.encode(levels_KI))
        weight_KI.copy_(dequantize(levels_KI, affine))
        return ends

    def weigh_codes(codes_KI: Tensor, affine: Affine, weight_KI: Tensor) -> None:
        weight_KI.copy_(dequantize(grid.decode(codes_KI), affine))

    def differentiate(pieces: Pieces, affine: Affine, grad_KI: Tensor, weight_KI: Tensor) -> PartSlopes:
        latent_KI = latent_of(grid, pieces, affine)
        levels_KI = grid.nearest(latent_KI.clone())
        weight_KI.copy_(dequantize(levels_KI, affine))
        found = slopes(grid, affine, latent_KI, levels_KI, grad_KI.float())
        if found.large_KI is not None:  # else the method has nothing to absorb
            grad_KI.copy_(found.large_KI)
        return found.scale_KG, found.offset_KG

    functions = Kernels(weigh, weigh_reaching, weigh_codes, differentiate, dots)
    return Kernels(*[_compiled(function) for function in functions]) if compiled else functions


def _compiled(function: Any) -> Callable[..., Any]:
    """A kernel by torch.compile, as a code object of its own: by these recompilations are counted, and limited."""
    own = FunctionType(function.__code__.replace(), function.__globals__, function.__name__, None, function.__closure__)
    options: Any = {EXACT_DIVISION: True} if EXACT_DIVISION in torch._inductor.list_options() else None
    compiled = torch.compile(own, dynamic=False, options=options)

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
