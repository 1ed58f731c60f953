"""What a run tells of itself."""

from __future__ import annotations

import subprocess
import sys


def test_a_process_does_not_count_the_memory_of_the_one_that_started_it() -> None:
    held = bytearray(b"x") * 700_000_000
    program = "from lrqat.console import peak_memory_gb; print(peak_memory_gb())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert 0.01 < float(done.stdout) < len(held) / 1e9
