"""Going on from a fused checkpoint: its very codes and parts are the start, and nothing is rounded again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lrqat.begin import swap_for_training
from lrqat.cli import main
from lrqat.continuing import FusedBase
from lrqat.errors import LrqatError
from lrqat.fused import FusedCheckpoint
from lrqat.grid import Grid
from lrqat.layers import quantizers
from lrqat.methods.scales import Scales
from lrqat.ptq import rtn
from lrqat.settings import TrainSettings

GRIDS = "--grid w4g32 --override 're:.*down_proj=q4_k' k_proj=w3-asym v_proj=iq4_nl embed_tokens=q8_0 --skip 1.mlp.up"


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("texts")
    for name, word in (("a", "rows"), ("b", "columns")):
        lines = (f"The {i}th of the {word} says that {i % 7} is a number.\n" for i in range(100))
        (folder / name).with_suffix(".txt").write_text("".join(lines))
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def fused(tiny_model_dir: Path, texts: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run on grids of every kind, with rounded activations."""
    import shlex

    out = tmp_path_factory.mktemp("run") / "first"
    words = f"{GRIDS} --steps 3 --seq-len 32 --rank 4 --data {texts[0]} --threads 1 --activations 8 --lr-scales 1e-2"
    assert main(["train", str(tiny_model_dir), *shlex.split(words), "--out", str(out)]) == 0
    return out


@pytest.fixture
def go_on(fused: Path, texts: list[Path], tmp_path: Path) -> Callable[..., int]:
    def run(*flags: str) -> int:
        words = f"--steps 3 --seq-len 32 --data {texts[1]} --threads 1 --lr-scales 1e-2"
        return main(["train", str(fused), *words.split(), *flags, "--out", str(tmp_path / "next")])

    return run


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("method", "flags"),
    [
        ("lrqat", {"rank": 4}),
        ("lrqat", {"rank": 4, "downcast": "int"}),
        ("lrqat", {"rank": 4, "downcast": "bf16"}),
        ("lsq", {}),
        ("l4q", {"rank": 4}),
        ("scales", {}),
    ],
)
def test_every_method_begins_with_the_codes_and_parts_of_the_checkpoint_bit_for_bit(
    fused: Path, method: str, flags: dict[str, Any], dtype: str
) -> None:
    base = FusedBase.load(str(fused))
    settings = base.settings(TrainSettings(str(fused), "o", method=method, loss="ce", dtype=dtype, **flags))
    model = base.model(getattr(torch, dtype))
    decided = base.plan(model, settings.rank)
    swap_for_training(model, decided, settings, base.parts(model.device), base.exactly)
    found = quantizers(model)
    checkpoint = FusedCheckpoint.load(fused)
    assert found.keys() == checkpoint.specs.keys() and len(found) == 14
    for name, quantizer in found.items():
        wanted, got = checkpoint.tensors[name], quantizer.fuse()
        assert str(got.grid) == str(wanted.grid) and torch.equal(got.codes_OI, wanted.codes_OI)
        assert got.parts.keys() == wanted.parts.keys()
        assert all(torch.equal(got.parts[part], wanted.parts[part]) for part in wanted.parts)


def test_a_run_goes_on_by_next_tokens_unless_a_teacher_is_named(
    go_on: Callable[..., int], fused: Path, tmp_path: Path
) -> None:
    assert go_on("--rank", "4") == 0
    first, second = FusedCheckpoint.load(fused), FusedCheckpoint.load(tmp_path / "next")
    assert second.provenance["settings"]["loss"] == "ce"
    assert second.provenance["continues"] == first.provenance and second.provenance["base_sha256"]
    assert second.provenance["settings"]["activations"] == "8"  # as it was trained
    assert {n: str(s.grid) for n, s in second.specs.items()} == {n: str(s.grid) for n, s in first.specs.items()}
    assert second.dense_specs == first.dense_specs and second.provenance["skipped"] == first.provenance["skipped"]
    assert any(second.tensors[name].sha256() != first.tensors[name].sha256() for name in first.specs)


