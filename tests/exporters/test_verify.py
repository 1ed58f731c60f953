"""Verification and the dense export: one bit that differs is found and named."""

from __future__ import annotations

import json
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
    grid, g = Grid(4, 32), torch.Generator().manual_seed(0)

    def make() -> FusedTensor:
        codes_OI = torch.randint(0, 16, (8, 64), generator=g, dtype=torch.uint8)
        return FusedTensor(codes_OI, grid.to_wire(torch.randn(8, 2, generator=g)).half(), None, grid)

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
def exported(checkpoint: FusedCheckpoint) -> dict[str, Tensor]:
    weights = {name: tensor.dequantize() for name, tensor in checkpoint.tensors.items()}
    return {**weights, **{name: tensor.float().clone() for name, tensor in checkpoint.dense.items()}}


def flip(tensor: Tensor) -> None:
    """Change the last bit of one float32."""
    tensor.view(torch.int32)[0, 1] ^= 1


def test_what_is_equal_is_counted(checkpoint: FusedCheckpoint, exported: dict[str, Tensor]) -> None:
    assert count_equal(checkpoint, exported) == (3, 3, [])
    assert verify(checkpoint, exported, "here") == 3


def test_one_bit_of_one_weight_is_found_and_named(checkpoint: FusedCheckpoint, exported: dict[str, Tensor]) -> None:
    flip(exported["b.weight"])
    assert count_equal(checkpoint, exported) == (2, 3, ["b.weight"])
    with pytest.raises(LrqatError, match=r"^x\.gguf: 1 tensors differ from the checkpoint, the first is b\.weight$"):
        verify(checkpoint, exported, "x.gguf")


def test_one_bit_of_a_dense_tensor_is_found_and_named(checkpoint: FusedCheckpoint, exported: dict[str, Tensor]) -> None:
    flip(exported["embed.weight"])
    assert count_equal(checkpoint, exported) == (3, 3, ["embed.weight"])
    with pytest.raises(LrqatError, match=r"embed\.weight"):
        verify(checkpoint, exported, "x")


@pytest.mark.parametrize("name", ["a.weight", "norm.weight"])
def test_a_missing_tensor_is_found(checkpoint: FusedCheckpoint, exported: dict[str, Tensor], name: str) -> None:
    del exported[name]
    assert count_equal(checkpoint, exported)[2] == [name]


@pytest.mark.parametrize(
    "change", [lambda t: t.T.contiguous(), lambda t: t[:, :32], lambda t: torch.full_like(t, torch.nan)]
)
def test_another_shape_and_nan_differ(checkpoint: FusedCheckpoint, exported: dict[str, Tensor], change: object) -> None:
    assert callable(change)
    exported["c.weight"] = change(exported["c.weight"])
    assert count_equal(checkpoint, exported) == (2, 3, ["c.weight"])


def test_the_dense_export_is_the_checkpoint_in_float32(checkpoint: FusedCheckpoint, tmp_path: Path) -> None:
    path = dense.write(checkpoint, tmp_path / "dense")
    found = dense.read(path)
    assert verify(checkpoint, found, path) == 3
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    assert json.loads((path / "config.json").read_text()) == {"model_type": "llama", "dtype": "float32"}
    assert (path / "tokenizer.json").read_bytes() == b"{}"
    assert [p.name for p in tmp_path.iterdir()] == ["dense"]


def test_transformers_computes_with_the_dense_export_as_with_the_fake_quant_model(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    from lrqat.models import fake_quant_model, locate
    from lrqat.ptq import quantize

    fused = quantize(locate(str(tiny_model_dir)), Grid(4, 32), 3.5, (), torch.float32, tmp_path)
    found = FusedCheckpoint.load(fused)
    model = AutoModelForCausalLM.from_pretrained(dense.write(found, tmp_path / "dense")).eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, fake_quant_model(found)(ids).logits)
