"""Values that the wire stores: the nearest ones, passed by straight through.

portable   8 significant bits, 2^-17 <= |s| <= 65280: exact in fp16 *and* in bf16, so that a runtime
           may serve in either dtype without touching a scale
fp16       2^-24 <= |s| <= 65504: 11 significant bits, fewer below 2^-14
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

MIN_SCALE = {"portable": 2.0**-17, "fp16": 2.0**-24}  # fp16's steps are 2^-24 here: 8 bits from 2^-17 on; the first
MAX_SCALE = {"portable": 65280.0, "fp16": 65504.0}  # largest bf16 value below fp16's maximum; fp16's maximum
NARROW = {"portable": torch.bfloat16, "fp16": torch.float16}


class _Through(torch.autograd.Function):
    """Replace a tensor's value; the gradient goes through as if nothing had happened."""

    @staticmethod
    def forward(ctx: Any, real: Tensor, stored: Tensor) -> Tensor:
        return stored.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def through(real: Tensor, stored: Tensor) -> Tensor:
    """`stored`, with the gradient of `real`."""
    result: Tensor = _Through.apply(real, stored)
    return result


def to_wire(scales: Tensor, precision: str) -> Tensor:
    """Nearest storable scales, float32; sign kept, magnitude clamped, never zero."""
    real = scales.detach()
    magnitude = real.abs().clamp(MIN_SCALE[precision], MAX_SCALE[precision]).to(NARROW[precision]).float()
    return through(scales, torch.where(real < 0, -magnitude, magnitude))


def keep_zero(start: Tensor, found: Tensor) -> Tensor:
    """`found`, but zero where the start is: codes of an imported file that stand under no scale stay so."""
    return torch.where(start == 0, start, found)


def to_fp16(values: Tensor) -> Tensor:
    """Nearest fp16 values, float32; zero stays zero."""
    return through(values, values.detach().clamp(-65504.0, 65504.0).to(torch.float16).float())


def to_integer(values: Tensor, low: int, high: int) -> Tensor:
    """Nearest integers in low..high, float32."""
    return through(values, values.detach().round().clamp_(low, high))
