"""Whole models as they come: each architecture is rounded, saved, loaded and computes the same; each trains."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from lrqat.assign import Assignment
from lrqat.begin import swap_for_training, tell_uncalibrated
from lrqat.fused import FusedCheckpoint, SafetensorsDirectory
from lrqat.grid import Grid
from lrqat.layers import fuse_model, quantizers, swap
from lrqat.losses import body_and_head
from lrqat.methods.lr_qat import LRQAT
from lrqat.methods.rounded import Rounded
from lrqat.models import fake_quant_model
from lrqat.plan import plan
from lrqat.ptq import rtn
from lrqat.settings import Beginning, TrainSettings
from lrqat.sites import TRAINED, Site, checkpoint_tensors
from lrqat.trainer import LossModel

SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
# logits of both models: the same float32 products, in another order where attention or experts choose one
FLOAT32_SUMS = 2e-5
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"tie_word_embeddings": True},
    "gemma3_text": {"final_logit_softcapping": 2.0, "query_pre_attn_scalar": 16, "sliding_window": 16},
    "phi3": {},
    "smollm3": {"tie_word_embeddings": True},
    "olmo2": {},
    "qwen3_moe": {**MIXTURE, "norm_topk_prob": True},
    "qwen2_moe": {**MIXTURE, "shared_expert_intermediate_size": 64},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": MIXTURE,
}


def tiny(model_type: str, **changes: Any) -> Any:
    """A random model; biases are not zero."""
    config = AutoConfig.for_model(model_type, **{**SIZES, **ARCHITECTURES[model_type], **changes})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.data.add_(0.1 * torch.randn_like(parameter))
            elif ".experts." in name or name.endswith("gate.weight"):
                parameter.data.normal_(0, 0.2)
    return model.eval()


def config_of(model: Any) -> dict[str, Any]:
    return dict(model.config.to_dict())


def round_all(model: Any, *overrides: str, skip: tuple[str, ...] = ()) -> None:
    """Swap for round-to-nearest."""

    def make(site: Site, weight_OI: Tensor, grid: Grid) -> Rounded:
        return Rounded(rtn(weight_OI, grid, None, site.name), weight_OI.device)

    swap(model, plan(model, Assignment.make(Grid.parse("w4g32"), overrides, skip)), make)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(torch.arange(3, 40)[None], use_cache=False).logits


def reload(model: Any, directory: Path) -> tuple[FusedCheckpoint, Any]:
    """(the fused checkpoint of a swapped model from disk, the model that holds its weights)."""
    fuse_model(model, config_of(model), {}, {}).save(directory)
    loaded = FusedCheckpoint.load(directory)
    return loaded, fake_quant_model(loaded)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_rounded_model_is_saved_and_loaded_and_computes_the_same(model_type: str, tmp_path: Path) -> None:
    model = tiny(model_type)
    names = checkpoint_tensors(model).keys()
    model.save_pretrained(tmp_path / "theirs")
    round_all(model)
    loaded, other = reload(model, tmp_path / "ours")
    tied = {"lm_head.weight"} if loaded.tied_head else set()
    assert loaded.tensors.keys() | loaded.dense.keys() | tied == names
    assert SafetensorsDirectory(tmp_path / "theirs").specs.keys() | tied == names, "names are those on disk"
    assert loaded.counts()["quantized"] + loaded.counts()["dense"] == sum(p.numel() for p in other.parameters())
    wanted = logits(model)
    assert (logits(other) - wanted).abs().max() <= FLOAT32_SUMS * wanted.abs().max()


@pytest.mark.parametrize("model_type", ARCHITECTURES)
@pytest.mark.parametrize("loss", ["kd", "ce"])
def test_a_training_step_has_gradients_and_its_head_is_the_models(model_type: str, loss: str) -> None:
    model = tiny(model_type)
    ids = torch.arange(3, 40)[None]
    body, _ = body_and_head(model)  # refuses a head that it does not know
    teacher = body(ids).last_hidden_state.detach() if loss == "kd" else None
    settings = TrainSettings(model="m", out="o", rank=4)
    swap_for_training(model, plan(model, settings.assignment, settings.rank), settings)
    value = LossModel(model).train()(ids, teacher)["loss"]
    value.backward()
    if loss == "ce":
        expected = model(ids, labels=ids).loss
        assert value.item() == pytest.approx(expected.item(), rel=FLOAT32_SUMS)
    grads = {name: q.b_RI.grad for name, q in quantizers(model).items() if isinstance(q, LRQAT)}
    assert len(grads) == len(quantizers(model)) and value.item() > 0
    assert all(g is not None and g.any() for name, g in grads.items() if ".experts." not in name)
    assert any(g is not None and g.any() for name, g in grads.items() if ".experts." in name) or not any(
        ".experts." in name for name in grads
    )
    assert not [n for n, p in model.named_parameters() if p.requires_grad and "quantizer" not in n]


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral"])
def test_experts_apart_compute_what_experts_together_do(model_type: str) -> None:
    model, apart = tiny(model_type), tiny(model_type)
    apart.set_experts_implementation("eager")
    model.set_experts_implementation("eager")
    # every expert is taken apart for the sake of one
    round_all(apart, skip=(r"experts\.(?!0\.(down_proj|w2))", "self_attn"))
    one = {name: q.fuse().dequantize() for name, q in quantizers(apart).items()}
    assert len(one) == 2
    for name, tensor in checkpoint_tensors(model).items():
        if name in one:
            tensor.copy_(one[name])
    assert torch.equal(logits(apart), logits(model))


def test_a_calibrated_start_says_that_it_leaves_the_head_and_embeddings_to_rounding(
    capsys: pytest.CaptureFixture[str],
) -> None:
    both = ("lm_head=w8g32", "embed_tokens=w4g32")
    decided = plan(tiny("qwen3_moe", tie_word_embeddings=False), Assignment.make(Grid.parse("w4g32"), both))
    assert sum(".experts." in name for name in decided.grids) > 0
    gptq = Beginning("gptq", data=("text",), blocks=2)
    assert tell_uncalibrated(decided, gptq) == {"rounded_to_nearest": 2}
    numbers = sum(math.prod(decided.sites[name].shape) for name in ("lm_head.weight", "model.embed_tokens.weight"))
    told = f"2 of {len(decided.grids)} weights, {numbers / decided.weights:.0%} of all numbers, are rounded"
    assert told in capsys.readouterr().err
    assert tell_uncalibrated(decided, Beginning()) == {}
    for name in ("llama", "qwen3_moe"):
        own = plan(tiny(name), Assignment.make(Grid.parse("w4g32")))
        assert tell_uncalibrated(own, gptq) == {} and not capsys.readouterr().err


def test_a_mixture_trains_fuses_and_reloads(tmp_path: Path) -> None:
    model = tiny("qwen3_moe")
    model.set_experts_implementation("eager")
    ids = torch.randint(0, 96, (2, 37), generator=torch.Generator().manual_seed(0))
    body, _ = body_and_head(model)
    teacher = body(ids).last_hidden_state.detach()
    settings = TrainSettings(
        model="m", out="o", grid="w3g32", rank=4, override=("down_proj=w4g32-asym",), skip=(r"layers\.1\..*\.3\.up",)
    )
    decided = plan(model, settings.assignment, settings.rank)
    swap_for_training(model, decided, settings)
    loss_model = LossModel(model).train()
    optimizer = torch.optim.AdamW(loss_model.trained().values(), lr=1e-2, weight_decay=0.0)
    losses, start = [], {name: q.fuse().codes_OI for name, q in quantizers(model).items()}
    for _ in range(8):
        loss = loss_model(ids, teacher)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    model.eval()
    loaded, other = reload(model, tmp_path / "fused")
    other.set_experts_implementation("eager")
    assert decided.skipped == ["model.layers.1.mlp.experts.3.up_proj.weight"]
    assert loaded.specs.keys() == start.keys() and decided.skipped[0] in loaded.dense
    assert "model.layers.0.mlp.gate.weight" in loaded.dense
    assert str(loaded.specs["model.layers.0.mlp.experts.2.down_proj.weight"].grid) == "w4g32-asym"
    moved = [name for name in start if not torch.equal(loaded.tensors[name].codes_OI, start[name])]
    assert len([name for name in moved if ".experts." in name]) > 12
    for name, tensor in checkpoint_tensors(other).items():
        if name in loaded.tensors:
            assert torch.equal(tensor, loaded.tensors[name].dequantize())
            assert torch.equal(tensor, quantizers(model)[name].weight())
    wanted = logits(model)
    assert (logits(other) - wanted).abs().max() <= FLOAT32_SUMS * wanted.abs().max()


@pytest.mark.parametrize("tied", [True, False])
def test_head_and_embeddings_are_rounded_once_and_frozen(tied: bool, tmp_path: Path) -> None:
    model = tiny("llama", tie_word_embeddings=tied)
    original = model.lm_head.weight.detach().clone()
    overrides = ["re:.*embed_tokens=w8g32-fp16", *([] if tied else ["lm_head=w4g32"])]
    settings = TrainSettings(model="m", out="o", rank=4, override=tuple(overrides))
    decided = plan(model, settings.assignment)
    swap_for_training(model, decided, settings)
    names = {"model.embed_tokens.weight"} | ({"lm_head.weight"} if not tied else set())
    assert {name for name, site in decided.sites.items() if name in decided.grids and site.kind not in TRAINED} == names
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert not torch.equal(model.lm_head.weight, original)
    for name in names:
        fused = rtn(tiny("llama", tie_word_embeddings=tied).get_parameter(name), decided.grids[name], 3.5)
        assert torch.equal(model.get_parameter(name), fused.dequantize())
        assert torch.equal(quantizers(model)[name].fuse().codes_OI, fused.codes_OI)
    assert not model.lm_head.weight.requires_grad
    loaded, other = reload(model, tmp_path / "fused")
    assert names <= loaded.specs.keys() and not {*names, "lm_head.weight"} & loaded.dense.keys()
    assert torch.equal(logits(other), logits(model))


def test_a_mixed_checkpoint_counts_its_bits(tmp_path: Path) -> None:
    model = tiny("llama")
    round_all(model, "lm_head=w8g32", "o_proj=dense")
    decided = [f"model.layers.{i}.self_attn.o_proj.weight" for i in range(2)]
    fused = fuse_model(model, config_of(model), {}, {"skipped": decided})
    found = FusedCheckpoint.load(fused.save(tmp_path / "fused")).counts()
    skipped, head, embedding, norms = 2 * 64 * 64, 96 * 64, 96 * 64, 5 * 64
    linears = sum(p.numel() for p in tiny("llama").parameters()) - skipped - head - embedding - norms
    assert (found["quantized"], found["skipped"]) == (linears + head, skipped)
    assert found["dense"] == embedding + norms
    bits = 4.5 * linears + 8.5 * head + 32 * (skipped + embedding + norms)
    assert found["bits_per_weight"] == pytest.approx(bits / sum(p.numel() for p in tiny("llama").parameters()))