def test_a_named_teacher_distils(go_on: Callable[..., int], tiny_model_dir: Path, tmp_path: Path) -> None:
    assert go_on("--method", "scales", "--teacher", str(tiny_model_dir), "--activations", "none") == 0
    settings = FusedCheckpoint.load(tmp_path / "next").provenance["settings"]
    assert settings["loss"] == "kd" and settings["activations"] == "none"
    losses = [json.loads(line)["loss"] for line in (tmp_path / "next" / "metrics.jsonl").read_text().splitlines()]
    assert 0 < losses[0] < 0.5  # nats from the original; next-token CE would be above 5


def test_the_checkpoint_as_its_own_teacher_has_nothing_to_say_at_first(
    go_on: Callable[..., int], fused: Path, tmp_path: Path
) -> None:
    assert go_on("--method", "scales", "--teacher", str(fused), "--dtype", "float32") == 0
    row = json.loads((tmp_path / "next" / "metrics.jsonl").read_text().splitlines()[0])
    assert abs(row["loss"]) < 1e-5


def test_a_continued_run_is_resumed(go_on: Callable[..., int], tmp_path: Path) -> None:
    assert go_on("--method", "scales") == 0
    assert go_on("--method", "scales", "--resume") == 0


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--grid w4g64", "is on w4g32 already; leave --grid out"),
        ("--skip up_proj", "skip: "),
        ("--override k_proj=w4", "override: "),
        ("--start gptq", "start: "),
        ("--range-p 2", "range_p: "),
        ("--rotate 1 --untie-head", "rotate: "),
        ("--method efficientqat", "--method scales"),
        ("--block-epochs 1 --calibration-blocks 4", "Block-AP needs full-precision weights"),
        ("--loss kd", "--teacher"),
        ("--loss ce --teacher x/y/z", "teacher: loss ce has none"),
        ("--downcast int --loftq", "loftq: "),
        ("--for gguf", "--for: "),
    ],
)
def test_what_would_round_again_or_has_no_teacher_is_one_line(
    go_on: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path, flags: str, named: str
) -> None:
    capsys.readouterr()
    assert go_on(*flags.split()) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1 and named in lines[0] and not (tmp_path / "next").exists()


def test_the_grid_may_be_given_if_it_is_the_same(go_on: Callable[..., int]) -> None:
    assert go_on("--grid", "w4g32", "--method", "scales") == 0


def test_a_teacher_of_other_words_is_refused(
    go_on: Callable[..., int], trained_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert go_on("--teacher", str(trained_model_dir)) == 2
    assert "another vocabulary" in capsys.readouterr().err


@pytest.mark.parametrize("spelling", ["w4g32", "w4g32-asym", "q4_0", "q2_k", "q4_k", "q6_k", "iq4_nl"])
def test_a_scale_of_zero_stays_one_under_scales_alone(spelling: str) -> None:
    grid = Grid.parse(spelling)
    weight_OI = torch.randn(4, 256, generator=torch.Generator().manual_seed(0)) * 0.05
    fused = rtn(weight_OI, grid, None)
    for name, part in fused.parts.items():
        if name.endswith("scales"):
            part[1, 0] = 0  # as imported files have it, and of a K-quant one sub-scale and one super-scale
    made = Scales.from_fused(fused, torch.device("cpu"))
    assert made.fuse().sha256() == fused.sha256()
    (made(torch.randn(3, 256), None) ** 2).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in made.parameters())
    for gain in made.gains.values():
        gain.data *= 1.5
    moved = made.fuse()
    for name, part in moved.parts.items():
        assert not name.endswith("scales") or part[1, 0] == 0
    assert moved.sha256() != fused.sha256()


def test_codes_under_a_scale_of_zero_are_kept_by_scales_alone(fused: Path) -> None:
    from lrqat.continuing import check_same

    tensor = FusedCheckpoint.load(fused).tensors["model.layers.0.self_attn.q_proj.weight"]
    check_same("w", tensor, tensor)
    other = type(tensor)(tensor.codes_OI ^ 1, tensor.parts, tensor.grid)
    with pytest.raises(LrqatError, match=r"^w: [^\n]*--method scales[^\n]*$"):
        check_same("w", other, tensor)
