"""llama.cpp itself runs our files: token ids, logits, greedy text, refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import gguf_reader as reader
from transformers import LlamaConfig, LlamaForCausalLM

from exporters import gguf
from lrqat.errors import LrqatError
from lrqat.fused import FusedCheckpoint, FusedSpec, Spec, read_assets, read_json
from lrqat.grid import Grid
from lrqat.ptq import rtn

pytest.importorskip("xllamacpp", reason="pip install 'lrqat[llamacpp]'")

from serve import llama_abi, llamacpp, parity
from serve.llamacpp import LlamaCpp

# float32 noise: 2 layers of sums over at most 512 terms, 2^-24 * sqrt(512) each, with room for the softmax.
F32_TOLERANCE = 1e-5
# llama.cpp rounds activations to 8 bits (Q8_0) before each matrix: 2^-8 / sqrt(3) of their block's maximum.
Q8_TOLERANCE = 3e-2


def fuse(model: LlamaForCausalLM, directory: Path, grid: Grid) -> FusedCheckpoint:
    """The decoder's linears rounded to nearest; the model takes the rounded weights too, so it is the reference."""
    weights = dict(model.named_parameters())
    names = [name for name in weights if name.endswith("_proj.weight")]

    tensors = {name: rtn(weights[name].detach(), grid, None, name) for name in names}
    for name, tensor in tensors.items():
        weights[name].data.copy_(tensor.dequantize())
    dense = {name: weight.detach() for name, weight in weights.items() if name not in tensors}
    return FusedCheckpoint(
        tensors,
        dense,
        {name: FusedSpec(t.grid, tuple(t.codes_OI.shape)) for name, t in tensors.items()},  # type: ignore[arg-type]
        {name: Spec(t.dtype, tuple(t.shape)) for name, t in dense.items()},
        json.loads(model.config.to_json_string(use_diff=False)) | {"architectures": ["LlamaForCausalLM"]},
        read_assets(directory),
    )


def model_of(directory: Path, **config: Any) -> LlamaForCausalLM:
    """A random model like the tiny one, with biases and norms that are not their own initial values."""
    settings = {k: v for k, v in read_json(directory / "config.json").items() if k != "model_type"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**{**settings, **config})).float().eval()
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def reference_logits(model: LlamaForCausalLM, token_ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([token_ids])).logits[0].numpy()


def relative_l2(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


TOKENS = [int(t) for t in np.random.default_rng(0).integers(0, 400, 100)]


@pytest.fixture(scope="module")
def runtime(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaCpp]:
    checkpoint = fuse(model_of(tiny_model_dir), tiny_model_dir, Grid.parse("w4g32"))
    path = gguf.write(checkpoint, tmp_path_factory.mktemp("llamacpp") / "w4.gguf")
    with LlamaCpp(path, n_ctx=256) as runtime:
        yield runtime


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"tie_word_embeddings": False},
        {"num_key_value_heads": 4},
        {"attention_bias": True, "mlp_bias": True},
        {"head_dim": 32},
        {"rope_parameters": LLAMA3_ROPE},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}},
    ],
    ids=["gqa-tied", "untied", "mha", "biases", "head-dim", "rope-llama3", "rope-linear"],
)
def test_the_f32_reference_reproduces_the_hugging_face_model(
    tiny_model_dir: Path, tmp_path: Path, config: dict[str, Any]
) -> None:
    model = model_of(tiny_model_dir, **config)
    path = gguf.write(fuse(model, tiny_model_dir, Grid.parse("w4g32")), tmp_path / "f32.gguf", dequantized=True)
    with LlamaCpp(path, n_ctx=256, exact=True) as runtime:
        ours, theirs = runtime.logits(TOKENS), reference_logits(model, TOKENS)
    assert relative_l2(ours, theirs) < F32_TOLERANCE
    assert np.array_equal(ours.argmax(-1), theirs.argmax(-1))


@pytest.mark.parametrize("grid", ["w4g32", "w4", "w3g64", "w2", "w8g32", "w5"])
def test_a_quantized_file_computes_with_the_trained_weights(tiny_model_dir: Path, tmp_path: Path, grid: str) -> None:
    model = model_of(tiny_model_dir)
    path = gguf.write(fuse(model, tiny_model_dir, Grid.parse(grid)), tmp_path / "q.gguf")
    with LlamaCpp(path, n_ctx=256) as runtime:
        assert relative_l2(runtime.logits(TOKENS), reference_logits(model, TOKENS)) < Q8_TOLERANCE


