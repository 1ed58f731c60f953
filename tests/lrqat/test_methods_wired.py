"""Every method and start through the commands: what they train, that it is fused, and that it is resumed."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lrqat import begin, block_ap
from lrqat.activations import per_token
from lrqat.assign import Assignment
from lrqat.begin import swap_for_training
from lrqat.cli import main, make_parser, train_settings
from lrqat.command import with_recipe
from lrqat.data import blocks, draw
from lrqat.errors import LrqatError
from lrqat.evaluate import evaluate_files
from lrqat.fused import FusedCheckpoint
from lrqat.grid import Grid
from lrqat.layers import quantizers
from lrqat.methods.lsq import LSQ
from lrqat.models import fake_quant_model, locate
from lrqat.plan import plan
from lrqat.settings import METHODS, TrainSettings
from lrqat.starts import gptq
from lrqat.starts.codes import rounded
from lrqat.starts.gptq import gptq_model
from lrqat.statistics import moved_codes
from lrqat.trainer import Metrics, last_checkpoint

STEPS = 3
RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
TRAINED = {
    "lrqat": {"a_OR", "b_RI", "scales"},
    "l4q": {"a_RI", "b_OR", "scales"},
    "lsq": {"weight_OI", "scales"},
    "scales": {"scales"},
    "efficientqat": {"scales"},
}


@pytest.fixture(scope="module")
def command(tiny_model_dir: Path, text: Path) -> Callable[..., list[str]]:
    """Arguments of a small run."""
    small = f"--grid w3g32 --steps {STEPS} --seq-len 32 --batch-size 2 --lr-scales 1e-2 --save-every 1 --threads 1"
    words = ["train", str(tiny_model_dir), "--data", str(text), *small.split()]
    return lambda out, *more: [*words, "--out", str(out), *map(str, more)]


def codes(run: Path) -> dict[str, str]:
    """Codes and parts of a run, by hash."""
    index = json.loads((run / "fused" / "fused.json").read_text())
    return {name: weight["sha256"] for name, weight in index["weights"].items()}


def summary(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return found


def check(run: Path, method: str) -> None:
    """A run of this method is complete, and what it has written is a model."""
    fused = FusedCheckpoint.load(run)
    assert len(fused.tensors) == 14 and fused.provenance["method"] == summary(run)["method"] == method
    assert {path.name for path in run.iterdir()} - {"tensorboard"} == {
        "run.json",
        "metrics.jsonl",
        "layers.json",
        "summary.json",
        "loss.png",
        "checkpoints",
        "fused",
    }
    assert fake_quant_model(fused)(torch.arange(8)[None]).logits.isfinite().all()


@pytest.mark.parametrize(
    ("method", "start", "flags"),
    [
        ("lrqat", "gptq", "--rank 4 --lr 1e-1"),
        ("lrqat", "rtn", "--rank 4 --downcast int --loftq --lr 1e-1"),
        ("lsq", "rtn", "--lr 1e-2"),
        ("l4q", "rtn", "--lr 1e-1"),
        ("l4q", "awq+gptq", "--range-p 0 --lr 1e-1"),
        ("scales", "gptq", ""),
        ("efficientqat", "rtn", "--lr 1e-2 --block-epochs 1"),
        ("efficientqat", "awq+gptq", "--lr 1e-2 --activations 8 --kv 8"),
        ("lrqat", "gptq", "--rank 4 --block-epochs 1 --lr 1e-3 --block-lr 1e-1"),
        ("lsq", "rtn", "--block-epochs 1 --lr 1e-2"),
        ("l4q", "rtn", "--block-epochs 1 --lr 1e-1"),
        ("scales", "gptq", "--block-epochs 1"),
        ("lsq", "rtn", "--rotate 1 --untie-head --lr 1e-2"),
    ],
)
def test_every_method_trains_and_fuses_from_every_start(
    command: Callable[..., list[str]], tmp_path: Path, method: str, start: str, flags: str
) -> None:
    out = tmp_path / "run"
    calibrated = start != "rtn" or method == "efficientqat" or "--block-epochs" in flags
    calibration = ["--calibration-blocks", 4] if calibrated else []
    assert main(command(out, "--method", method, "--start", start, *calibration, *flags.split())) == 0
    check(out, method)
    folder = last_checkpoint(out / "checkpoints")
    assert folder is not None
    trained = load_file(folder / "adapters.safetensors")
    assert {name.rpartition(".")[2] for name in trained} == TRAINED[method]
    assert (summary(out)["codes_moved"] > 0) == (method != "scales")
    assert FusedCheckpoint.load(out).tied_head == ("--rotate" not in flags)


@pytest.mark.parametrize(
    "flags",
    [
        "--method lsq --start gptq --calibration-blocks 4",
        "--method lrqat --rank 4 --start awq+gptq --calibration-blocks 4 --rotate 3 --untie-head --range-p 0",
        "--method efficientqat --start gptq --calibration-blocks 4 --lr 1e-3",
        "--method lrqat --rank 4 --start gptq --calibration-blocks 4 --block-epochs 1",
    ],
)
def test_an_interrupted_run_resumes_to_the_codes_of_an_undisturbed_one(
    command: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str
) -> None:
    assert main(command(tmp_path / "whole", *flags.split())) == 0
    out, on_log = tmp_path / "run", Metrics.on_log

    def interrupt(self: Metrics, args: Any, state: Any, control: Any, **options: Any) -> None:
        on_log(self, args, state, control, **options)
        if state.global_step == 1:
            os.kill(os.getpid(), signal.SIGINT)

    def again(*_: Any, **__: Any) -> None:
        raise AssertionError("was done a second time")

    with monkeypatch.context() as patch:
        patch.setattr(Metrics, "on_log", interrupt)
        assert main(command(out, *flags.split())) == 130
    with monkeypatch.context() as patch:
        for name in ("prepare", "gptq_layer"):  # kept on disk, however long they took
            patch.setattr(begin, name, again)
        assert main(command(out, "--resume", *flags.split())) == 0
    assert codes(out) == codes(tmp_path / "whole")
    assert summary(out)["codes_moved"] == summary(tmp_path / "whole")["codes_moved"]
    check(out, summary(out)["method"])


def test_a_run_killed_in_the_second_layer_of_block_ap_resumes_behind_the_first(
    command: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--method", "efficientqat", "--calibration-blocks", "4", "--lr", "1e-3"]
    assert main(command(tmp_path / "whole", *words)) == 0
    out, train_layer = tmp_path / "run", block_ap.train_layer

    def only(wanted: int, walk: Any, number: int, *rest: Any) -> None:
        if number != wanted:
            raise KeyboardInterrupt
        train_layer(walk, number, *rest)

    monkeypatch.setattr(block_ap, "train_layer", partial(only, 0))
    assert main(command(out, *words)) == 130
    assert [path.name for path in (out / "blocks").iterdir()] == ["layer_0000.safetensors"]
    monkeypatch.setattr(block_ap, "train_layer", partial(only, 1))
    assert main(command(out, "--resume", *words)) == 0
    assert codes(out) == codes(tmp_path / "whole")
    assert summary(out)["codes_moved"] == summary(tmp_path / "whole")["codes_moved"] > 0


def test_a_run_killed_in_the_second_layer_of_gptq_resumes_behind_the_first(
    command: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--method", "scales", "--start", "awq+gptq", "--calibration-blocks", "4"]
    assert main(command(tmp_path / "whole", *words)) == 0
    out, gptq_layer = tmp_path / "run", gptq.gptq_layer

    def only(wanted: int, model: Any, plan: Any, walk: Any, number: int, *rest: Any, **named: Any) -> Any:
        if number != wanted:
            raise KeyboardInterrupt
        return gptq_layer(model, plan, walk, number, *rest, **named)

    monkeypatch.setattr(gptq, "gptq_layer", partial(only, 0))
    assert main(command(out, *words)) == 130
    assert [path.name for path in (out / "start").iterdir()] == ["layer_0000.safetensors"]
    monkeypatch.setattr(gptq, "gptq_layer", partial(only, 1))
    assert main(command(out, "--resume", *words)) == 0
    assert codes(out) == codes(tmp_path / "whole") and not (out / "start").exists()


def test_the_teacher_is_the_pretrained_model_whatever_is_folded_into_the_student(
    command: Callable[..., list[str]], tmp_path: Path
) -> None:
    words = ["--grid", "w8g32-fp16", "--dtype", "float32", "--method", "lsq"]
    losses = []
    for number, flags in enumerate(([], ["--rotate", "1", "--untie-head"])):
        assert main(command(tmp_path / str(number), *words, *flags)) == 0
        losses.append(summary(tmp_path / str(number))["loss_first"])
    # 8 bits err by nearly nothing; a teacher in another basis than its head would be off by nats
    assert max(losses) < 1e-3


def test_moved_codes_are_counted_from_the_starts(tiny_model_dir: Path) -> None:
    for method in METHODS:
        settings = TrainSettings("m", "o", grid="w3g32", method=method)
        model = locate(str(tiny_model_dir)).model(torch.float32)
        decided = plan(model, settings.assignment, settings.rank)
        swap_for_training(model, decided, settings)
        assert moved_codes(model) == 0, method
    model = locate(str(tiny_model_dir)).model(torch.float32)
    settings = TrainSettings("m", "o", grid="w3g32", method="lsq")
    swap_for_training(model, plan(model, settings.assignment), settings)
    before = {name: quantizer.fuse().codes_OI for name, quantizer in quantizers(model).items()}
    generator = torch.Generator().manual_seed(0)
    for quantizer in quantizers(model).values():
        assert isinstance(quantizer, LSQ)
        quantizer.weight_OI.data += 0.01 * torch.randn(quantizer.shape, generator=generator)
    moved = sum(int((q.fuse().codes_OI != before[name]).sum()) for name, q in quantizers(model).items())
    assert moved_codes(model) == moved / sum(codes_OI.numel() for codes_OI in before.values()) > 0


@pytest.mark.parametrize("name", ["8", "4", "int8"])
def test_activations_are_rounded_in_front_of_quantized_layers_only(name: str, tiny_model_dir: Path) -> None:
    model = locate(str(tiny_model_dir)).model(torch.float32)
    settings = TrainSettings("m", "o", method="lsq", skip=("down_proj",), activations=name)
    swap_for_training(model, plan(model, settings.assignment), settings)
    layer = model.model.layers[0].mlp
    x_TI = torch.randn(5, 256, generator=torch.Generator().manual_seed(0))
    bits, symmetric = (4 if name == "4" else 8), name == "int8"
    weight_OI = layer.up_proj.quantizer.weight()
    assert torch.equal(layer.up_proj(x_TI), per_token(x_TI, bits, symmetric=symmetric) @ weight_OI.T)
    assert not torch.equal(layer.up_proj(x_TI), x_TI @ weight_OI.T)
    x_TF = torch.randn(5, 512, generator=torch.Generator().manual_seed(1))
    assert torch.equal(layer.down_proj(x_TF), x_TF @ layer.down_proj.weight.T)


def test_a_run_with_rounded_activations_trains_and_says_so(command: Callable[..., list[str]], tmp_path: Path) -> None:
    flags = ["--rank", "4", "--gradient-checkpointing"]
    assert main(command(tmp_path / "a", *flags, "--activations", "4")) == 0
    assert main(command(tmp_path / "b", *flags)) == 0
    assert FusedCheckpoint.load(tmp_path / "a").provenance["settings"]["activations"] == "4"
    assert summary(tmp_path / "a")["loss_first"] > summary(tmp_path / "b")["loss_first"]


@pytest.fixture(scope="module")
def prose_files(prose: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Text to calibrate on, and text to be judged by."""
    folder = tmp_path_factory.mktemp("prose")
    for name, content in zip(("a.txt", "b.txt"), prose, strict=True):
        (folder / name).write_text(content)
    return [folder / "a.txt", folder / "b.txt"]


