"""`lrqat formats`, `lrqat train --for`, `lrqat-export` of every format: answers before any long work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import exporters.cli
import lrqat.cli
from exporters.matrix import GRIDS, PAIRS


def test_the_matrix_is_printed_for_every_grid(capsys: pytest.CaptureFixture[str]) -> None:
    assert lrqat.cli.main(["formats"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["grid", "bits", *PAIRS] and [line.split()[0] for line in lines[1:]] == list(GRIDS)


def test_a_models_own_shapes_are_asked_about(tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["formats", "--model", str(tiny_model_dir), "--grid", "w4g32-asym", "--json"]
    assert lrqat.cli.main(words) == 0
    rows = {row["target"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["awq@vllm-cpu"]["exact"] == "yes" and rows["awq@vllm-cpu"]["runs on"] == "CPUWNA16"
    assert rows["gguf@llama.cpp"]["exact"] == "no" and "w4g32-min" in rows["gguf@llama.cpp"]["instead"]


def test_tensor_parallel_is_asked_about(tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["formats", "--model", str(tiny_model_dir), "--grid", "w4g128", "--tensor-parallel", "4", "--json"]
    assert lrqat.cli.main(words) == 0
    rows = {row["target"]: row for row in json.loads(capsys.readouterr().out)}
    assert "4 ranks cut in_features 256 inside a group" in rows["gptq@vllm-gpu"]["instead"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--for", "exl2"], "--for exl2: expected some of gguf, gptq"),
        (
            ["--grid", "w4g32-asym", "--for", "gguf,awq"],
            "gguf: model.layers.0.self_attn.q_proj.weight: GGUF carries no",
        ),
        (["--grid", "w3g32", "--for", "vllm-cpu"], "vllm-cpu: "),
        (["--grid", "q4_k", "--for", "gptq"], "this grid goes to gguf@llama.cpp"),
        (["--grid", "w4", "--override", "q_proj=w8", "--for", "gptq@vllm-gpu"], "vLLM fuses q_proj, k_proj, v_proj"),
    ],
)
def test_a_grid_that_a_target_cannot_take_is_refused_before_training(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert lrqat.cli.main(["train", str(tiny_model_dir), *words, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and message in error
    assert not (tmp_path / "run").exists()


def test_a_grid_is_picked_for_the_targets(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = ["--steps", "1", "--batch-size", "1", "--seq-len", "16", "--rank", "2", "--json"]
    words = ["train", str(tiny_model_dir), "--for", "w8a8@vllm-cpu,gguf", *size, "--out", str(tmp_path / "run")]
    assert lrqat.cli.main(words) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["grid"] == "w8"
    assert "grid w8: w8a8@vllm-cpu as CPUInt8ScaledMM; gguf as Q8_0" in captured.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--format", "gptq", "--reference"], "--reference: is for --format gguf"),
        (["--format", "gguf", "--zeros", "v2"], "--zeros: is for --format gptq"),
        (["--format", "awq", "--activations", "int8"], "--activations: is for --format compressed-tensors"),
        (["--format", "awq", "--llama-cpp", "x"], "--llama-cpp: is for --format gguf"),
    ],
)
def test_options_of_another_format_are_refused(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exporters.cli.main(["none", *words, "--out", str(tmp_path / "x")]) == 2
    assert message in capsys.readouterr().err


def test_w8a8_is_exported_and_read_back(tiny_model_dir: Path, tmp_path: Path) -> None:
    assert lrqat.cli.main(["ptq", str(tiny_model_dir), "--grid", "w8", "--out", str(tmp_path / "run")]) == 0
    out = tmp_path / "w8a8"
    words = [str(tmp_path / "run"), "--format", "compressed-tensors", "--activations", "int8", "--out", str(out)]
    assert exporters.cli.main(words) == 0
    groups = json.loads((out / "config.json").read_text())["quantization_config"]["config_groups"]
    assert all(group["input_activations"]["dynamic"] for group in groups.values())


@pytest.mark.parametrize("form", ["gptq", "compressed-tensors", "awq"])
def test_a_quantized_embedding_goes_to_gguf_alone(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    words = ["ptq", str(tiny_model_dir), "--grid", "w4g32", "--override", "embed_tokens=w4g32"]
    assert lrqat.cli.main([*words, "--out", str(tmp_path / "run")]) == 0
    assert exporters.cli.main([str(tmp_path / "run"), "--format", form, "--out", str(tmp_path / "x")]) == 2
    assert "model.embed_tokens.weight: an embedding" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
    words = [str(tmp_path / "run"), "--format", "gguf", "--out", str(tmp_path / "x.gguf")]
    assert exporters.cli.main(words) == 0
