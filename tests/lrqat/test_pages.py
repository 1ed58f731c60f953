"""Loading streams: of a mapped checkpoint, no more than one weight is in memory while the quantizers are made."""

from __future__ import annotations

import json
import mmap
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lrqat import losses
from lrqat.begin import prepare_once
from lrqat.losses import Head, head_loss
from lrqat.models import locate
from lrqat.pages import MAPS, ask_for, give_back, in_file, only_read
from lrqat.plan import plan
from lrqat.settings import TrainSettings
from lrqat.starts.rotation import rotate

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="counts pages as Linux does")

MEASURE = """
import json, re, sys, threading, time
from pathlib import Path
import torch
from lrqat.begin import swap_for_training
from lrqat.convert import conversion, converted_model
from lrqat.models import locate
from lrqat.plan import plan
from lrqat.settings import TrainSettings

settings = TrainSettings(
    sys.argv[1], "unused", grid="w4", downcast="int", rank=4, range_p=None, gradient_checkpointing=True
)

def memory():
    status = open("/proc/self/status").read()
    return [int(re.search(rf"{key}:\\s+(\\d+)", status)[1]) * 1024 for key in ("RssAnon", "RssFile")]

base = locate(settings.model)
skeleton = base.skeleton()
decided = plan(skeleton, settings.assignment, settings.rank)
base.model(torch.bfloat16)  # whatever transformers imports
import gc; gc.collect()
before, seen, done = memory(), [], False

def watch():
    while not done:
        seen.append(memory())
        time.sleep(0.001)

thread = threading.Thread(target=watch)
thread.start()
dtype = getattr(torch, sys.argv[2])
entries = conversion(base, dtype)
model = converted_model(base, dtype, entries, Path(sys.argv[3])) if entries else base.model(dtype)
loaded = memory()
swap_for_training(model, decided, settings)
after = memory()
done = True
thread.join()
weights = sum(site.shape[0] * site.shape[1] for name, site in decided.sites.items() if name in decided.grids)
trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
starts = sum(b.nbytes for n, b in model.named_buffers() if ".start." in n)
print(json.dumps({
    "anonymous_peak": max(row[0] for row in seen) - before[0],
    "anonymous_loaded": loaded[0] - before[0],
    "file_after": after[1] - before[1],
    "packed": weights // 2,
    "weights": weights,
    "small": trained + starts,
    "samples": len(seen),
}))
"""
SLACK = 24 << 20  # bytes: threads' arenas, a tile's temporaries (2^18 float32 each), Python


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", pytest.param("float16", marks=pytest.mark.slow)])
def test_a_model_becomes_packed_weights_with_one_layer_in_anonymous_memory(
    dtype: str, large_model_dir: Path, tmp_path: Path
) -> None:
    words = [sys.executable, "-c", MEASURE, str(large_model_dir), dtype, str(tmp_path / "run")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert list(tmp_path.iterdir()) == []  # what was converted has no name any more
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    layer = 4 * 1024 * 1024 * 4 + 3 * 4096 * 1024 * 4  # bytes of a decoder layer in float32: what is never exceeded
    assert found["samples"] > 100
    assert found["anonymous_loaded"] < SLACK, found
    assert found["packed"] < found["anonymous_peak"] < found["packed"] + found["small"] + layer + SLACK, found
    assert found["packed"] + found["small"] + layer + SLACK < 0.8 * 2 * found["weights"], "the bound would hold anyway"
    assert found["file_after"] < SLACK, found


def test_pages_of_a_file_come_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.arange(1 << 20), "b": torch.arange(5)}, path)
    with safe_open(path, framework="pt") as file:
        a, b = file.get_tensor("a"), file.get_tensor("b")
    assert in_file(a) and in_file(b)
    assert not in_file(a.clone()) and not in_file(torch.empty(0))
    total = int(a.sum())
    resident = pages_of(a)
    give_back(a)
    assert resident > 2000 and pages_of(a) < 10
    ask_for(a)
    assert int(a.sum()) == total and b.tolist() == [0, 1, 2, 3, 4]


def test_a_mapped_head_is_read_in_slices_that_are_never_all_resident(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, hidden, tokens, slices = 40_000, 128, 150, 5
    generator = torch.Generator().manual_seed(0)
    whole_VH = torch.randn(words, hidden, generator=generator) / 4
    student_BTH, teacher_BTH = torch.randn(2, 1, tokens, hidden, generator=generator)
    save_file({"head": whole_VH}, tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        mapped_VH = file.get_tensor("head")
    monkeypatch.setattr(losses, "SLICE_BYTES", mapped_VH.nbytes // slices)
    resident, product = [], losses.product

    def counted(*args: Any, **options: Any) -> Any:
        done = product(*args, **options)
        resident.append(pages_of(mapped_VH))
        return done

    monkeypatch.setattr(losses, "product", counted)
    found = []
    for head in (Head(weight_VH, None, only_read(weight_VH)) for weight_VH in (whole_VH, mapped_VH)):
        assert head.mapped == (head.weight_VH is mapped_VH)
        hidden_BTH = student_BTH.clone().requires_grad_()
        loss = head_loss(hidden_BTH, head, teacher_BTH)
        loss.backward()
        found.append((loss.item(), hidden_BTH.grad))
        assert len(resident) == 3 * 2 * (slices if head.mapped else 1)  # two models and the gradient, two chunks
        if head.mapped:
            assert 0 < max(resident) * mmap.PAGESIZE <= mapped_VH.nbytes * 2 / slices
        resident.clear()
    assert pages_of(mapped_VH) < 10
    (whole, whole_grad), (sliced, sliced_grad) = found
    assert abs(whole - sliced) <= 1e-6 * whole  # sums of float32 in another order
    assert (whole_grad - sliced_grad).norm() <= 1e-5 * whole_grad.norm()


def private(tensor: torch.Tensor) -> bool:
    """Whether there are private copies of the pages around it."""
    return pages_of(tensor, "Anonymous") > 0


def pages_of(tensor: torch.Tensor, field: str = "Rss") -> int:
    """Resident pages of the map that a tensor lies in."""
    found = False
    for line in MAPS.with_name("smaps").read_text().splitlines():
        head = line.split()
        if "-" in head[0] and not head[0].endswith(":"):
            first, last = (int(x, 16) for x in head[0].split("-"))
            found = first <= tensor.data_ptr() < last
        elif found and head[0] == f"{field}:":
            return int(head[1]) // 4
    raise AssertionError("no map holds it")


def test_a_rotated_model_is_read_from_the_runs_file(tiny_model_dir: Path, tmp_path: Path) -> None:
    base = locate(str(tiny_model_dir))
    settings = TrainSettings("unused", "unused", rotate=3, untie_head=True, rank=4)
    model, ids = base.model(torch.float32), torch.arange(20)[None]
    decided = plan(base.skeleton(), settings.assignment, settings.rank)
    before, kept = model(ids).logits, (torch.float32, tmp_path / "start.safetensors", "key")
    prepare_once(model, decided, settings.beginning, torch.empty(0, 8), None, *kept)
    assert all(in_file(weight) and not private(weight) for weight in model.parameters())
    torch.testing.assert_close(model(ids).logits, before, rtol=0, atol=1e-4)
    again = base.model(torch.float32)
    rotate(again, 3, untie=True)
    assert private(again.get_submodule("model.layers.0.mlp.down_proj").weight)
    again = base.model(torch.float32)
    prepare_once(again, decided, settings.beginning, torch.empty(0, 8), None, *kept)
    assert torch.equal(again(ids).logits, model(ids).logits)
