"""Commands at work beside each other: their costs, their answers, and one Ctrl-C for all.

What a command costs is what the kernel says of its process (`wait4`): user and system seconds, most resident memory.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from lrqat.console import log
from lrqat.errors import LrqatError

MAXRSS_BYTES = 1 if sys.platform == "darwin" else 1024


class Stopped(Exception):
    """The user has stopped the benchmark."""


@dataclass(frozen=True)
class Ended:
    """A process that has ended."""

    status: int
    stdout: str
    cost: dict[str, float]


class Children:
    """The processes at work. Ctrl-C or SIGTERM asks all of them to stop, once more makes them."""

    def __init__(self, threads: int, lock: int) -> None:
        self.threads = threads
        self.lock = lock
        self.stopping = False
        self.alive: set[subprocess.Popen[str]] = set()
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> Children:
        for number in (signal.SIGINT, signal.SIGTERM):
            self.previous[number] = signal.signal(number, self._stop)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        log("stopping; rows in training save a checkpoint first, and go on when the benchmark is run again")
        self.stopping = True
        for child in tuple(self.alive):
            ask_to_stop(child)

    def run(self, words: Sequence[object], log_file: Path) -> Ended:
        """Run a command to its end; its stderr is added to a file.

        Raises:
            Stopped: before it was started.
        """
        if self.stopping:
            raise Stopped
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads)}
        started = time.monotonic()
        with open(log_file, "a") as errors:
            print("$", *words, file=errors, flush=True)
            child = subprocess.Popen(
                [str(word) for word in words],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                pass_fds=(self.lock,),
                start_new_session=True,  # a terminal's Ctrl-C comes to us alone, and is passed on once
            )
        self.alive.add(child)
        if self.stopping:
            ask_to_stop(child)
        assert child.stdout is not None
        with child.stdout:
            stdout = child.stdout.read()
        _, status, usage = os.wait4(child.pid, 0)
        self.alive.discard(child)
        child.returncode = os.waitstatus_to_exitcode(status)
        cost = {
            "seconds": time.monotonic() - started,
            "cpu_seconds": usage.ru_utime + usage.ru_stime,
            "peak_memory_gb": usage.ru_maxrss * MAXRSS_BYTES / 1e9,
        }
        return Ended(child.returncode, stdout, cost)

    def answer(self, ended: Ended, log_file: Path) -> dict[str, Any]:
        """The JSON object in a command's last line; what went wrong is one line."""
        if ended.status:
            if self.stopping:
                raise Stopped
            last = next((line for line in reversed(log_file.read_text().splitlines()) if line.strip()), "")
            raise LrqatError(f"status {ended.status}: {last.removeprefix('error: ')} (see {log_file})")
        found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
        return found


def ask_to_stop(child: subprocess.Popen[str]) -> None:
    """SIGTERM: a shell's background jobs ignore SIGINT, and so do their children. Popen's own would reap it."""
    with suppress(ProcessLookupError):
        os.kill(child.pid, signal.SIGTERM)