@pytest.fixture(scope="module")
def kl(
    trained_model_dir: Path, prose_files: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., float]:
    """KL to the full-precision model on held-out text, of `lrqat ptq` with these flags."""

    def measure(*flags: str) -> float:
        out = tmp_path_factory.mktemp("ptq") / "run"
        words = ["ptq", str(trained_model_dir), "--grid", "w2g32", "--out", str(out), "--threads", "1", *flags]
        if "rtn" not in flags:
            words += ["--data", str(prose_files[0]), "--seq-len", "64", "--calibration-blocks", "64"]
        assert main(words) == 0
        found = evaluate_files(str(out), str(trained_model_dir), [str(prose_files[1])], 64, 24, "float32").kl
        assert found is not None
        return found

    return measure


def test_gptq_beats_round_to_nearest(kl: Callable[..., float]) -> None:
    nearest, gptq, both = (kl("--method", method) for method in ("rtn", "gptq", "awq+gptq"))
    assert gptq < 0.7 * nearest and both < 0.7 * nearest  # measured: a quarter, both


def test_ptq_writes_the_codes_that_gptq_finds(trained_model_dir: Path, prose_files: list[Path], tmp_path: Path) -> None:
    words = ["--data", str(prose_files[0]), "--seq-len", "32", "--calibration-blocks", "8", "--dtype", "float32"]
    assert main(["ptq", str(trained_model_dir), "--method", "gptq", *words, "--out", str(tmp_path)]) == 0
    base = locate(str(trained_model_dir))
    model = base.model(torch.float32)
    decided = plan(model, Assignment(Grid.parse("w4g32")))
    found = gptq_model(model, decided, draw(blocks([str(prose_files[0])], base.tokenizer, 32), 8, 0), 3.5)
    fused = FusedCheckpoint.load(tmp_path)
    assert fused.provenance["method"] == "gptq" and len(fused.provenance["data_sha256"]) == 64
    assert found.keys() == fused.tensors.keys()
    for name, parts in found.items():
        expected = rounded(model.get_parameter(name).data, parts, decided.grids[name])
        assert fused.tensors[name].sha256() == expected.sha256()


