"""Freed memory stays with the process: every tile and every activation is allocated again a moment later.

glibc hands large blocks back to the kernel when they are freed, and takes them page by page, zeroed, when they are
asked for again; a training step on CPU spends up to half its time there.
"""

from __future__ import annotations

import ctypes
import sys

# mallopt(3)
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
ALWAYS = (1 << 31) - 1  # the largest int


def return_freed_memory() -> None:
    """What is free goes back to the kernel now, from between what is kept, too; where there is no glibc, nothing."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def keep_freed_memory() -> None:
    """Tell glibc not to give memory back; elsewhere nothing."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(M_TRIM_THRESHOLD, ALWAYS)