def test_logits_do_not_depend_on_the_sequence_before_nor_on_how_they_are_batched(
    runtime: LlamaCpp, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = runtime.logits(TOKENS)
    runtime.logits(TOKENS[:7])
    assert np.array_equal(runtime.logits(TOKENS), first)
    monkeypatch.setattr(llamacpp, "LOGITS_BATCH", 64)
    assert relative_l2(runtime.logits(TOKENS), first) < Q8_TOLERANCE


def test_greedy_text_follows_the_likeliest_token(runtime: LlamaCpp) -> None:
    found = runtime.greedy(TOKENS, 5)
    assert len(found) == 5
    logits_TV = runtime.logits(TOKENS + found)
    assert logits_TV[len(TOKENS) - 1 : -1].argmax(-1).tolist() == found


def test_sequences_that_do_not_fit_are_refused(runtime: LlamaCpp) -> None:
    with pytest.raises(LrqatError, match="257 positions, where n_ctx is 256"):
        runtime.logits([1] * 257)
    with pytest.raises(LrqatError, match="token ids 1 to 448, where the file has 448"):
        runtime.logits([1, 448])
    with pytest.raises(LrqatError, match="0 positions"):
        runtime.logits([])


def test_the_build_names_llama_cpp_and_its_package(runtime: LlamaCpp) -> None:
    assert runtime.build.startswith("llama.cpp ") and llama_abi.XLLAMACPP in runtime.build


def test_a_damaged_file_is_one_line_and_llama_cpp_stays_silent(
    runtime: LlamaCpp, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path, data = tmp_path / "cut.gguf", runtime.path.read_bytes()
    for content in (b"", b"GGUF", data[: len(data) // 2], data.replace(b"llama.block_count", b"llama.block_cOunt")):
        path.write_bytes(content)
        with pytest.raises(LrqatError, match=r"^[^\n]*cut\.gguf[^\n]*$"):
            LlamaCpp(path)
    with pytest.raises(LrqatError, match="no such file"):
        LlamaCpp(tmp_path / "none.gguf")
    assert capfd.readouterr() == ("", "")


def test_a_vocabulary_on_which_llama_cpp_would_abort_is_refused(runtime: LlamaCpp, tmp_path: Path) -> None:
    path, data = tmp_path / "twice.gguf", runtime.path.read_bytes()
    path.write_bytes(data.replace(b"[PAD446]", b"[PAD447]", 1))
    with pytest.raises(LrqatError, match=r"twice\.gguf: token '\[PAD447\]' occurs twice"):
        LlamaCpp(path)
    path.write_bytes(data.replace(b"[PAD446]", b"e\0AD446]", 1))
    with pytest.raises(LrqatError, match=r"twice\.gguf: token 'e' occurs twice"):
        LlamaCpp(path)


def test_a_file_tokenizes_like_its_model_unless_texts_end_or_chats_are_put_otherwise(
    runtime: LlamaCpp, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    like = parity.llamacpp(threads=1).tokenizes_like
    assert like is not None and like(runtime.path, tiny_tokenizer)
    changed = shutil.copy(runtime.path, tmp_path / "ends.gguf")
    field = reader.GGUFReader(changed, "r+").fields["tokenizer.ggml.eos_token_id"]
    field.parts[field.data[0]][0] -= 1
    field.parts[field.data[0]].base.flush()
    assert not like(changed, tiny_tokenizer)
    template = tiny_tokenizer.chat_template.encode()
    content = runtime.path.read_bytes()
    assert content.count(template) == 1
    changed.write_bytes(content.replace(template, template.replace(b"message in", b"massage in")))
    assert not like(changed, tiny_tokenizer)


def test_another_release_of_xllamacpp_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_abi, "version", lambda name: "2020.1.1")
    with pytest.raises(LrqatError, match=r"xllamacpp 2020\.1\.1 is installed, .*; pip install 'lrqat\[llamacpp\]'"):
        llama_abi.library.__wrapped__()


def test_structures_whose_defaults_differ_are_refused() -> None:
    params = llama_abi.library().llama_context_default_params()
    llama_abi.check_layout(params, llama_abi.CONTEXT_DEFAULTS)
    params.n_ubatch = 77
    with pytest.raises(LrqatError, match="n_ubatch is 77 by default, expected 512"):
        llama_abi.check_layout(params, llama_abi.CONTEXT_DEFAULTS)
