"""What `lrqat plan` predicts is what a training holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lrqat.begin import swap_for_training
from lrqat.cli import main
from lrqat.errors import LrqatError
from lrqat.estimate import estimate, kept_activations
from lrqat.layers import quantizers
from lrqat.models import locate
from lrqat.plan import plan
from lrqat.planning import parse_size
from lrqat.settings import TrainSettings

WITHIN = 0.1  # of the measured figure: what issue 5 asks for


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"downcast": "int", "grid": "w4g64-asym", "override": ("down_proj=w8", "embed_tokens=w4g32")},
        {"method": "lsq", "grid": "w3-asym"},
        {"method": "l4q", "skip": ("o_proj",)},
        {"method": "scales", "grid": "w4g32-min", "loss": "ce"},
        {"grid": "q4_k", "dtype": "float32", "lr_scales": 0.0},
    ],
    ids=lambda more: str(more.get("method", more.get("grid", "default"))),
)
def test_what_lives_from_step_to_step_is_predicted_to_the_byte(tiny_model_dir: Path, more: dict[str, object]) -> None:
    settings = TrainSettings(str(tiny_model_dir), "unused", range_p=None, **more)  # type: ignore[arg-type]
    base = locate(settings.model)
    skeleton = base.skeleton()
    decided = plan(skeleton, settings.assignment, settings.rank)
    predicted = estimate(skeleton, decided, settings, gpu=True).parts
    model = base.model(getattr(torch, settings.dtype))
    swap_for_training(model, decided, settings)
    found = quantizers(model).values()
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    packed = [getattr(q, name) for q in found for name in q.immutable]
    assert predicted["trained"] == predicted["gradients"] == predicted["moments"] / 2 == trained
    assert predicted["packed"] == sum(t.nbytes for t in packed)
    assert predicted["dense"] == sum(p.nbytes for p in model.parameters() if not p.requires_grad)


def test_a_gpu_must_hold_the_whole_model_before_it_is_packed(
    tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--grid", "w4", "--batch-size", "1", "--seq-len", "8", "--gradient-checkpointing", "--json"]
    plan_of = ["plan", str(tiny_model_dir), *small, "--optimizer", "adamw8bit", "--memory"]
    whole = sum(p.nbytes for p in locate(str(tiny_model_dir)).model(torch.bfloat16).parameters())
    assert main([*plan_of, "1T"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["loading_gb"] == whole / 1e9 and found["peak_gb"] >= found["loading_gb"]


@pytest.mark.parametrize("grid", ["w4g32", "w4"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_autograd_keeps_is_counted_without_data(tiny_model_dir: Path, dtype: str, grid: str) -> None:
    settings = TrainSettings(str(tiny_model_dir), "unused", grid, range_p=None, dtype=dtype, seq_len=96, rank=4)
    base = locate(settings.model)
    skeleton = base.skeleton()
    decided = plan(skeleton, settings.assignment, settings.rank)
    outside, layer = kept_activations(skeleton, decided, settings)
    model = base.model(getattr(torch, dtype))
    swap_for_training(model, decided, settings)
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        states = model.base_model(torch.zeros(2, 96, dtype=torch.int64), use_cache=False).last_hidden_state
    assert states.requires_grad
    nbytes = sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in own)
    counted = outside + 2 * layer
    assert 0.98 * nbytes < counted < 1.2 * nbytes, (counted, nbytes)  # above: grouped keys and a mask, see the module


def test_checkpointing_keeps_a_layers_input_and_offload_a_layers_weights(tiny_model_dir: Path) -> None:
    plain = TrainSettings(str(tiny_model_dir), "unused", seq_len=2048)
    skeleton = locate(plain.model).skeleton()
    decided = plan(skeleton, plain.assignment, plain.rank)
    whole = estimate(skeleton, decided, plain).parts
    less = TrainSettings(str(tiny_model_dir), "unused", seq_len=2048, gradient_checkpointing=True, offload="disk")
    saved = estimate(skeleton, decided, less).parts
    assert saved["packed"] * 2 == whole["packed"]  # two layers
    assert saved["activations"] < 0.7 * whole["activations"]
    assert all(saved[k] == whole[k] for k in whole.keys() - {"packed", "activations", "malloc"})


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
def test_a_training_takes_the_memory_that_was_planned(
    dtype: str, large_model_dir: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import subprocess
    import sys

    flags = ["--grid", "w4", "--rank", "8", "--steps", "1", "--seq-len", "256", "--batch-size", "1"]
    flags += ["--dtype", dtype]
    assert main(["plan", str(large_model_dir), *flags, "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)["peak_gb"]
    words = ["train", str(large_model_dir), "--data", str(text), *flags, "--range-p", "0", "--threads", "1"]
    program = f"import sys; from lrqat.cli import main; sys.exit(main({[*words, '--out', str(tmp_path / 'run')]!r}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert abs(planned - row["peak_memory_gb"]) < WITHIN * row["peak_memory_gb"], (planned, row)


def test_a_plan_says_what_makes_it_fit_and_ends_with_1_where_it_does_not(
    tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["plan", str(tiny_model_dir), "--grid", "w4g32", "--seq-len", "2048", "--json"]
    assert main([*words, "--memory", "24G"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] and "process_gb" not in found and "step_seconds" not in found
    tight = found["peak_gb"] * 0.75
    assert main([*words, "--memory", f"{tight * 1000:.0f}M"]) == 1
    assert json.loads(capsys.readouterr().out)["fits_with"].startswith("--gradient-checkpointing")
    assert main([*words, "--memory", "1M"]) == 1
    assert json.loads(capsys.readouterr().out)["fits_with"] is None
    assert main([*words, "--threads", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["step_seconds"] > 0
    assert main([*words, "--offload", "cpu"]) == 2
    assert "give --memory" in capsys.readouterr().err


def test_sizes_are_read_or_refused_in_one_line() -> None:
    assert parse_size("24G") == parse_size("24") == parse_size("24gb") == 24e9
    assert parse_size("1.5T") == 1.5e12 and parse_size("300M") == 3e8
    for text in ("", "G", "24X", "-1G", "0"):
        with pytest.raises(LrqatError, match="24G"):
            parse_size(text)
