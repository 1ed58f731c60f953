"""AWQ's scales and rotations: folded into the dense model, which computes what it did; rounding then costs less."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lrqat.assign import Assignment
from lrqat.errors import LrqatError
from lrqat.evaluate import score
from lrqat.grid import Grid
from lrqat.plan import Plan, plan
from lrqat.ranges import start
from lrqat.starts.awq import awq_fold
from lrqat.starts.codes import rounded
from lrqat.starts.fold import LlamaLayer, check_norm
from lrqat.starts.rotation import orthogonal, rotate
from tests.lrqat import small

# A fold rounds each weight once more (2^-24 relative); logits are sums of a few hundred such products through two
# layers, and were seen to move by 2e-6 of the largest.
FLOAT32_FOLD = 2e-5


def llama(**options: Any) -> Any:
    """Two layers of 4 heads of 16 on 2 values, with norms away from one."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=96,
        hidden_size=96,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        **options,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval().requires_grad_(False)
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.3, 3.0)
            elif "bias" in name:
                parameter.normal_(0, 0.1)
            elif "embed" not in name:
                parameter.mul_(3)
    return model


def tokens(count: int = 4) -> Tensor:
    return torch.randint(0, 96, (count, 32), generator=torch.Generator().manual_seed(0))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(tokens()).logits
    return found


def same_function(before: Tensor, after: Tensor) -> bool:
    return bool((before - after).abs().max() <= FLOAT32_FOLD * before.abs().max())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("values", [False, True])
def test_a_rotated_model_computes_the_same(values: bool, bias: bool) -> None:
    model = llama(tie_word_embeddings=False, attention_bias=bias, mlp_bias=bias)
    before, embedding = logits(model), model.model.embed_tokens.weight.clone()
    rotate(model, 0, values=values)
    assert same_function(before, logits(model))
    assert not torch.allclose(model.model.embed_tokens.weight, embedding, atol=1e-3)
    assert all((p == 1).all() for name, p in model.named_parameters() if "norm" in name)


def test_a_fused_qkv_has_its_values_rotated_too() -> None:
    from transformers import Phi3Config, Phi3ForCausalLM

    sizes = {"hidden_size": 96, "intermediate_size": 160, "num_attention_heads": 6, "num_key_value_heads": 2}
    config = Phi3Config(vocab_size=96, num_hidden_layers=2, pad_token_id=0, tie_word_embeddings=False, **sizes)
    found = []
    for values in (False, True):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = Phi3ForCausalLM(config).eval().requires_grad_(False)
        before = logits(model)
        rotate(model, 0, values=values)
        assert same_function(before, logits(model))
        found.append(model.model.layers[1].self_attn.qkv_proj.weight)
    fused, queries_and_keys = found[0], 96 + 2 * 16
    assert torch.equal(found[1][:queries_and_keys], fused[:queries_and_keys])
    assert not torch.allclose(found[1][queries_and_keys:], fused[queries_and_keys:], atol=1e-3)


def test_another_seed_is_another_rotation_and_the_same_seed_the_same() -> None:
    found = []
    for seed in (0, 0, 1):
        model = llama(tie_word_embeddings=False)
        rotate(model, seed)
        found.append(model.model.layers[1].self_attn.v_proj.weight)
    assert torch.equal(found[0], found[1]) and not torch.allclose(found[0], found[2], atol=1e-3)


def test_a_tied_head_is_refused_with_its_cost_or_untied() -> None:
    model = llama(tie_word_embeddings=True)
    before = logits(model)
    with pytest.raises(LrqatError, match=r"^Llama[^\n]*costs 9216 more parameters[^\n]*$"):
        rotate(model, 0)
    assert torch.equal(before, logits(model)), "refused, and changed"
    rotate(model, 0, untie=True)
    assert same_function(before, logits(model))
    assert not model.config.tie_word_embeddings
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()


def test_an_outlier_is_spread_over_all_channels() -> None:
    model = llama(tie_word_embeddings=False)
    model.model.embed_tokens.weight[:, 7] *= 100
    model.model.layers[0].self_attn.q_proj.weight[:, 7] *= 30
    grid, weight_OI = Grid.parse("w4"), model.model.layers[0].self_attn.q_proj.weight

    def noise(weight_OI: Tensor) -> float:
        off_OI = weight_OI - rounded(weight_OI, start(weight_OI, grid, None), grid).dequantize()
        return (off_OI.square().sum() / weight_OI.square().sum()).item()

    model.model.layers[0].input_layernorm.weight.fill_(1)
    before = noise(weight_OI)
    rotate(model, 0)
    assert noise(weight_OI) < 0.5 * before


