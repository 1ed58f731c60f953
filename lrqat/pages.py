"""Pages of memory-mapped files: which tensors lie in one, asking for their pages ahead, giving them back.

On the CPU, what safetensors reads is a view of a private map of the file. Reading it costs pages that the kernel may
take back at any time; writing to it costs private copies of the pages, which stay until the whole file is unmapped,
however many of its tensors are gone. What is trained from disk lies in a shared map instead, of any size
(`lrqat.safestream.GrowingFile`). Resident memory counts all of it, so pages that nobody needs are given back.

Linux only; elsewhere nothing is done, and pages stay until the kernel wants them.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from pathlib import Path

from torch import Tensor

MAPS = Path("/proc/self/maps")  # proc(5)


def in_file(tensor: Tensor) -> bool:
    """Whether its values lie in a mapped file."""
    if sys.platform != "linux" or tensor.device.type != "cpu" or not tensor.nbytes:
        return False
    address = tensor.data_ptr()
    for line in MAPS.read_text().splitlines():
        span, _, _, _, inode, *_ = line.split(maxsplit=5)
        first, _, last = span.partition("-")
        if int(first, 16) <= address < int(last, 16):
            return inode != "0"
    return False


def only_read(tensor: Tensor) -> bool:
    """Whether it lies in a mapped file and is frozen: its pages may be given back."""
    return not tensor.requires_grad and in_file(tensor)


def give_back(tensor: Tensor) -> None:
    """Let go of the pages of a tensor in a mapped file (`in_file`): when it is read again, it is as in the file.

    What was written to it is lost.
    """
    _advise(tensor, "MADV_DONTNEED")


def ask_for(tensor: Tensor) -> None:
    """Begin to read the pages of a tensor in a mapped file; returns at once."""
    _advise(tensor, "MADV_WILLNEED")


def _advise(tensor: Tensor, advice: str) -> None:
    """Of the pages that lie wholly in a contiguous tensor: those at its ends are its neighbours' too."""
    if sys.platform != "linux" or not tensor.nbytes:
        return
    assert tensor.is_contiguous()
    first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > first:
        madvise = ctypes.CDLL(None, use_errno=True).madvise
        if madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), ctypes.c_int(getattr(mmap, advice))):
            raise OSError(ctypes.get_errno(), f"madvise({advice}) of {tensor.nbytes} bytes failed")
