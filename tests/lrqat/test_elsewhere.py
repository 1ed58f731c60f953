"""Training, rounding and scoring on a device that is not the CPU; `elsewhere` tells how without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel

from lrqat.cli import main
from lrqat.jsonfile import read_metrics
from tests.lrqat.test_architectures import tiny

HOUSE = Path(__file__).parents[2]
BLOCKS = "--calibration-blocks 4 --block-epochs 1"
RUNS = {
    "lrqat": "--grid w4g32 --save-every 1",
    "lrqat, tokens of 8 bits, cache of 4": "--grid w4g32 --activations 8 --kv 4 --downcast int --loftq",
    "lrqat by blocks, rotated": f"--grid w3 {BLOCKS} --start gptq --rotate 0 --untie-head",
    "lrqat with checkpoints": "--grid w4g32 --gradient-checkpointing --loss ce --override embed_tokens=q8_0",
    "lrqat from disk": "--grid w4g32 --offload disk",
    "lsq": "--grid iq4_nl --method lsq --lr 1e-5",
    "l4q": "--grid w4g32-asym --method l4q",
    "scales": "--grid w4g32-asym --method scales --start awq --calibration-blocks 4",
    "efficientqat": f"--grid w2g32 --method efficientqat {BLOCKS}",
}
MORE = ("experts of rounded tokens", "eval of rounded tokens", "continued", "ptq", "generate", "eval")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any, tiny_model_dir: Path) -> dict[str, Path]:
    """Directories of random models: a small one, one with experts, and one that is wide enough for K-quants."""
    found = {"wide": tiny_model_dir}
    for name, model_type in (("small", "llama"), ("experts", "qwen3_moe")):
        found[name] = tmp_path_factory.mktemp(name)
        tiny(model_type, vocab_size=len(tiny_tokenizer), tie_word_embeddings=True).save_pretrained(found[name])
        tiny_tokenizer.save_pretrained(found[name])
    return found


def commands(models: dict[str, Path], text: Path, place: Path) -> dict[str, list[str]]:
    """Every run, other models, and what goes on from the first run."""
    place.mkdir()
    model = models["small"]
    short = f"--data {text} --seq-len 32"
    train = f"{short} --steps 2 --batch-size 2 --threads 1 --dtype float32"
    words = {name: f"train {model} {train} {flags}" for name, flags in RUNS.items()}
    words["lrqat of a K-quant"] = f"train {models['wide']} {train} --grid q3_k"
    words["lrqat of experts"] = f"train {models['experts']} {train} --grid w4g32 --start gptq {BLOCKS}"
    words["experts of rounded tokens"] = f"train {models['experts']} {train} --grid w4g32 --activations 8"
    words["continued"] = f"train {place / 'lrqat'} {train}"
    words["ptq"] = f"ptq {model} {short} --method gptq --grid w4g32-asym --calibration-blocks 4"
    words["generate"] = f"generate {model} --tokens 16 --length 8 --batch-size 2"
    made = {name: [*line.split(), "--out", str(place / name)] for name, line in words.items()}
    score = f"--text {text} --seq-len 32 --blocks 4"
    return made | {
        "eval": f"eval {place / 'lrqat'} --reference {model} {score}".split(),
        "eval of rounded tokens": ["eval", str(place / "experts of rounded tokens"), *score.split()],
    }


@pytest.fixture(scope="module")
def found(
    tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path], text: Path
) -> tuple[Path, dict[str, str | None]]:
    """The folder of all commands elsewhere (`there`), of the trainings once more `here`; what the former raised."""
    folder = tmp_path_factory.mktemp("elsewhere")
    there, here = (commands(models, text, folder / place) for place in ("there", "here"))
    path = folder / "commands.json"
    path.write_text(json.dumps([*there.values()]))
    environment = os.environ | {"PYTHONPATH": str(HOUSE), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "tests.lrqat.elsewhere", str(path)], cwd=HOUSE, env=environment, check=True)
    with sdpa_kernel(SDPBackend.MATH):  # there is no other elsewhere
        assert all(main(here[name]) == 0 for name in RUNS)
    return folder, dict(zip(there, json.loads(path.read_text()), strict=True))


@pytest.mark.parametrize("name", [*RUNS, "lrqat of a K-quant", "lrqat of experts", *MORE])
def test_no_operation_takes_operands_of_two_devices(found: tuple[Path, dict[str, str | None]], name: str) -> None:
    assert not found[1][name], found[1][name]


@pytest.mark.parametrize("name", RUNS)
def test_the_first_step_sees_the_loss_that_it_sees_on_the_cpu(
    found: tuple[Path, dict[str, str | None]], name: str
) -> None:
    here, there = (read_metrics(found[0] / place / name / "metrics.jsonl")[0]["loss"] for place in ("here", "there"))
    assert there == pytest.approx(here, rel=1e-4)  # 1e-8 of a KL of 1e-4: sums in another order


def test_the_device_refuses_what_a_gpu_refuses() -> None:
    program = """
import torch
from tests.lrqat import elsewhere
elsewhere.register()
x = torch.ones(2, 3, device=elsewhere.DEVICE)
assert (x + 1).cpu().sum() == 12 and (x * torch.tensor(2.0)).sum().item() == 12
x[torch.tensor([0])] = 5.0
assert x.cpu()[0, 0] == 5 and x.cpu()[1, 0] == 1
for refused in (
    lambda: x + torch.ones(3),
    lambda: torch.ones(3).add_(x[0]),
    lambda: torch.ones(2, 3)[x[:, 0].long() * 0],
    lambda: x.normal_(generator=torch.Generator()),
    lambda: torch.randn(2, device=elsewhere.DEVICE, generator=torch.Generator()),
    lambda: x.numpy(),
):
    try:
        refused()
    except (RuntimeError, TypeError):
        continue
    raise AssertionError("not refused")
"""
    subprocess.run([sys.executable, "-c", program], cwd=HOUSE, check=True)
