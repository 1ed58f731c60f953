"""Triangular factors of a Hessian H [K, K].

    U    upper,  U^T U = (H + damp mean(diag H))^-1
    M    unit upper,  M D M^T = H + damp mean(diag H):   M = U^-1 diag(U)

By them an error is passed on to what is rounded later.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lrqat.errors import LrqatError
from lrqat.starts.targets import check_finite, mean_firing


def inverse_factor(hessian_KK: Tensor, damp: float, name: str) -> Tensor:
    """U; more damping where float32 needs it. Means are of inputs that fire."""
    check_finite(hessian_KK, name)
    hessian_KK = hessian_KK.clone()
    diagonal_K = hessian_KK.diagonal()
    mean = mean_firing(hessian_KK)
    diagonal_K[diagonal_K == 0] = mean if mean > 0 else 1.0
    for more in (damp, 9 * damp, 90 * damp):
        diagonal_K += more * mean
        lower_KK, failed = torch.linalg.cholesky_ex(hessian_KK)
        if not failed:
            upper_KK: Tensor
            upper_KK, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower_KK), upper=True)
            if not failed:
                return upper_KK
    raise LrqatError(f"{name}: the calibration inputs' products have no inverse; give more --data")


def unit_factor(hessian_KK: Tensor, damp: float, name: str) -> Tensor:
    """M."""
    upper_KK = inverse_factor(hessian_KK, damp, name)
    unit_KK: Tensor = torch.linalg.solve_triangular(upper_KK, upper_KK.diagonal().diag(), upper=True)
    return unit_KK