@pytest.mark.parametrize("size", [1, 2, 64, 96, 576, 15])
def test_rotations_are_orthogonal(size: int) -> None:
    r = orthogonal(size, torch.Generator().manual_seed(0))
    assert torch.allclose(r @ r.T, torch.eye(size, dtype=torch.float64), atol=1e-12)
    if size == 64:
        assert torch.allclose(r.abs(), torch.full_like(r, 1 / 8))


@pytest.mark.parametrize("options", [{}, {"attention_bias": True, "mlp_bias": True}])
@pytest.mark.parametrize("spelling", ["w3g32", "w4"])
def test_awq_folds_without_a_change_of_function(spelling: str, options: dict[str, Any]) -> None:
    model = llama(**options)
    before, norm = logits(model), model.model.layers[0].input_layernorm.weight.clone()
    chosen = awq_fold(model, plan(model, Assignment(Grid.parse(spelling))), tokens(), None)
    assert same_function(before, logits(model))
    assert len(chosen) == 8 and all(0 <= alpha < 1 for alpha in chosen.values()) and max(chosen.values()) > 0
    assert set(chosen) >= {"model.layers.0.input_layernorm", "model.layers.1.mlp.up_proj"}
    assert chosen["model.layers.0.input_layernorm"] == 0 or not torch.equal(
        norm, model.model.layers[0].input_layernorm.weight
    )


def test_awq_leaves_a_place_alone_where_nothing_is_quantized() -> None:
    model = llama()
    kept = model.model.layers[0].mlp.down_proj.weight.clone()
    planned = plan(model, Assignment.make(Grid.parse("w4"), skip=["down_proj"]))
    assert "model.layers.0.mlp.up_proj" not in awq_fold(model, planned, tokens(), None)
    assert torch.equal(kept, model.model.layers[0].mlp.down_proj.weight)


def test_values_shared_by_heads_share_their_scales() -> None:
    layer = LlamaLayer(llama().model.layers[0], "layer")
    source_I = layer.value_of_inputs()
    assert source_I.tolist() == [*range(16), *range(16), *range(16, 32), *range(16, 32)]


def test_a_model_that_a_rotation_would_change_is_refused() -> None:
    # BitNet's modules have llama's names, and norms behind attention and in the MLP that no name tells of.
    from transformers import BitNetConfig, BitNetForCausalLM

    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model = BitNetForCausalLM(BitNetConfig(**sizes, **heads, **ids, tie_word_embeddings=False)).requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.uniform_(0.3, 3.0)
    with pytest.raises(LrqatError, match="changed its logits by"):
        rotate(model, 0)


def test_a_norm_without_a_weight_is_refused() -> None:
    with pytest.raises(LrqatError, match="has no weight"):
        check_norm(nn.RMSNorm(8, elementwise_affine=False), "norm")


def test_layers_of_another_kind_are_refused() -> None:
    from transformers import Gemma2Config, GPT2Config, GPT2LMHeadModel
    from transformers.models.gemma2.modeling_gemma2 import Gemma2DecoderLayer, Gemma2RMSNorm

    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=32, n_embd=32, n_layer=1, n_head=2))
    with pytest.raises(LrqatError, match="not a llama-like layer"):
        rotate(gpt2, 0)
    small = Gemma2Config(
        hidden_size=32, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1, head_dim=16
    )
    with pytest.raises(LrqatError, match="not a llama-like layer"):
        LlamaLayer(Gemma2DecoderLayer(small, 0), "layer")
    with pytest.raises(LrqatError, match="no plain RMSNorm"):
        check_norm(Gemma2RMSNorm(32), "layer")
    with pytest.raises(LrqatError, match="no plain RMSNorm"):
        check_norm(nn.LayerNorm(32), "layer")


def test_awq_repairs_what_unbalanced_channels_cost(trained_model_dir: Path, prose: list[str], tmp_path: Path) -> None:
    """Outlier channels, as large models have them, without a change of function: norms times u, readers by u."""
    texts = small.cut(trained_model_dir, prose, tmp_path, 128, 16)

    def load() -> Any:
        model = small.load(trained_model_dir)
        generator = torch.Generator().manual_seed(0)
        for number, layer in enumerate(model.model.layers):
            for norm, readers in LlamaLayer(layer, str(number)).norms:
                u_I = torch.randn(len(norm.weight), generator=generator).exp()
                norm.weight.mul_(u_I)
                for reader in readers:
                    reader.weight.div_(u_I)
        return model

    def divergence(model: Any, planned: Plan) -> float:
        for name, grid in planned.grids.items():
            weight_OI = model.get_parameter(name)
            weight_OI.copy_(rounded(weight_OI, start(weight_OI, grid, 2.0), grid).dequantize())
        found = score(model, texts[1], full).kl
        assert found is not None
        return found

    full, model = load(), load()
    planned = plan(model, Assignment(Grid.parse("w4")))
    before = divergence(load(), planned)
    awq_fold(model, planned, texts[0], 2.0)
    after = divergence(model, planned)
    assert after < 0.7 * before
