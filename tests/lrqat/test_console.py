"""What a run tells of itself."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from lrqat.command import run


def test_a_process_does_not_count_the_memory_of_the_one_that_started_it() -> None:
    held = bytearray(b"x") * 700_000_000
    program = "from lrqat.console import peak_memory_gb; print(peak_memory_gb())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert 0.01 < float(done.stdout) < len(held) / 1e9


def test_a_gpus_full_memory_is_one_line_and_another_failure_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    def full() -> int:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a capacity of 23.6 GiB")

    def broken() -> int:
        raise RuntimeError("CUDA error")

    assert run(full) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: CUDA out of memory; ") and error.count("\n") == 1
    with pytest.raises(RuntimeError):
        run(broken)
