"""Every block type in llama.cpp: it computes with the very weights that the fake-quant model has."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from exporters import gguf
from exporters.gguf_blocks import BLOCK_TYPES
from lrqat.fused import FusedCheckpoint, FusedTensor, Lazy
from lrqat.gguf_file import GgufFile
from lrqat.grid import Grid
from lrqat.models import fake_quant_model, locate
from lrqat.ptq import quantize
from serve.compare import EXACT, LLAMACPP, Comparison, within

pytest.importorskip("xllamacpp", reason="pip install 'lrqat[llamacpp]'")

TOKENS = [int(t) for t in np.random.default_rng(0).integers(3, 400, 200)]
SPELLINGS = [str(kind.grid) for kind in BLOCK_TYPES.values()] + ["w3", "w4-asym", "w2-asym"]


@pytest.fixture(scope="module")
def lively_model_dir(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    """A model 256 wide whose linears matter, but not so much that rounded activations change many first tokens."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(tiny_model_dir)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(2 if name.endswith("_proj.weight") else 5 if "embed" in name else 1)
    directory = tmp_path_factory.mktemp("lively")
    model.save_pretrained(directory)
    for path in tiny_model_dir.glob("token*"):
        (directory / path.name).write_bytes(path.read_bytes())
    return directory


def logits(checkpoint: FusedCheckpoint) -> np.ndarray:
    """Of the fake-quant model, float32."""
    with torch.no_grad():
        found: np.ndarray = fake_quant_model(checkpoint)(torch.tensor([TOKENS])).logits[0].numpy()
    return found


def figures(reference_TV: np.ndarray, path: Path, exact: bool) -> dict[str, float]:
    """How far llama.cpp is from it."""
    from serve.llamacpp import LlamaCpp

    comparison = Comparison()
    with LlamaCpp(path, n_ctx=256, exact=exact) as runtime:
        comparison.add(reference_TV, runtime.logits(TOKENS), TOKENS)
    return comparison.figures()


def signed(checkpoint: FusedCheckpoint) -> FusedCheckpoint:
    """Every second row negated, by its floats: scales may be negative in every type that has a sign for them."""

    def make(name: str) -> FusedTensor:
        tensor = checkpoint.tensors[name]
        for part in tensor.parts.values():
            if part.dtype == torch.float16:
                part[1::2].neg_()
        return tensor

    return replace(checkpoint, tensors=Lazy(checkpoint.specs, make))


def shifted(checkpoint: FusedCheckpoint) -> FusedCheckpoint:
    """One layer's codes moved by a column: what a wrong order of nibbles does, or less."""

    def make(name: str) -> FusedTensor:
        tensor = checkpoint.tensors[name]
        wrong = name.endswith("layers.1.mlp.up_proj.weight")
        return replace(tensor, codes_OI=tensor.codes_OI.roll(1, dims=1)) if wrong else tensor

    return replace(checkpoint, tensors=Lazy(checkpoint.specs, make))


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_llama_cpp_computes_what_the_fake_quant_model_does(
    lively_model_dir: Path, tmp_path: Path, spelling: str
) -> None:
    grid = Grid.parse(spelling)
    fused = quantize(locate(str(lively_model_dir)), grid, None, (), torch.float32, tmp_path)
    checkpoint = signed(FusedCheckpoint.load(fused))
    path = gguf.write(checkpoint, tmp_path / "x.gguf")
    kind = gguf.block_type(grid, (256, 256))
    assert {info.ggml_type for info in GgufFile(path).tensors.values()} == {kind.ggml_type, gguf.F32}
    reference_TV = logits(checkpoint)
    found, wrong = figures(reference_TV, path, False), figures(logits(shifted(checkpoint)), path, False)
    control = figures(reference_TV, gguf.write(checkpoint, tmp_path / "f32.gguf", dequantized=True), True)
    assert within(found, LLAMACPP), found
    assert not within(wrong, LLAMACPP), wrong
    assert within(control, EXACT), control
