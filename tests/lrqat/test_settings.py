"""The commands' input: recipes, flags, and one line for everything that cannot be done, before long work starts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lrqat.cli import main, make_parser
from lrqat.command import with_recipe
from lrqat.errors import LrqatError
from lrqat.models import Base, locate
from lrqat.settings import TrainSettings


@pytest.fixture
def recipe(tmp_path: Path) -> Any:
    """Write a recipe; gives its path."""

    def write(text: str) -> str:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Loading weights fails the test."""

    def fail(*_: Any) -> None:
        raise AssertionError("weights were loaded before the input was refused")

    monkeypatch.setattr(Base, "model", fail)
    yield


@pytest.fixture
def model_copy(tmp_path: Path, tiny_model_dir: Path) -> Path:
    """A copy of the tiny model to damage."""
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))


def parsed(*argv: str) -> Any:
    return make_parser().parse_args(with_recipe(list(argv)))


def error_of(capsys: pytest.CaptureFixture[str], *argv: object, status: int = 2) -> str:
    """The one line that a command ends with."""
    capsys.readouterr()
    try:
        found = main([str(word) for word in argv])
    except SystemExit as stop:  # argparse
        found = int(stop.code or 0)
    output = capsys.readouterr()
    assert found == status, output.err
    assert output.out == "" and "Traceback" not in output.err
    lines = [line for line in output.err.splitlines() if "error:" in line]
    assert len(lines) == 1 and output.err.rstrip().endswith(lines[0]), output.err
    return lines[0]


def test_a_recipes_keys_are_the_flags(recipe: Any) -> None:
    path = recipe(
        "grid: w3g64\nsteps: 7\nseq-len: 64\nlr_scales: 0\ngradient_checkpointing: true\nresume: false\nalpha:\n"
    )
    args = parsed("train", "M", "--config", path)
    assert (args.model, args.grid, args.steps, args.seq_len, args.lr_scales) == ("M", "w3g64", 7, 64, 0.0)
    assert args.gradient_checkpointing is True and args.resume is False and args.alpha is None


@pytest.mark.parametrize("order", [["--steps", "9", "--config"], ["--config"]])
def test_a_flag_beats_the_recipe_wherever_it_stands(recipe: Any, order: list[str]) -> None:
    after = [] if len(order) > 1 else ["--steps", "9"]
    args = parsed("train", "M", *order, recipe("steps: 7\nrank: 5\n"), *after)
    assert (args.steps, args.rank) == (9, 5)


def test_a_recipe_can_name_the_model_and_the_run(recipe: Any) -> None:
    args = parsed("train", "--config", recipe("model: some/model\nout: runs/x\n"))
    assert (args.model_flag, args.out) == ("some/model", "runs/x")


@pytest.mark.parametrize("where", ["first", "last"])
def test_a_list_in_a_recipe_leaves_the_positional_model_alone(recipe: Any, where: str) -> None:
    path = recipe("steps: 3\ndata: [a.txt, b.jsonl]\n")
    words = ["M", "--config", path] if where == "first" else ["--config", path, "M"]
    args = parsed("train", *words)
    assert args.model == "M" and list(args.data) == ["a.txt", "b.jsonl"]


def test_a_list_in_a_recipe_repeats_a_repeatable_flag(recipe: Any) -> None:
    args = parsed("train", "M", "--config", recipe("skip: [down_proj, o_proj]\n"))
    assert args.model == "M" and args.skip == ["down_proj", "o_proj"]
    path = recipe("override: ['re:.*down_proj=q4_k', lm_head=q6_k]\n")
    for command in ("train", "ptq"):
        assert parsed(command, "M", "--out", "o", "--config", path).override == ["re:.*down_proj=q4_k", "lm_head=q6_k"]
    words = ["--override", "a=w4", "--override", "b=w8", "c=dense"]
    assert parsed("train", "M", *words).override == ["a=w4", "b=w8", "c=dense"]


def test_other_commands_take_recipes_too(recipe: Any) -> None:
    args = parsed("ptq", "M", "--config", recipe("grid: w8\nout: o\nrange_p: 0\n"))
    assert (args.model, args.grid, args.out, args.range_p) == ("M", "w8", "o", 0.0)
    args = parsed("eval", "M", "--config", recipe("text: [a.txt, b.txt]\nseq_len: 9\n"))
    assert (args.model, args.text, args.seq_len) == ("M", ["a.txt", "b.txt"], 9)


