"""Gradients without dL/dW: what a step costs with LoRA, for grids of one s and m a row.

    W^ = s * l + m,  l = nearest(u),  u = Phi0 + c A B,  c = alpha/r;      Y = X W^T + b,  g = dL/dY  [T, O]

dL/dW = g^T X is a third product of the size of the forward pass. With one s a row it need not be formed:

    dL/du = s * (g^T X) where u is inside          dA = c s * (g^T (X B^T)),   dB = c ((g (s * A))^T X)
    ds    = sum over i of (g^T X) * l              = (sum over t of g * (Y - b) - m * dm) / s
    dm    = sum over i of (g^T X)                  = sum over t of g * (sum over i of X)

Y stands for X W^T, so it is kept for backward. Few weights are clipped (at most 1e-5 of SmolLM2's); of those, dL/du is
formed one by one and taken off again, so the mask of the straight-through estimator holds exactly.

With groups, s stays inside the sum over i: Z_g = X_g B_g^T for every group makes T * O * R * G products for dA, as many
for dB, and ds takes T * O * I of its own, since no group's share of Y is there; s has full rank, so no other split is
shorter. At R = 32 and groups of 32 each is what g^T X takes, of which all three are made: row tiles of dL/dW are the
cheapest exact form (`lrqat.methods.base`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lrqat.grid import Affine, Grid
from lrqat.methods.products import product

RUN = 16  # tokens whose g * Y are added up while they are in registers
AT_ONCE = 1 << 20  # numbers of a float32 temporary [T, O]
GPU_AT_ONCE = 1 << 24
SPARSE = 256  # weights for each clipped one, above which clipped ones are looked at one by one


def dots(grad_NCO: Tensor, output_NCO: Tensor) -> Tensor:
    """Sum of g * Y over C, float32 [N, O]."""
    return (grad_NCO.float() * output_NCO.float()).sum(1)


def scale_slopes(
    grad_TO: Tensor,
    x_TI: Tensor,
    output_TO: Tensor,
    bias_O: Tensor | None,
    affine: Affine,
    dots: Callable[[Tensor, Tensor], Tensor],
) -> tuple[Tensor, Tensor | None]:
    """(dL/ds, dL/dm) under frozen levels, float32 [O, 1]; dL/dm is None where there is no m. `dots` may be compiled."""
    dot_O = torch.zeros_like(affine.scale_OG[:, 0])
    sums_O = torch.zeros_like(dot_O)
    numbers = AT_ONCE if grad_TO.device.type == "cpu" else GPU_AT_ONCE
    tokens = max(RUN, numbers // grad_TO.shape[1] // RUN * RUN)
    chunks = (tensor.split(tokens) for tensor in (grad_TO, x_TI, output_TO))
    for grad_KO, x_KI, output_KO in zip(*chunks, strict=True):
        whole = len(grad_KO) // RUN * RUN
        if whole:
            dot_O += dots(*(tensor[:whole].unflatten(0, (-1, RUN)) for tensor in (grad_KO, output_KO))).sum(0)
        if whole < len(grad_KO):
            dot_O += dots(grad_KO[None, whole:], output_KO[None, whole:])[0]
        if affine.offset_OG is not None:
            sums_O += x_KI.sum(1, dtype=torch.float32) @ grad_KO.float()
    if bias_O is not None:
        dot_O -= bias_O * grad_TO.sum(0, dtype=torch.float32)
    if affine.offset_OG is None:
        return dot_O[:, None] / affine.scale_OG, None
    return (dot_O[:, None] - affine.offset_OG * sums_O[:, None]) / affine.scale_OG, sums_O[:, None]


def clipped_slopes(grid: Grid, affine: Affine, latent_KI: Tensor, grad_TK: Tensor, x_TI: Tensor) -> Tensor:
    """dL/du as if nothing were clipped, float32 [K, I], of the weights that are; 0 elsewhere. All of the same rows."""
    low, high = grid.bounds
    clipped_KI = (latent_KI <= low) | (latent_KI >= high)
    places = clipped_KI.nonzero(as_tuple=True)
    if len(places[0]) * SPARSE > clipped_KI.numel():
        return product(grad_TK.T, x_TI).float() * clipped_KI * affine.scale_OG
    slopes_KI = torch.zeros_like(latent_KI)
    slopes_KI[places] = (grad_TK.T[places[0]].float() * x_TI.T[places[1]].float()).sum(1)
    return slopes_KI * affine.scale_OG
