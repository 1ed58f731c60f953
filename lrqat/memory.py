"""Freed memory stays with the process: every tile and every activation is allocated again a moment later.

glibc hands large blocks back to the kernel when they are freed, and takes them page by page, zeroed, when they are
asked for again; a training step on CPU spends up to half its time there.
"""

from __future__ import annotations

import ctypes
import re
import sys
from pathlib import Path

# mallopt(3)
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
ALWAYS = (1 << 31) - 1  # the largest int


def status_bytes(key: str, pid: int | str = "self") -> int | None:
    """VmHWM, RssAnon .. of a process as the kernel tells them (proc(5)); None if it is gone, or the system another."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(rf"^{key}:\s+(\d+) kB", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def return_freed_memory() -> None:
    """What is free goes back to the kernel now, from between what is kept, too; where there is no glibc, nothing."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def keep_freed_memory() -> None:
    """Tell glibc not to give memory back; elsewhere nothing."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(M_TRIM_THRESHOLD, ALWAYS)
