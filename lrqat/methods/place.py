"""Where large tensors lie that are made, used and dropped: on the CPU one place for each use, as large as the largest.

Taken from malloc, each weight would leave a hole behind in which something small comes to lie that stays (a layer's
input, a gradient), and the next one would not fit; or, where large blocks come from the kernel, each tile would be
fresh pages. A GPU's allocator does this by itself.
"""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor


class _Place(threading.local):
    """Bytes of this thread, by use."""

    def __init__(self) -> None:
        self.held: dict[str, Tensor] = {}


_place = _Place()


def passing(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, use: str = "weight") -> Tensor:
    """Uninitialized; on the CPU it is good until this thread asks for the next one of this use."""
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    nbytes = math.prod(shape) * dtype.itemsize
    held = _place.held.pop(use, None)
    if held is None or len(held) < nbytes:
        held = None  # gone before there is another
        held = torch.empty(nbytes, dtype=torch.uint8)
    _place.held[use] = held
    return held[:nbytes].view(dtype).view(shape)
