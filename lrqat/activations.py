"""Activations rounded per token, as integer kernels do: one range a token, found when it arrives.

    symmetric    s = max|x| / (2^(b-1) - 1),           x^ = s * clip(round(x / s))          vLLM's int8 kernels
    asymmetric   s = (max - min) / (2^b - 1),          x^ = s * (round(x / s + z) - z),  z = round(-min / s)

The range holds every value, so nothing is clipped and the straight-through gradient is the identity. LR-QAT's W4A8 and
W4A4 are the asymmetric ones.

Source of the first: dynamic_scaled_int8_quant in vllm-project/vllm csrc, for CPU and CUDA.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

SMALLEST = 1e-10  # of a token's range: a token of zeros stays one


class _PerToken(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: int, symmetric: bool) -> Tensor:
        real = x.float()
        if symmetric:
            top = (1 << (bits - 1)) - 1
            scale = real.abs().amax(-1, keepdim=True).clamp_min(SMALLEST) / top
            return (real / scale).round_().clamp_(-top - 1, top).mul_(scale).to(x.dtype)
        top = (1 << bits) - 1
        low, high = real.amin(-1, keepdim=True).clamp(max=0), real.amax(-1, keepdim=True).clamp(min=0)
        scale = (high - low).clamp_min(SMALLEST) / top
        zero = (-low / scale).round_()
        return (real / scale).add_(zero).round_().clamp_(0, top).sub_(zero).mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0], None, None


def per_token(x: Tensor, bits: int = 8, *, symmetric: bool = True) -> Tensor:
    """x [..., I] with each token's values on its own grid; same dtype; the gradient passes straight through."""
    rounded: Tensor = _PerToken.apply(x, bits, symmetric)
    return rounded


def round_inputs(model: nn.Module, names: Iterable[str], bits: int = 8, *, symmetric: bool = True) -> None:
    """From now on, these modules (by name) see their input rounded per token."""

    def before(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return per_token(arguments[0], bits, symmetric=symmetric), *arguments[1:]

    for name in names:
        model.get_submodule(name).register_forward_pre_hook(before)