def test_an_unknown_key_of_a_recipe_is_named(recipe: Any, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe("stepz: 3\n")
    assert "stepz" in error_of(capsys, "train", "M", "--out", "o", "--config", path)


@pytest.mark.parametrize("text", ["", "- a\n", "just words\n", "a: [\n", "\t:"])
def test_a_recipe_that_is_no_mapping_is_one_line_that_names_it(
    recipe: Any, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    assert "recipe.yaml" in error_of(capsys, "train", "M", "--out", "o", "--config", recipe(text))


def test_a_recipe_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "none.yaml" in error_of(capsys, "train", "--config", tmp_path / "none.yaml")


def test_a_recipe_that_is_no_text_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(b"\xff\xfe\x00\x01")
    assert "r.yaml" in error_of(capsys, "train", "--config", tmp_path / "r.yaml")


@pytest.mark.parametrize(("argv", "missing"), [(["--out", "o"], "MODEL"), (["M"], "--out")])
def test_what_is_missing_is_named(capsys: pytest.CaptureFixture[str], argv: list[str], missing: str) -> None:
    assert missing in error_of(capsys, "train", *argv)


@pytest.mark.parametrize(
    "flags",
    [
        ["--grid", "w9"],
        ["--grid", "w4g32-odd"],
        ["--grid", "q4_k", "--override", "q_proj=w4g48"],
        ["--override", "down_proj"],
        ["--override", "=w8"],
        ["--override", "down_proj=w9"],
        ["--override", "re:(=w8"],
        ["--override", "no_such_proj=w8"],
        ["--override", "lm_head=w8"],
        ["--steps", "0"],
        ["--batch-size", "0"],
        ["--rank", "0"],
        ["--rank", "9999"],
        ["--seq-len", "1"],
        ["--lr", "-1"],
        ["--lr", "nan"],
        ["--lr-scales", "-1"],
        ["--warmup", "1"],
        ["--warmup", "nan"],
        ["--range-p", "-2"],
        ["--range-p", "nan"],
        ["--alpha", "nan"],
        ["--save-every", "0"],
        ["--gradient-accumulation", "0"],
        ["--threads", "0"],
        ["--loss", "mse"],
        ["--dtype", "int8"],
        ["--method", "sft"],
        ["--downcast", "fp8"],
        ["--steps", "many"],
        ["--skip", "("],
        ["--skip", "."],
        ["--grid", "w4g48"],
        ["--dtype", "float16"],
        ["--seq-len", "99999999"],
        ["--data", "none.txt"],
    ],
    ids=" ".join,
)
@pytest.mark.usefixtures("no_weights")
def test_a_setting_that_cannot_be_is_one_line_and_leaves_no_run(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    out = tmp_path / "run"
    error_of(capsys, "train", tiny_model_dir, "--out", out, "--steps", "2", "--seq-len", "32", *flags)
    assert not out.exists()


def test_the_same_settings_are_refused_when_they_come_from_python() -> None:
    for bad in (
        {"downcast": "fp8"},
        {"loss": "mse"},
        {"grid": "x"},
        {"range_p": -1.0},
        {"override": ("down_proj=w9",)},
    ):
        with pytest.raises(LrqatError, match=r"^[^\n]+$"):
            TrainSettings(model="m", out="o", **bad)  # type: ignore[arg-type]


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("command", ["train", "ptq"])
def test_a_group_that_does_not_divide_is_refused_with_one_that_does_before_weights_are_loaded(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    line = error_of(capsys, command, tiny_model_dir, "--grid", "w4g96", "--out", tmp_path / "run")
    assert "proj.weight: group_size 96 does not divide in_features 256" in line and "w4g128" in line


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("command", ["train", "ptq"])
def test_a_missing_model_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    missing = tmp_path / "none"
    assert "none: no such file or directory" in error_of(capsys, command, missing, "--out", tmp_path / "run")


def cut_weights(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def pickled_weights(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def lost_shard(model: Path) -> None:
    weight_map = {"model.norm.weight": "model-00002-of-00002.safetensors"}
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def no_tokenizer(model: Path) -> None:
    for path in model.glob("*token*"):
        path.unlink()


def set_config(model: Path, **changes: Any) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("command", ["train", "ptq"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_weights, "model.safetensors: not a whole safetensors file"),
        (pickled_weights, "no safetensors file"),
        (lost_shard, "model-00002-of-00002.safetensors"),
        (no_tokenizer, "no tokenizer"),
        (lambda m: (m / "config.json").unlink(), "no config.json"),
        (lambda m: (m / "config.json").write_text("{"), "config.json: not JSON"),
        (lambda m: (m / "config.json").write_text("{}"), "model_type"),
        (lambda m: set_config(m, model_type="nosuchmodel"), "nosuchmodel"),
        (lambda m: set_config(m, model_type="t5", architectures=["T5Model"]), "no causal language model"),
        (lambda m: set_config(m, hidden_size="wide"), "model"),
    ],
    ids=["cut", "bin", "lost-shard", "no-tokenizer", "no-config", "json", "empty", "unknown", "t5", "type"],
)
def test_a_model_that_cannot_be_trained_is_one_line_that_names_it(
    model_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, damage: Any, message: str
) -> None:
    damage(model_copy)
    words = ["--seq-len", 32, "--steps", 2] if command == "train" else []
    line = error_of(capsys, command, model_copy, "--out", tmp_path / "run", *words)
    assert message in line and not (tmp_path / "run").exists()


@pytest.mark.usefixtures("no_weights")
def test_a_damaged_tokenizer_is_one_line(model_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (model_copy / "tokenizer.json").write_text("{")
    line = error_of(capsys, "train", model_copy, "--out", tmp_path / "run")
    assert "tokenizer" in line and not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", [b"", b"GGUF", b"\x80\x04pickle", b"text"])
def test_a_file_that_is_no_gguf_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(LrqatError, match=r"^[^\n]*m\.gguf[^\n]*$"):
        locate(str(tmp_path / "m.gguf"))


@pytest.mark.usefixtures("no_weights")
def test_a_directory_that_holds_another_run_is_refused(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.json").write_text("{}")
    line = error_of(capsys, "train", tiny_model_dir, "--out", tmp_path)
    assert "holds a run already" in line and "--resume" in line


@pytest.mark.usefixtures("no_weights")
def test_resuming_what_never_started_is_one_line(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--out", tmp_path / "none", "--resume", "--seq-len", 32, "--steps", 2]
    assert "no run to resume" in error_of(capsys, "train", tiny_model_dir, *words)


def test_export_of_no_checkpoint_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = error_of(capsys, "export", tmp_path / "none", "--format", "gguf", "--out", tmp_path / "x.gguf")
    assert "none: no such directory" in line and not (tmp_path / "x.gguf").exists()


def test_json_is_one_object_on_stdout(tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ptq", str(tiny_model_dir), "--out", str(tmp_path / "run"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["grid"] == "w4g32" and found["quantized_weights"] == 14 and found["skipped"] == 0
    assert Path(found["fused"]) == tmp_path / "run" / "fused"
