"""Adapters that begin where rounding has left the weights: LoftQ (arXiv 2310.08659) for LR-QAT.

With the "int" downcast, Phi0 is the codes alone and the fractions are lost: B = 0 begins every weight at the middle of
its cell, as if none were near to the next code. So A and B begin as the best rank-R approximation of what is missing,
in units of levels:

    Phi0 = the start's codes,   c A B = SVD_R(x - Phi0),   x = clip((W - m) / s)          c = alpha / R

LoftQ's further turns, Phi0 = nearest(x - c A B) and the SVD again, are for adapters beside the rounding. Inside it
c A B is added before the weight is rounded, so they would take every code away from its weight (from GPTQ at 3 bits
the error of the outputs grew by 60%). As it is no code moves: a row whose c A B would carry one over is shrunk.

The residual is nearly noise, with a flat spectrum: at R = 32 of 4096 an SVD holds little of it. It matters at 3 bits
and below, and for small matrices.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lrqat.errors import LrqatError
from lrqat.grid import to_latent
from lrqat.methods.lr_qat import LRQAT
from lrqat.ranges import weight_tiles

OVERSAMPLING = 8  # extra columns of the randomised SVD
POWERS = 4
SHRINK, SHRINKS = 0.9, 40  # of a row at a time, and how often: to 1.5%
MARGIN = 1.001  # products in other tiles differ in their last bits


@torch.no_grad()
def loftq(quantizer: LRQAT, weight_OI: Tensor, generator: torch.Generator) -> None:
    """Set A and B of a fresh "int" quantizer; its codes stay.

    Args:
        quantizer: made from this very weight.
        weight_OI: what it was made from.
        generator: draws the SVD's first vectors.
    """
    if quantizer.downcast != "int":
        raise LrqatError(f"loftq: downcast {quantizer.downcast} keeps the fractions itself; use --downcast int")
    grid, affine, multiplier = quantizer.grid, quantizer.affine(), quantizer.multiplier
    levels_OI = quantizer.frozen(slice(None))
    missing_OI = torch.cat(
        [to_latent(weight_OI[rows], affine.rows(rows)).clamp_(*grid.ends) for rows in weight_tiles(weight_OI)]
    ).sub_(levels_OI)
    left_OR, right_RI = truncated_svd(missing_OI, quantizer.a_OR.shape[1], generator)
    for _ in range(SHRINKS):
        moved_O = (grid.nearest(levels_OI + MARGIN * left_OR @ right_RI) != levels_OI).any(1)
        left_OR[moved_O] *= SHRINK
        if not moved_O.any():
            break
    else:
        left_OR[moved_O] = 0
    quantizer.a_OR.copy_(left_OR / abs(multiplier) ** 0.5)
    quantizer.b_RI.copy_(right_RI * abs(multiplier) ** 0.5 / multiplier)


def truncated_svd(x_OI: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """[O, R] and [R, I] whose product is nearly the best of this rank; singular values shared evenly (Halko 2011)."""
    width = min(rank + OVERSAMPLING, *x_OI.shape)
    probe_IK = torch.randn(x_OI.shape[1], width, generator=generator).to(x_OI.device)
    basis_OK = torch.linalg.qr(x_OI @ probe_IK).Q
    for _ in range(POWERS):
        basis_OK = torch.linalg.qr(x_OI @ torch.linalg.qr(x_OI.T @ basis_OK).Q).Q
    u_KK, s_K, v_KI = torch.linalg.svd(basis_OK.T @ x_OI, full_matrices=False)
    root_R = s_K[:rank].sqrt()
    return basis_OK @ u_KK[:, :rank] * root_R, root_R[:, None] * v_KI[:rank]
