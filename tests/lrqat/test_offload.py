"""--offload disk: the same codes, nothing left behind, and only the layers in use are in memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from lrqat.cli import main
from lrqat.console import device
from lrqat.errors import LrqatError
from lrqat.models import locate
from lrqat.offload import Pages, check_offload, frozen_bytes
from lrqat.pages import MAPS
from lrqat.plan import plan
from lrqat.safestream import GrowingFile
from lrqat.settings import TrainSettings

SMALL = ["--grid", "w3g32", "--steps", "4", "--seq-len", "32", "--save-every", "2", "--threads", "1"]
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="gives pages back as Linux does")
Run = Callable[..., dict[str, bytes]]


@pytest.fixture(scope="module")
def run(tiny_model_dir: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Trains with the given flags; returns codes and scales by hash."""

    def run(*flags: str) -> dict[str, bytes]:
        out = tmp_path_factory.mktemp("offload") / "run"
        assert main(["train", str(tiny_model_dir), "--data", str(text), *SMALL, *flags, "--out", str(out)]) == 0
        assert not list(out.glob("*.safetensors*"))
        index = json.loads((out / "fused" / "fused.json").read_text())
        return {name: weight["sha256"] for name, weight in index["weights"].items()}

    return run


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--gradient-checkpointing", "--downcast", "int", "--dtype", "float32"),
        ("--method", "l4q", "--start", "awq", "--calibration-blocks", "4"),
        ("--method", "efficientqat", "--calibration-blocks", "4", "--block-epochs", "1"),
        ("--calibration-blocks", "4", "--block-epochs", "1", "--block-lr", "1e-1"),
        ("--override", "embed_tokens=w8g32"),
    ],
    ids=["lrqat", "checkpointing", "l4q", "efficientqat", "blocks", "embeddings"],
)
def test_codes_are_the_same_with_the_frozen_weights_on_disk(run: Run, flags: tuple[str, ...]) -> None:
    assert run(*flags) == run(*flags, "--offload", "disk")


def test_a_run_may_be_resumed_with_its_frozen_weights_elsewhere(
    run: Run, tiny_model_dir: Path, text: Path, tmp_path: Path
) -> None:
    words = ["train", str(tiny_model_dir), "--data", str(text), *SMALL, "--out", str(tmp_path / "run")]
    program = f"""
from lrqat import trainer
from lrqat.cli import main
trainer.Metrics.on_step_end = lambda self, args, state, control, **_: exit(9) if state.global_step == 3 else None
main({[*words, "--offload", "disk"]!r})
"""
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=300).returncode == 9
    assert main([*words, "--resume"]) == 0
    index = json.loads((tmp_path / "run" / "fused" / "fused.json").read_text())
    assert {name: weight["sha256"] for name, weight in index["weights"].items()} == run()


