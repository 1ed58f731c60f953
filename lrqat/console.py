"""What a run tells its user: progress that reads well on a terminal and in a log file, memory, device."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


def bar(items: Iterable[T], label: str, total: int | None = None) -> Iterable[T]:
    """`items` with a tqdm bar on stderr; in a log file one line every half minute."""
    from tqdm import tqdm

    quiet = not sys.stderr.isatty()
    return tqdm(items, desc=label, total=total, file=sys.stderr, mininterval=30 if quiet else 0.1, dynamic_ncols=True)


def device() -> torch.device:
    """Where models run: the GPU if there is one."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def peak_memory_gb() -> float:
    """Most memory that this process held so far, in GB: on CUDA the device's, else resident memory."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


def log(text: str) -> None:
    """One line to stderr."""
    print(text, file=sys.stderr, flush=True)
