"""Layers: which linears are quantized, what is left alone, and the check at every fuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lrqat.assign import Assignment
from lrqat.grid import Grid
from lrqat.layers import QuantLinear, dense_tensors, fuse_model, quantizers, swap
from lrqat.methods.lr_qat import LRQAT
from lrqat.plan import plan
from lrqat.ranges import start
from lrqat.sites import Site


def make(site: Site, weight_OI: Tensor, grid: Grid) -> LRQAT:
    """A quantizer as training makes them."""
    return LRQAT(
        weight_OI,
        start(weight_OI, grid, None, site.name),
        grid,
        rank=4,
        alpha=4.0,
        downcast="fixed",
        learn_scales=True,
        generator=torch.Generator().manual_seed(0),
    )


def swapped(model: Any, *overrides: str, skip: tuple[str, ...] = ()) -> list[str]:
    """Swap; gives the names of the quantized weights."""
    decided = plan(model, Assignment.make(Grid.parse("w4g32"), overrides, skip))
    swap(model, decided, make)
    return list(decided.grids)


@pytest.fixture
def model(tiny_model_dir: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()


def test_all_linears_but_the_head_are_swapped_under_their_own_names(model: Any) -> None:
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    names = swapped(model)
    assert sorted(names) == sorted(n for n in before if n.endswith("_proj.weight")) and len(names) == 14
    assert list(quantizers(model)) == names
    assert isinstance(model.lm_head, nn.Linear)
    dense = dense_tensors(model)
    assert dense.keys() == before.keys() - set(names)
    assert all(torch.equal(dense[name], before[name]) for name in dense)


def test_only_the_methods_parameters_are_trained(model: Any) -> None:
    swapped(model)
    trained = {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"a_OR", "b_RI", "scales"}


def test_skipped_linears_stay_dense(model: Any) -> None:
    names = swapped(model, skip=(r"layers\.0\.", "down_proj"))
    assert len(names) == 6 and not [n for n in names if "layers.0." in n or "down_proj" in n]
    assert "model.layers.0.mlp.up_proj.weight" in dense_tensors(model)


def test_each_weight_is_on_its_own_grid(model: Any) -> None:
    swapped(model, "re:.*down_proj=q4_k", "layers.1.self_attn=w8g64")
    grids = {name: str(quantizer.grid) for name, quantizer in quantizers(model).items()}
    assert grids["model.layers.0.mlp.down_proj.weight"] == "q4_k"
    assert grids["model.layers.1.self_attn.q_proj.weight"] == "w8g64"
    assert grids["model.layers.0.self_attn.q_proj.weight"] == "w4g32"


def test_the_swapped_model_computes_with_the_rounded_weights(model: Any, tiny_model_dir: Path) -> None:
    swapped(model)
    plain = AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()
    for name, quantizer in quantizers(model).items():
        plain.get_parameter(name).data.copy_(quantizer.fuse().dequantize())
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain(ids).logits)


def test_a_bias_is_added_trained_by_nobody_and_kept(model: Any) -> None:
    linear = nn.Linear(64, 32)
    holder = nn.Sequential(linear, nn.Linear(32, 32))
    swapped(holder)
    assert isinstance(holder[0], QuantLinear)
    x = torch.randn(3, 64)
    expected = x @ holder[0].quantizer.weight().T + linear.bias
    assert torch.allclose(holder[0](x), expected, atol=1e-6)  # 64 float32 products in another order
    assert torch.equal(dense_tensors(holder)["0.bias"], linear.bias) and not holder[0].bias.requires_grad


def test_a_weight_that_does_not_fuse_to_its_forward_is_never_saved(model: Any, tmp_path: Path) -> None:
    swapped(model)
    checkpoint = fuse_model(model, {}, {}, {})
    name, quantizer = next(iter(quantizers(model).items()))
    assert torch.equal(checkpoint.tensors[name].dequantize(), quantizer.weight())
    honest = quantizer.fuse

    def dishonest() -> Any:
        fused = honest()
        fused.codes_OI[0, 0] ^= 1
        return fused

    quantizer.fuse = dishonest  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match=f"{name}: the fused weight is not the weight of the training forward"):
        checkpoint.save(tmp_path / "fused")
    assert not list(tmp_path.iterdir())


def test_dense_tensors_go_back_to_the_checkpoints_dtype_where_it_holds_them(tiny_model_dir: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.bfloat16).float().eval()
    swapped(model)
    model.model.norm.weight.data.mul_(1 + 2**-12)  # more digits than bfloat16 has
    model.model.register_buffer("places", torch.arange(5))
    checkpoint = fuse_model(model, {"dtype": "bfloat16"}, {}, {})
    wide = {name for name, tensor in checkpoint.dense.items() if tensor.dtype != torch.bfloat16}
    assert wide == {"model.norm.weight", "model.places"}
    assert checkpoint.dense["model.places"].dtype == torch.int64
    whole = model.state_dict()
    assert all(torch.equal(tensor.to(whole[name].dtype), whole[name]) for name, tensor in checkpoint.dense.items())
    assert {name: tensor.dtype for name, tensor in checkpoint.dense.items()} == {
        name: spec.dtype for name, spec in checkpoint.dense_specs.items()
    }
    assert checkpoint.dense_specs["model.embed_tokens.weight"].dtype == torch.bfloat16