def test_cpu_is_refused_without_a_gpu_and_a_full_disk_before_anything_is_loaded(
    tiny_model_dir: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if device().type == "cpu":
        out = tmp_path / "run"
        words = ["train", str(tiny_model_dir), "--data", str(text), *SMALL, "--out", str(out), "--offload", "cpu"]
        assert main(words) == 2
        assert "there is no GPU" in capsys.readouterr().err and not out.exists()
    settings = TrainSettings(str(tiny_model_dir), str(tmp_path / "not" / "there"), offload="disk", rank=4)
    skeleton = locate(settings.model).skeleton()
    decided = plan(skeleton, settings.assignment, settings.rank)
    check_offload(settings, decided, skeleton, device())
    decided.sites.update({name: site.__class__(name, site.kind, (1 << 24, 1 << 24), site.origin)
                          for name, site in decided.sites.items()})  # fmt: skip
    with pytest.raises(LrqatError, match=r"--offload disk needs \d+\.\d GB there"):
        check_offload(settings, decided, skeleton, device())
    plain = TrainSettings(settings.model, settings.out, dtype="float32")
    check_offload(plain, decided, skeleton, device(), 1 << 20)
    with pytest.raises(LrqatError, match=r"--dtype float32 of another checkpoint needs \d+\.\d GB there"):
        check_offload(plain, decided, skeleton, device(), 1 << 60)


@pytest.mark.parametrize("method", ["lrqat", "lsq", "l4q", "scales"])
@pytest.mark.parametrize("downcast", ["fixed", "eq7", "int", "bf16"])
def test_the_announced_bytes_are_those_of_the_tensors(tiny_model_dir: Path, method: str, downcast: str) -> None:
    from lrqat.begin import swap_for_training
    from lrqat.layers import quantizers

    more = {"downcast": downcast} if method == "lrqat" else {}
    override = ("down_proj=w8g32", "embed_tokens=w4g32")
    settings = TrainSettings(str(tiny_model_dir), "unused", method=method, override=override, **more)
    model = locate(settings.model).model(torch.bfloat16)
    decided = plan(model, settings.assignment, settings.rank)
    swap_for_training(model, decided, settings)
    found = {
        name: sum(getattr(quantizer, kept).nbytes for kept in quantizer.immutable)
        for name, quantizer in quantizers(model).items()
    }
    assert found == frozen_bytes(settings, decided)


@LINUX
def test_a_growing_file_is_mapped_shared_for_a_private_map_may_not_exceed_memory(tmp_path: Path) -> None:
    tensors = {"codes": torch.arange(9, dtype=torch.uint8), "odd": torch.rand(3, 5).to(torch.bfloat16)}
    with GrowingFile(tmp_path / "x.safetensors", ["a tensor"] * 3) as file:
        for name, tensor in tensors.items():
            file.add(name, tensor)
        file.finish()
        mapped = file.mapped()
    assert all(torch.equal(mapped[name], tensor) for name, tensor in tensors.items())
    address = mapped["codes"].data_ptr()
    ways = [line.split()[1] for line in MAPS.read_text().splitlines() if spans(line, address)]
    assert ways == ["r--s"]
    with GrowingFile(tmp_path / "y.safetensors", ["b"]) as file:
        file.add("b", torch.zeros(0, 2))
        file.finish()
        assert file.mapped()["b"].shape == (0, 2)


def spans(line: str, address: int) -> bool:
    """Whether a line of /proc/self/maps is of the map that an address lies in."""
    first, last = (int(end, 16) for end in line.split()[0].split("-"))
    return first <= address < last


def test_a_growing_file_is_one_that_safetensors_reads(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {"a.é": torch.arange(7), "b": torch.rand(3, 5).to(torch.bfloat16), "c": torch.rand(0, 2)}
    with GrowingFile(path, tensors) as file:
        for name, tensor in tensors.items():
            file.add(name, tensor)
        assert not path.exists()
        file.finish()
    with safe_open(path, framework="pt") as found:
        assert {name: True for name in tensors} == {
            name: torch.equal(found.get_tensor(name), tensors[name])
            for name in found.keys()  # noqa: SIM118
        }
    with pytest.raises(KeyboardInterrupt), GrowingFile(tmp_path / "y.safetensors", tensors) as file:
        file.add("b", tensors["b"])
        raise KeyboardInterrupt
    with pytest.raises(ValueError, match="more than were announced"), GrowingFile(path, ["a"]) as file:
        for number in range(10):
            file.add(f"tensor {number} of a name that is long" * 9, torch.zeros(1))
        file.finish()
    assert [left.name for left in tmp_path.iterdir()] == ["x.safetensors"]


def test_layers_are_asked_for_one_ahead_in_both_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[tuple[str, int]] = []
    monkeypatch.setattr("lrqat.offload.ask_for", lambda tensor: events.append(("ask", int(tensor))))
    monkeypatch.setattr("lrqat.offload.give_back", lambda tensor: events.append(("drop", int(tensor))))
    inside: list[list[Tensor]] = [[torch.tensor(number)] for number in range(3)]
    walk = Pages(inside, [])
    for number in (0, 1, 2, 2, 1, 1, 0):  # forward; then backward, where layer 1 is recomputed first
        walk.enter(number)
    asked, dropped = ([n for what, n in events if what == kind] for kind in ("ask", "drop"))
    assert asked == [1, 2, 1, 1, 0, 0, 1]
    assert dropped == [0, 1, 2, 1]


MEASURE = """
import json, re, sys, threading, time
from pathlib import Path
import torch
from lrqat.begin import swap_for_training
from lrqat.models import locate
from lrqat.offload import offloaded
from lrqat.plan import plan
from lrqat.settings import TrainSettings
from lrqat.trainer import LossModel

where = sys.argv[2] if len(sys.argv) > 2 else None
settings = TrainSettings(sys.argv[1], "unused", grid="w4", rank=4, range_p=None, offload=where)
base = locate(settings.model)
model = base.model(torch.bfloat16)
decided = plan(model, settings.assignment, settings.rank)

def memory():
    status = open("/proc/self/status").read()
    return sum(int(re.search(rf"{key}:\\s+(\\d+)", status)[1]) * 1024 for key in ("RssAnon", "RssFile"))

with offloaded(where, Path(sys.argv[1]) / "frozen.safetensors", decided) as frozen:
    swap_for_training(model, decided, settings, frozen=frozen)
model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
loss_model = LossModel(model.train())
seen, done = [], False

def watch():
    while not done:
        seen.append(memory())
        time.sleep(0.002)

thread = threading.Thread(target=watch)
thread.start()
for _ in range(2):
    loss_model(torch.arange(16)[None])["loss"].backward()
done = True
thread.join()
(Path(sys.argv[1]) / "frozen.safetensors").unlink(missing_ok=True)
print(json.dumps({"peak": max(seen), "frozen": sum(q.phi.nbytes for q in model.modules() if hasattr(q, "phi"))}))
"""


@LINUX
def test_a_step_holds_two_layers_of_frozen_weights_instead_of_all(large_model_dir: Path) -> None:
    def measure(*where: str) -> dict[str, int]:
        words = [sys.executable, "-c", MEASURE, str(large_model_dir), *where]
        done = subprocess.run(words, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        found: dict[str, int] = json.loads(done.stdout)
        return found

    inside, outside = measure(), measure("disk")
    layers, slack = 9, 16 << 20
    assert inside["frozen"] == 9 * 16 * 1024 * 1024  # fixed point: a byte a weight
    saved = inside["frozen"] * (layers - 2) // layers - slack
    assert inside["peak"] - outside["peak"] > saved > 0.6 * inside["frozen"], (inside, outside)
