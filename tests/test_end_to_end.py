"""The whole way, through the commands alone: train, fuse, export, prove parity in llama.cpp, and notice a forgery."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import exporters.cli
import lrqat.cli
from exporters import formats
from lrqat.fused import FusedCheckpoint, read_assets
from lrqat.gguf_file import GgufFile

pytest.importorskip("xllamacpp", reason="pip install 'lrqat[llamacpp]'")

import serve.parity_cli
from serve.parity import tokenizer_files

LAYERS = 2
TAMPERED = "model.layers.1.mlp.up_proj.weight"
ON = ["--sequences", "4", "--seq-len", "128", "--threads", "1"]


@pytest.fixture(scope="module")
def held_out(prose: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "held_out.txt"
    path.write_text(prose[1], encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def run(trained_model_dir: Path, prose: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`lrqat train`: 4 bits in groups of 32, distilled."""
    folder = tmp_path_factory.mktemp("end_to_end")
    (folder / "train.txt").write_text(prose[0], encoding="utf-8")
    words = ["--data", str(folder / "train.txt"), "--grid", "w4g32", "--loss", "kd", "--steps", "30", "--rank", "8"]
    size = ["--batch-size", "4", "--seq-len", "128", "--threads", "1"]
    assert lrqat.cli.main(["train", str(trained_model_dir), *words, *size, "--out", str(folder / "run")]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`lrqat-export` into every format."""
    folder = tmp_path_factory.mktemp("exported")
    found = {"gguf": folder / "model.gguf", "f32": folder / "reference.gguf"}
    found |= {form: folder / form for form in ("gptq", "awq", "compressed-tensors")}
    for name, path in found.items():
        flags = ["--format", "gguf", "--reference"] if name == "f32" else ["--format", name]
        assert exporters.cli.main([str(run), *flags, "--out", str(path)]) == 0
    return found


def scores(model: Path, held_out: Path, capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, float]:
    """`lrqat eval` on the text that nothing was trained on."""
    capsys.readouterr()
    words = ["eval", str(model), "--text", str(held_out), "--seq-len", "128", "--blocks", "24", "--json", *more]
    assert lrqat.cli.main(words) == 0
    found: dict[str, float] = json.loads(capsys.readouterr().out)
    return found


def certificate(run: Path, exported: Path, held_out: Path, *more: str) -> tuple[int, dict[str, Any], Path]:
    """`lrqat-parity`: status, certificate and where it lies."""
    status = serve.parity_cli.main([str(run), str(exported), "--text", str(held_out), *ON, *more])
    path = exported.with_suffix(".certificate.json")
    return status, json.loads(path.read_text()), path


def test_the_small_model_has_learnt_more_than_word_counts(
    trained_model_dir: Path, held_out: Path, prose: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(trained_model_dir)
    train, test = (torch.tensor(tokenizer(text, verbose=False)["input_ids"]) for text in prose)
    share = torch.bincount(train, minlength=1024).double() + 0.5
    unigram = math.exp(-(share / share.sum())[test].log().mean().item())
    assert scores(trained_model_dir, held_out, capsys)["perplexity"] < unigram / 2


def test_training_beats_rounding_on_text_it_never_saw(
    run: Path, trained_model_dir: Path, held_out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lrqat.cli.main(["ptq", str(trained_model_dir), "--grid", "w4g32", "--out", str(tmp_path)]) == 0
    reference = ["--reference", str(trained_model_dir)]
    rounded = scores(tmp_path / "fused", held_out, capsys, *reference)
    trained = scores(run / "fused", held_out, capsys, *reference)
    assert trained["kl"] < 0.9 * rounded["kl"]


def test_every_format_decodes_to_the_trained_weights_bit_for_bit(run: Path, exported: dict[str, Path]) -> None:
    checkpoint = FusedCheckpoint.load(run)
    assert len(checkpoint.tensors) == 7 * LAYERS
    for form, path in exported.items():
        found = formats.read(path)
        for name, fused in checkpoint.tensors.items():
            stored = found.dense[name] if form == "f32" else found.tensors[name].dequantize()
            assert torch.equal(stored, fused.dequantize()), (form, name)
        for name, dense in checkpoint.dense.items():
            assert torch.equal(found.dense[name].float(), dense.float()), (form, name)


def test_a_model_moves_between_formats_without_touching_a_float(exported: dict[str, Path], tmp_path: Path) -> None:
    steps = [("gguf", "awq"), ("awq", "compressed-tensors"), ("compressed-tensors", "gptq"), ("gptq", "gguf")]
    path = exported["gguf"]
    for number, (_, form) in enumerate(steps):
        assert lrqat.cli.main(["import", str(path), "--out", str(tmp_path / f"run{number}")]) == 0
        path = tmp_path / (f"{number}.gguf" if form == "gguf" else str(number))
        assert exporters.cli.main([str(tmp_path / f"run{number}"), "--format", form, "--out", str(path)]) == 0
    first, last = GgufFile(exported["gguf"]), GgufFile(path)
    for name, info in first.tensors.items():
        nbytes = info.shape[0] * info.shape[1] // 32 * 18 if info.ggml_type == 2 else math.prod(info.shape) * 2
        assert last.tensors[name].ggml_type == info.ggml_type
        assert first.read(name, nbytes) == last.read(name, nbytes), name


def test_every_export_has_a_card_that_says_how_to_run_it(exported: dict[str, Path]) -> None:
    for form, path in exported.items():
        card = (path / "README.md" if path.is_dir() else path.with_suffix(".card.md")).read_text(encoding="utf-8")
        assert card.startswith("---\n") and "w4g32 (14 weights)" in card and str(path) in card
        assert ("llama-server" if form in ("gguf", "f32") else "vllm serve") in card


def test_training_on_k_quants_beats_rounding_and_llama_cpp_runs_the_very_blocks(
    trained_model_dir: Path, prose: list[str], held_out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "train.txt").write_text(prose[0], encoding="utf-8")
    mix = ["--grid", "q2_k", "--override", "down_proj=q4_k"]
    words = ["--data", str(tmp_path / "train.txt"), "--steps", "30", "--rank", "8", "--batch-size", "4"]
    model, run, rtn = str(trained_model_dir), tmp_path / "run", tmp_path / "rtn"
    assert lrqat.cli.main(["train", model, *mix, *words, "--seq-len", "128", "--threads", "1", "--out", str(run)]) == 0
    assert lrqat.cli.main(["ptq", model, *mix, "--out", str(rtn)]) == 0
    reference = ["--reference", model]
    trained = scores(run / "fused", held_out, capsys, *reference)
    rounded = scores(rtn / "fused", held_out, capsys, *reference)
    assert trained["kl"] < 0.6 * rounded["kl"]
    path = tmp_path / "mix.gguf"
    assert exporters.cli.main([str(run), "--format", "gguf", "--out", str(path)]) == 0
    kinds = {name: info.ggml_type for name, info in GgufFile(path).tensors.items() if name.startswith("blk.0.ffn")}
    assert kinds["blk.0.ffn_down.weight"] == 12 and kinds["blk.0.ffn_up.weight"] == 10  # Q4_K and Q2_K
    status, found, _ = certificate(run, path, held_out)
    assert status == 0 and found["weights"]["equal"] == 7 * LAYERS, json.dumps(found, indent=1)


def test_the_quantized_files_are_a_fraction_of_the_reference(exported: dict[str, Path]) -> None:
    small, large = exported["gguf"].stat().st_size, exported["f32"].stat().st_size
    assert small < 0.5 * large


@pytest.fixture(scope="module")
def passed(run: Path, exported: dict[str, Path], held_out: Path) -> tuple[int, dict[str, Any], Path]:
    return certificate(run, exported["gguf"], held_out)


def test_llama_cpp_serves_what_was_trained_and_the_certificate_says_so(
    passed: tuple[int, dict[str, Any], Path], exported: dict[str, Path]
) -> None:
    status, found, path = passed
    assert status == 0 and found["verdict"] == "pass", json.dumps(found, indent=1)
    assert found["weights"] == {"equal": 7 * LAYERS, "total": 7 * LAYERS, "differing": []}
    assert found["token_ids_equal"] is True
    assert found["logits"]["passed"] and found["logits"]["figures"]["positions"] == 4 * 127
    assert found["runtime"].startswith("llama.cpp")
    assert path.parent == exported["gguf"].parent


def test_the_positive_control_is_exact_and_the_negative_control_fails(
    passed: tuple[int, dict[str, Any], Path],
) -> None:
    controls = passed[1]["controls"]
    assert controls["positive"]["passed"] and controls["positive"]["figures"]["top1"] == 1.0
    assert not controls["negative"]["passed"]
    assert controls["negative"]["figures"]["kl"] > 3 * passed[1]["logits"]["figures"]["kl"]


def test_the_certificate_names_the_very_files_it_is_about(
    passed: tuple[int, dict[str, Any], Path], run: Path, exported: dict[str, Path], trained_model_dir: Path
) -> None:
    import hashlib

    hashes = passed[1]["hashes"]
    assert hashes["exported"] == {"model.gguf": hashlib.sha256(exported["gguf"].read_bytes()).hexdigest()}
    assert hashes["base"] == hashlib.sha256((trained_model_dir / "model.safetensors").read_bytes()).hexdigest()
    fused_index = hashlib.sha256((run / "fused" / "fused.json").read_bytes()).hexdigest()
    assert hashes["fused"]["fused.json"] == fused_index and "model.safetensors" in hashes["fused"]


def test_one_flipped_bit_of_one_code_fails_the_certificate_and_names_the_tensor(
    run: Path, exported: dict[str, Path], held_out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    forged = tmp_path / "forged.gguf"
    shutil.copy(exported["gguf"], forged)
    offset = GgufFile(forged).tensors["blk.1.ffn_up.weight"].offset
    data = bytearray(forged.read_bytes())
    data[offset + 18 * 40 + 2] ^= 0x10  # Q4_0 block 40: 2 bytes of scale, then two codes a byte
    forged.write_bytes(data)
    status, found, _ = certificate(run, forged, held_out, "--no-controls")
    assert status == 1 and found["verdict"] == "fail"
    assert found["weights"] == {"equal": 7 * LAYERS - 1, "total": 7 * LAYERS, "differing": [TAMPERED]}
    assert TAMPERED in capsys.readouterr().out


def test_a_forged_dense_tensor_fails_the_certificate_too(
    run: Path, exported: dict[str, Path], held_out: Path, tmp_path: Path
) -> None:
    forged = tmp_path / "forged.gguf"
    shutil.copy(exported["f32"], forged)
    data = bytearray(forged.read_bytes())
    data[GgufFile(forged).tensors["output_norm.weight"].offset] ^= 1
    forged.write_bytes(data)
    status, found, _ = certificate(run, forged, held_out, "--no-controls")
    assert status == 1 and found["weights"]["differing"] == ["model.norm.weight"]


def test_another_models_file_fails(
    trained_model_dir: Path, exported: dict[str, Path], held_out: Path, tmp_path: Path
) -> None:
    assert lrqat.cli.main(["ptq", str(trained_model_dir), "--grid", "w4g32", "--out", str(tmp_path)]) == 0
    path = tmp_path / "trained.gguf"
    shutil.copy(exported["gguf"], path)
    status, found, _ = certificate(tmp_path, path, held_out, "--no-controls")
    assert status == 1 and len(found["weights"]["differing"]) == 7 * LAYERS


def test_llama_cpp_answers_with_the_fake_quant_models_greedy_tokens(run: Path, exported: dict[str, Path]) -> None:
    from lrqat.models import fake_quant_model, fused_tokenizer
    from serve.llamacpp import LlamaCpp

    checkpoint = FusedCheckpoint.load(run)
    tokenizer = fused_tokenizer(checkpoint)
    ids = tokenizer("The statement is executed when the")["input_ids"]
    with torch.no_grad():
        expected = fake_quant_model(checkpoint).generate(
            torch.tensor([ids]), max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0
        )
    with LlamaCpp(exported["f32"], 64, exact=True) as model:
        assert model.tokenize("The statement is executed when the", add_special=True) == ids
        assert model.greedy(ids, 8) == expected[0, len(ids) :].tolist()


def test_a_directory_is_certified_with_the_tokenizer_of_its_checkpoint_alone(
    run: Path, exported: dict[str, Path]
) -> None:
    found, own = read_assets(exported["gptq"]), FusedCheckpoint.load(run).assets
    assert tokenizer_files(found) == tokenizer_files({**own, "generation_config.json": b"{}"})
    assert tokenizer_files({**found, "tokenizer.json": b"{}"}) != tokenizer_files(own)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none.gguf"], "no such file or directory"),
        (["{gguf}", "--runtime", "vllm"], "vllm does not read this format"),
        (["{gguf}", "--text", "none.txt"], "none.txt"),
        (["{gptq}", "--python", "none"], "give --python an interpreter that has vLLM"),
        (["{gguf}", "--out", "none/certificate.json"], "no directory none for the certificate"),
        (["{gguf}", "--sequences", "0"], ""),
        (["{gguf}", "--seq-len", "1"], ""),
        (["{gguf}", "--seq-len", "100000000"], "less than one block"),
    ],
)
def test_a_parity_check_that_cannot_be_is_one_line_and_leaves_no_certificate(
    run: Path,
    exported: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    out = tmp_path / "certificate.json"
    arguments = [word.format(**{k: str(v) for k, v in exported.items()}) for word in words]
    assert serve.parity_cli.main([str(run), arguments[0], "--out", str(out), *arguments[1:]]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error:") and message in error and not out.exists()