def test_a_rotated_model_is_another_basis_of_the_same_model(tiny_model_dir: Path, tmp_path: Path, text: Path) -> None:
    words = ["--grid", "w8g32-fp16", "--rotate", "5", "--untie-head", "--dtype", "float32", "--out", str(tmp_path)]
    assert main(["ptq", str(tiny_model_dir), *words]) == 0
    fused = FusedCheckpoint.load(tmp_path)
    assert not fused.tied_head and fused.provenance["settings"]["rotate"] == 5
    scores = evaluate_files(str(tmp_path), str(tiny_model_dir), [str(text)], 32, 4, "float32")
    assert scores.kl is not None and scores.kl < 1e-3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("command", ["ptq", "train --steps 1 --batch-size 1 --rank 4"])
def test_what_a_rotation_made_is_stored_and_trained_in_the_checkpoints_dtype(
    command: str, dtype: str, tiny_model_dir: Path, tmp_path: Path, text: Path
) -> None:
    AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    for asset in tiny_model_dir.glob("tokenizer*"):
        shutil.copyfile(asset, tmp_path / "half" / asset.name)
    words = ["--grid", "w4g32", "--rotate", "5", "--untie-head", "--dtype", dtype, "--skip", "layers.0.mlp.up_proj"]
    name, *flags = command.split()
    words += ["--data", str(text), "--seq-len", "16", *flags] if name == "train" else []
    assert main([name, str(tmp_path / "half"), *words, "--out", str(tmp_path / "run")]) == 0
    fused = FusedCheckpoint.load(tmp_path / "run")
    assert {"lm_head.weight", "model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"} < fused.dense.keys()
    assert {tensor.dtype for tensor in fused.dense.values()} == {torch.bfloat16}
    assert all(torch.equal(tensor.half().to(tensor.dtype), tensor) for tensor in fused.dense.values())


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--method lsq --rank 4", "rank: method lsq has none, only lrqat and l4q"),
        ("--method scales --lr 1e-3", "lr: method scales has none"),
        ("--method l4q --downcast int", "downcast: method l4q has none, only lrqat"),
        ("--method lsq --loftq", "loftq: method lsq"),
        ("--loftq", "use --downcast int"),
        ("--block-epochs 0", "block_epochs: expected at least 1"),
        ("--block-lr 1e-3", "block_lr: is of Block-AP"),
        ("--method scales --block-lr-scales 1e-3", "give --block-epochs"),
        ("--tensor-parallel 2", "--tensor-parallel: is for --for"),
        ("--block-epochs 1 --lr-scales 0 --block-lr-scales 1e-3", "lr_scales 0 freezes"),
        ("--method scales --block-epochs 1 --block-lr-scales 0", "block_lr_scales: at 0"),
        ("--method scales --block-epochs 1 --block-lr 1e-3", "block_lr: method scales has none"),
        ("--method efficientqat --block-epochs 0", "block_epochs"),
        ("--method efficientqat --block-lr-scales nan", "block_lr_scales"),
        ("--method efficientqat --calibration-blocks 1", "calibration_blocks"),
        ("--method scales --lr-scales 0", "nothing to train"),
        ("--calibration-blocks 8", "start rtn needs none"),
        ("--start gptq --calibration-blocks 0", "at least 2, got 0"),
        ("--start loft", "--start"),
        ("--activations 3", "--activations"),
        ("--untie-head", "--rotate SEED"),
        ("--rotate 1", "--untie-head"),
    ],
)
def test_what_does_not_go_together_is_one_line_before_weights_are_loaded(
    command: Callable[..., list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    flags: str,
    named: str,
) -> None:
    monkeypatch.setattr("lrqat.models.Base.model", None)
    try:
        assert main(command(tmp_path / "run", *flags.split())) == 2
    except SystemExit as stop:  # argparse
        assert stop.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1 and named in lines[0] and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--data a.txt", "data: method rtn looks at no text"),
        ("--seq-len 64", "seq_len: method rtn"),
        ("--calibration-blocks 64", "calibration_blocks: method rtn"),
        ("--method gptq --calibration-blocks 1", "at least 2, got 1"),
        ("--method gptq --seq-len 1", "at least 2 tokens"),
        ("--method awq --data none.txt", "none.txt: no such file"),
        ("--untie-head", "--rotate SEED"),
        ("--rotate 1", "--untie-head"),
    ],
)
def test_ptq_refuses_in_one_line_before_weights_are_loaded(
    tiny_model_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    flags: str,
    named: str,
) -> None:
    monkeypatch.setattr("lrqat.models.Base.model", None)
    assert main(["ptq", str(tiny_model_dir), "--out", str(tmp_path / "run"), *flags.split()]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error:") and named in line and not (tmp_path / "run").exists()


def test_the_methods_defaults_are_filled_in() -> None:
    assert [TrainSettings("m", "o", method=method).rank for method in METHODS] == [32, None, 4, None, None]
    assert TrainSettings("m", "o", method="l4q", rank=8).rank == 8
    assert TrainSettings("m", "o").calibration_blocks is None
    found = TrainSettings("m", "o", start="gptq", steps=1)
    assert found.calibration_blocks == 64 and found.blocks_trained == 2 and found.blocks_needed == 66
    with pytest.raises(LrqatError, match=r"^start: expected one of rtn, gptq"):
        TrainSettings("m", "o", start="nearest")


def test_there_is_a_recipe_for_each_paper() -> None:
    assert {path.stem for path in RECIPES} == {"lr-qat", "l4q", "efficientqat", "lsq", "peqa"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_a_training(path: Path) -> None:
    args = make_parser().parse_args(with_recipe(["train", "M", "--config", str(path), "--out", "o"]))
    settings = train_settings(args)
    assert settings.model == "M" and settings.steps >= 100 and "arXiv" in path.read_text()
    assert settings.method == {"lr-qat": "lrqat", "peqa": "scales"}.get(path.stem, path.stem)
