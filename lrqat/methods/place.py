"""Where weights lie that are made, used and dropped: on the CPU all in one place, as large as the largest.

Taken from malloc, each would leave a hole behind in which something small comes to lie that stays (a layer's input, a
gradient), and the next weight would not fit. A GPU's allocator keeps large and small blocks apart by itself.
"""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor


class _Place(threading.local):
    """Bytes of this thread."""

    held = torch.empty(0, dtype=torch.uint8)


_place = _Place()


def passing(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialized; on the CPU it is good until this thread asks for the next one."""
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    nbytes = math.prod(shape) * dtype.itemsize
    if len(_place.held) < nbytes:
        _place.held = torch.empty(0, dtype=torch.uint8)  # gone before there is another
        _place.held = torch.empty(nbytes, dtype=torch.uint8)
    return _place.held[:nbytes].view(dtype).view(shape)
