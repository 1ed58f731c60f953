"""The converter of a llama.cpp checkout names the tensors, our integers pass: LRQAT_LLAMA_CPP names the checkout."""

from __future__ import annotations

import os
from pathlib import Path

import gguf as reference
import numpy as np
import pytest

from exporters import gguf, gguf_foreign
from exporters.cli import main as export
from lrqat.errors import LrqatError
from tests.exporters.test_gguf_arch import (
    F32_TOLERANCE,
    MODELS,
    Q8_TOLERANCE,
    TOKENS,
    fuse,
    reference_logits,
    relative_l2,
    save_model,
)

checkout = pytest.mark.skipif("LRQAT_LLAMA_CPP" not in os.environ, reason="LRQAT_LLAMA_CPP=a llama.cpp checkout")


@pytest.mark.slow
@checkout
@pytest.mark.parametrize("name", ["llama", "qwen3-moe", "gemma3", "phi3-longrope", "olmo2"])
def test_its_tensors_are_those_of_our_own_table_byte_for_byte(tiny_model_dir: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "model").mkdir()
    checkpoint = fuse(save_model(tmp_path / "model", tiny_model_dir, *MODELS[name][1:]))
    ours = gguf.write(checkpoint, tmp_path / "ours.gguf")
    theirs = gguf_foreign.write(checkpoint, tmp_path / "theirs.gguf", Path(os.environ["LRQAT_LLAMA_CPP"]))
    ours_by, theirs_by = ({t.name: t for t in reference.GGUFReader(path).tensors} for path in (ours, theirs))
    assert ours_by.keys() == theirs_by.keys()
    for tensor_name, tensor in ours_by.items():
        other, quantized = theirs_by[tensor_name], tensor.tensor_type.name == "Q4_0"
        if quantized:
            assert other.tensor_type == tensor.tensor_type and np.array_equal(other.data, tensor.data), tensor_name
        else:
            values = [reference.quants.dequantize(t.data, t.tensor_type) for t in (tensor, other)]
            # Gemma's class drops the rows of the embedding that no token has
            assert np.array_equal(values[0][: len(values[1])], values[1]), tensor_name


@pytest.mark.slow
@checkout
def test_an_architecture_that_our_table_lacks_computes_what_transformers_does(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    pytest.importorskip("xllamacpp", reason="pip install 'lrqat[llamacpp]'")
    from serve.llamacpp import LlamaCpp

    (tmp_path / "model").mkdir()
    checkpoint = fuse(save_model(tmp_path / "model", tiny_model_dir, "starcoder2", {"sliding_window": None}))
    with pytest.raises(LrqatError, match="architecture Starcoder2ForCausalLM: GGUF export knows"):
        gguf.write(checkpoint, tmp_path / "x.gguf")
    theirs = reference_logits(checkpoint, tmp_path / "dequantized", TOKENS)
    path = gguf_foreign.write(checkpoint, tmp_path / "x.gguf", Path(os.environ["LRQAT_LLAMA_CPP"]))
    with LlamaCpp(path, n_ctx=256) as runtime:
        assert F32_TOLERANCE < relative_l2(runtime.logits(TOKENS), theirs) < Q8_TOLERANCE
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dequantized", "model", "x.gguf"]


def test_a_directory_that_is_no_checkout_is_one_line(tiny_model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    checkpoint = fuse(save_model(tmp_path / "model", tiny_model_dir, *MODELS["qwen2"][1:]))
    with pytest.raises(LrqatError, match=r"^[^\n]*no conversion/__init__\.py; name a checkout of llama\.cpp[^\n]*$"):
        gguf_foreign.write(checkpoint, tmp_path / "x.gguf", tmp_path)
    assert not (tmp_path / "x.gguf").exists()


def test_another_ones_file_is_not_replaced_and_a_reference_is_not_asked_for(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model").mkdir()
    checkpoint = fuse(save_model(tmp_path / "model", tiny_model_dir, *MODELS["qwen2"][1:]))
    (tmp_path / "x.gguf").write_bytes(b"GGUF of another tool")
    with pytest.raises(LrqatError, match="is not an export of lrqat"):
        gguf_foreign.write(checkpoint, tmp_path / "x.gguf", tmp_path)
    words = [str(checkpoint.save(tmp_path / "fused")), "--format", "gguf", "--out", str(tmp_path / "y.gguf")]
    assert export([*words, "--reference", "--llama-cpp", str(tmp_path)]) == 2
    assert "--reference: --llama-cpp writes quantized files only" in capsys.readouterr().err


def test_a_file_that_is_replaced_takes_its_certificates_with_it(tiny_model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    checkpoint = fuse(save_model(tmp_path / "model", tiny_model_dir, *MODELS["qwen2"][1:]))
    path = gguf.write(checkpoint, tmp_path / "x.gguf")
    for kind in gguf.CERTIFICATES:
        path.with_suffix(kind).touch()
    gguf.write(checkpoint, path)
    assert sorted(file.name for file in tmp_path.glob("x.*")) == ["x.gguf"]
