"""What a server costs the machine: CPU time and peak memory of a process and of all that it started.

CPU time is read from the scheduler's clock, in nanoseconds, where the system has one for other processes (Linux);
/proc and psutil count in ticks of 10 ms, which is 2% of a prompt on a small model. It is unlike wall time hardly
moved by what else the machine does, and it counts every thread.

Source: POSIX clock_getcpuclockid(3); VmHWM, proc_pid_status(5).
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from lrqat.errors import LrqatError


def cpu_seconds(pid: int) -> float:
    """CPU time of a process and its descendants since each began."""
    return sum(_cpu_seconds(process) for process in _tree(pid))


def peak_bytes(pid: int) -> int:
    """The most resident memory of a process and its descendants, each at its own peak."""
    return sum(_peak_bytes(process) for process in _tree(pid))


@contextmanager
def stopped(pids: Sequence[int]) -> Iterator[None]:
    """Processes and their descendants do nothing (SIGSTOP) until this ends; those that are gone already, anyway."""
    held: list[psutil.Process] = []
    for pid in pids:
        with suppress(LrqatError):
            held += _tree(pid)
    try:
        for process in held:
            with suppress(psutil.NoSuchProcess):
                process.suspend()
        yield
    finally:
        for process in held:
            with suppress(psutil.NoSuchProcess):
                process.resume()


def _tree(pid: int) -> Iterator[psutil.Process]:
    try:
        process = psutil.Process(pid)
        yield from (process, *process.children(recursive=True))
    except psutil.NoSuchProcess:
        raise LrqatError(f"process {pid} has ended; its log says why") from None


def _cpu_seconds(process: psutil.Process) -> float:
    clock = ctypes.c_int()
    find = getattr(ctypes.CDLL(None), "clock_getcpuclockid", None)
    if find is not None and find(process.pid, ctypes.byref(clock)) == 0:
        try:
            return time.clock_gettime(clock.value)
        except OSError:
            return 0.0  # it ended just now
    times = process.cpu_times()
    return times.user + times.system


def _peak_bytes(process: psutil.Process) -> int:
    try:
        for line in Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return int(process.memory_info().rss)  # other systems: what it holds now
