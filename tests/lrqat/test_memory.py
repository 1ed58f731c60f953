"""Memory of the process: what is freed stays or goes, and weights that pass lie in one place."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from lrqat import memory
from lrqat import train as training
from lrqat.methods.place import passing
from lrqat.settings import TrainSettings

GROWTH = """
import sys, torch
from lrqat.memory import give_large_blocks_back, keep_freed_memory, status_bytes
keep_freed_memory()
if sys.argv[1] == "back":
    give_large_blocks_back()
def work(count):
    kept = []
    for _ in range(count):  # a layer: large results that pass, and between them its input, which stays
        gate, up = torch.ones(6 << 20, dtype=torch.uint8), torch.ones(6 << 20, dtype=torch.uint8)
        del gate
        kept.append(torch.ones(2 << 20, dtype=torch.uint8))
        del up
    return kept
work(1)
before = status_bytes("RssAnon")
kept = work(16)
print(status_bytes("RssAnon") - before - sum(t.nbytes for t in kept))
"""
SLACK = 4 << 20  # bytes: Python, page tables' rounding


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_large_blocks_that_go_back_leave_no_holes() -> None:
    found: dict[str, list[int]] = {"back": [], "kept": []}
    for how in ("back", "kept") * 3:  # addresses are random: a kept block's hole may happen to be filled
        done = subprocess.run([sys.executable, "-c", GROWTH, how], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        found[how].append(int(done.stdout))
    assert max(found["back"]) < SLACK, found
    assert max(found["kept"]) > 4 * SLACK, "nothing would be gained"


def test_passing_tensors_lie_in_one_place_that_grows_and_is_a_threads_own() -> None:
    cpu = torch.device("cpu")
    small = passing((3, 5), torch.float32, cpu)
    large = passing((40, 5), torch.bfloat16, cpu)
    again = passing((4, 4), torch.float32, cpu)
    assert small.shape == (3, 5) and small.dtype == torch.float32 and large.dtype == torch.bfloat16
    assert large.data_ptr() == again.data_ptr()
    assert passing((4, 4), torch.float32, cpu, "another use").data_ptr() != again.data_ptr()
    there: list[int] = []
    thread = threading.Thread(target=lambda: there.append(passing((4, 4), torch.float32, cpu).data_ptr()))
    thread.start()
    thread.join()
    assert there and there[0] != again.data_ptr()


@pytest.mark.parametrize(("wide", "times"), [(1, 4), (1 << 20, 0)])
def test_a_wide_checkpointed_model_gives_memory_back_before_each_layers_two_forward_passes(
    tiny_model_dir: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wide: int, times: int
) -> None:
    done: list[str] = []
    monkeypatch.setattr(memory, "WIDE", wide)
    monkeypatch.setattr(training, "give_large_blocks_back", lambda: done.append("large"))
    monkeypatch.setattr(training, "return_freed_memory", lambda: done.append("freed"))
    training.train(
        TrainSettings(
            str(tiny_model_dir),
            str(tmp_path / "run"),
            data=(str(text),),
            grid="w4",
            rank=2,
            range_p=None,
            steps=1,
            batch_size=1,
            seq_len=32,
            gradient_checkpointing=True,
        )
    )
    assert done == ["large"] * bool(times) + ["freed"] * times  # two layers
