"""Freed memory stays with the process: every tile and every activation is allocated again a moment later.

glibc hands large blocks back to the kernel when they are freed, and takes them page by page, zeroed, when they are
asked for again; a training step on CPU spends up to half its time there.
"""

from __future__ import annotations

import ctypes
import re
import sys
from pathlib import Path
from typing import Any

# mallopt(3)
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
ALWAYS = (1 << 31) - 1  # the largest int
NEVER = (1 << 30, 1 << 25)  # bytes of a block that comes from the kernel; glibc before 2.35 refuses the first
LARGE = 3 << 19  # bytes: more than what a row tile takes in float32
WIDE = 2048  # hidden states: below, fresh pages for activations cost percents of the products (4 to 8 at 576)


def status_bytes(key: str, pid: int | str = "self") -> int | None:
    """VmHWM, RssAnon .. of a process as the kernel tells them (proc(5)); None if it is gone, or the system another."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(rf"^{key}:\s+(\d+) kB", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def _glibc() -> ctypes.CDLL | None:
    """The C library, if it is glibc."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    return libc if hasattr(libc, "malloc_trim") else None


def return_freed_memory() -> None:
    """What is free goes back to the kernel now, from between what is kept, too; where there is no glibc, nothing."""
    if libc := _glibc():
        libc.malloc_trim(0)


def keep_freed_memory() -> None:
    """Tell glibc not to give memory back; elsewhere nothing."""
    if libc := _glibc():
        any(libc.mallopt(M_MMAP_THRESHOLD, size) for size in NEVER)
        libc.mallopt(M_TRIM_THRESHOLD, ALWAYS)


def wide(config: Any) -> bool:
    """Whether a model of this configuration is wide enough to train on fresh pages."""
    return int(config.get_text_config().hidden_size) >= WIDE


def give_large_blocks_back() -> None:
    """From now on large blocks come from the kernel and go back to it; elsewhere nothing.

    What is kept has holes: a block asked for with an alignment does not fit where one of its size was, and where a
    layer's input comes to lie that stays, nothing large fits. With the decoder layers of a 7B model that is .3 GB.
    """
    if libc := _glibc():
        libc.mallopt(M_MMAP_THRESHOLD, LARGE)
