"""Verification and the dense export: one bit that differs is found and named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from exporters import dense
from exporters.verify import count_equal, verify
from lrqat.errors import LrqatError
from lrqat.fused import FusedCheckpoint, FusedSpec, FusedTensor, Spec
from lrqat.grid import Grid

NAMES = ["a.weight", "b.weight", "c.weight"]


@pytest.fixture
def checkpoint() -> FusedCheckpoint:
    grid, g = Grid.parse("w4g32"), torch.Generator().manual_seed(0)

    def make() -> FusedTensor:
        codes_OI = torch.randint(0, 16, (8, 64), generator=g, dtype=torch.uint8)
        return FusedTensor.make(codes_OI, {"scales": torch.randn(8, 2, generator=g).bfloat16()}, grid)

    kept = {"norm.weight": torch.rand(64, generator=g).bfloat16(), "embed.weight": torch.rand(5, 64, generator=g)}
    return FusedCheckpoint(
        tensors={name: make() for name in NAMES},
        dense=kept,
        specs={name: FusedSpec(grid, (8, 64)) for name in NAMES},
        dense_specs={name: Spec(t.dtype, tuple(t.shape)) for name, t in kept.items()},
        hf_config={"model_type": "llama", "dtype": "bfloat16"},
        assets={"tokenizer.json": b"{}"},
    )


@pytest.fixture
def exported(checkpoint: FusedCheckpoint) -> FusedCheckpoint:
    """A copy whose tensors may be changed."""
    tensors = {
        name: FusedTensor(t.codes_OI.clone(), {k: part.clone() for k, part in t.parts.items()}, t.grid)
        for name, t in checkpoint.tensors.items()
    }
    return replace(checkpoint, tensors=tensors, dense={n: t.clone() for n, t in checkpoint.dense.items()})


def with_dense(exported: FusedCheckpoint, **changes: Tensor) -> FusedCheckpoint:
    """These tensors dense, whatever they were."""
    changed = {name.replace("_", "."): tensor for name, tensor in changes.items()}
    tensors = {name: tensor for name, tensor in exported.tensors.items() if name not in changed}
    return replace(exported, tensors=tensors, dense={**exported.dense, **changed})


def test_what_is_equal_is_counted(checkpoint: FusedCheckpoint, exported: FusedCheckpoint) -> None:
    assert count_equal(checkpoint, exported) == (3, 3, [])
    assert verify(checkpoint, exported, "here") == 3


def test_weights_are_compared_whatever_they_are_spelled_in(
    checkpoint: FusedCheckpoint, exported: FusedCheckpoint
) -> None:
    eight = checkpoint.tensors["a.weight"]
    wider = FusedTensor(eight.codes_OI + 120, eight.parts, Grid.parse("w8g32"))
    found = with_dense(exported, b_weight=checkpoint.tensors["b.weight"].dequantize())
    found = replace(found, tensors={**found.tensors, "a.weight": wider})
    assert count_equal(checkpoint, found) == (3, 3, [])


@pytest.mark.parametrize("part", ["codes", "scales"])
def test_one_bit_of_one_weight_is_found_and_named(
    checkpoint: FusedCheckpoint, exported: FusedCheckpoint, part: str
) -> None:
    changed = exported.tensors["b.weight"]
    (changed.codes_OI if part == "codes" else changed.parts["scales"].view(torch.int16))[0, 1] ^= 1
    assert count_equal(checkpoint, exported) == (2, 3, ["b.weight"])
    with pytest.raises(LrqatError, match=r"^x\.gguf: 1 tensors differ from the checkpoint, the first is b\.weight$"):
        verify(checkpoint, exported, "x.gguf")


def test_one_bit_of_a_dense_tensor_is_found_and_named(checkpoint: FusedCheckpoint, exported: FusedCheckpoint) -> None:
    exported.dense["embed.weight"].view(torch.int32)[0, 1] ^= 1
    assert count_equal(checkpoint, exported) == (3, 3, ["embed.weight"])
    with pytest.raises(LrqatError, match=r"embed\.weight"):
        verify(checkpoint, exported, "x")


@pytest.mark.parametrize("name", ["a.weight", "norm.weight"])
def test_a_missing_and_a_stray_tensor_are_found(
    checkpoint: FusedCheckpoint, exported: FusedCheckpoint, name: str
) -> None:
    fewer = replace(
        exported,
        tensors={n: t for n, t in exported.tensors.items() if n != name},
        dense={n: t for n, t in exported.dense.items() if n != name},
    )
    assert count_equal(checkpoint, fewer)[2] == [name]
    assert count_equal(fewer, exported)[2] == [name]


@pytest.mark.parametrize(
    "change", [lambda t: t.T.contiguous(), lambda t: t[:, :32], lambda t: torch.full_like(t, torch.nan)]
)
def test_another_shape_and_nan_differ(checkpoint: FusedCheckpoint, exported: FusedCheckpoint, change: object) -> None:
    assert callable(change)
    found = with_dense(exported, c_weight=change(checkpoint.tensors["c.weight"].dequantize()))
    assert count_equal(checkpoint, found) == (2, 3, ["c.weight"])


def test_the_dense_export_is_the_checkpoint_in_float32(checkpoint: FusedCheckpoint, tmp_path: Path) -> None:
    path = dense.write(checkpoint, tmp_path / "dense")
    found = dense.read(path)
    assert verify(checkpoint, found, path) == 3
    assert {tensor.dtype for tensor in found.dense.values()} == {torch.float32} and not found.tensors
    assert json.loads((path / "config.json").read_text()) == {"model_type": "llama", "dtype": "float32"}
    assert (path / "tokenizer.json").read_bytes() == b"{}"
    assert [p.name for p in tmp_path.iterdir()] == ["dense"]


def test_transformers_computes_with_the_dense_export_as_with_the_fake_quant_model(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    from lrqat.models import fake_quant_model, locate
    from lrqat.ptq import quantize

    fused = quantize(locate(str(tiny_model_dir)), Grid.parse("w4g32"), 3.5, (), torch.float32, tmp_path)
    found = FusedCheckpoint.load(fused)
    model = AutoModelForCausalLM.from_pretrained(dense.write(found, tmp_path / "dense")).eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, fake_quant_model(found)(ids).logits)
