"""What a run tells its user: progress that reads well on a terminal and in a log file, memory, device."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from lrqat.memory import status_bytes
from lrqat.ranks import rank

if TYPE_CHECKING:
    import torch

LOG_SECONDS = 30.0


def bar(items: Sequence[Any] | torch.Tensor, label: str) -> Iterator[Any]:
    """`items`, with a tqdm bar on a terminal, and in a log file a line every LOG_SECONDS; process 0 alone shows it."""
    if rank() == 0 and sys.stderr.isatty():
        from tqdm import tqdm

        yield from tqdm(items, desc=label, dynamic_ncols=True)
        return
    started = said = time.monotonic()
    for number, item in enumerate(items):
        if (now := time.monotonic()) - said >= LOG_SECONDS:
            said, left = now, (now - started) / number * (len(items) - number)
            log(f"{label} {number}/{len(items)}  {left / 60:.1f} min left")
        yield item


def device() -> torch.device:
    """Where models run: the GPU if there is one."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def peak_memory_gb() -> float:
    """Most memory that this process held so far, in GB: on CUDA the device's, else resident memory."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    if (own := status_bytes("VmHWM")) is not None:  # ru_maxrss begins with what the parent held when it forked
        return own / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


def log(text: str) -> None:
    """One line to stderr, from process 0."""
    if rank() == 0:
        print(text, file=sys.stderr, flush=True)
