"""LoftQ (arXiv 2310.08659) for LR-QAT: adapters that begin where rounding has left the weights.

With the "int" downcast, Phi0 is the codes alone and the fractions are lost: B = 0 begins every weight at the middle of
its cell, as if none were near to the next code. So A and B begin as the best rank-R approximation of what is missing,
in units of levels, in turns with the codes (LoftQ, algorithm 1):

    x = clip((W - m) / s),   A B = 0
    repeat:   Phi0 = nearest(x - c A B),   c A B = SVD_R(x - Phi0)          c = alpha / R

Each half minimises |x - Phi0 - c A B|^2 over its own variables, so the error never grows. Training then begins with
latents Phi0 + c A B near x, and so near round-to-nearest's codes of x.

The residual is nearly noise, with a flat spectrum: at R = 32 of 4096 an SVD holds little of it. It matters at 3 bits
and below, and for small matrices.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lrqat.errors import LrqatError
from lrqat.grid import to_latent
from lrqat.methods.lr_qat import LRQAT
from lrqat.ranges import row_tiles

TURNS = 5
OVERSAMPLING = 8  # extra columns of the randomised SVD
POWERS = 4


@torch.no_grad()
def loftq(quantizer: LRQAT, weight_OI: Tensor, generator: torch.Generator, turns: int = TURNS) -> list[float]:
    """Set Phi0, A and B of a fresh "int" quantizer; returns the root mean square of x - Phi0 - c A B after each turn.

    Args:
        quantizer: made from this very weight.
        weight_OI: what it was made from.
        generator: draws the SVD's first vectors.
        turns: of the algorithm.
    """
    if quantizer.downcast != "int":
        raise LrqatError(f"loftq: downcast {quantizer.downcast} keeps the fractions itself; use --downcast int")
    grid, affine = quantizer.grid, quantizer.affine()
    rank = quantizer.a_OR.shape[1]
    x_OI = torch.cat(
        [to_latent(weight_OI[rows], affine.rows(rows)).clamp_(*grid.ends) for rows in row_tiles(*weight_OI.shape)]
    )
    low_rank_OI, errors = torch.zeros_like(x_OI), []
    for _ in range(turns):
        levels_OI = grid.nearest(x_OI - low_rank_OI)
        left_OR, right_RI = truncated_svd(x_OI - levels_OI, rank, generator)
        low_rank_OI = left_OR @ right_RI
        errors.append((x_OI - levels_OI - low_rank_OI).square().mean().sqrt().item())
    quantizer.phi.copy_(quantizer._pack(grid.encode(levels_OI)))
    quantizer.a_OR.copy_(left_OR / abs(quantizer.multiplier) ** 0.5)
    quantizer.b_RI.copy_(right_RI * abs(quantizer.multiplier) ** 0.5 / quantizer.multiplier)
    quantizer.begun = quantizer.a_OR.detach().clone(), quantizer.b_RI.detach().clone()
    return errors


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
