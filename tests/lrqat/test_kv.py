"""Rounded keys and values: each token and head on its own grid, gradients straight through, causality kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lrqat.activations import per_token
from lrqat.errors import LrqatError
from lrqat.kv import check_kv, round_kv, rounding

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


@pytest.fixture
def load(tiny_model_dir: Path) -> Callable[[], Any]:
    return lambda: AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval().requires_grad_(False)


@pytest.fixture
def qkv() -> tuple[Tensor, Tensor, Tensor]:
    """Query [1, 4, 6, 8] and key and value [1, 2, 6, 8], whose tokens and heads differ in size by up to 1000."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 6, 8, generator=generator) for heads in (4, 2, 2))
    size = 10.0 ** torch.linspace(-2, 1, 12).view(1, 2, 6, 1)
    return q, k * size, v * size.flip(2)


def seen(qkv: tuple[Tensor, Tensor, Tensor], bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """What the attention function gets."""
    found: list[Tensor] = []

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> None:
        found.extend((query, key, value))
        assert options == {"scaling": 0.5}

    rounding(attend, bits)(None, *qkv, scaling=0.5)
    return found[0], found[1], found[2]


@pytest.mark.parametrize("bits", [4, 8])
def test_each_token_and_head_errs_by_half_a_step_of_its_own_range(
    qkv: tuple[Tensor, Tensor, Tensor], bits: int
) -> None:
    query, *rounded = seen(qkv, bits)
    assert torch.equal(query, qkv[0])
    for exact, found in zip(qkv[1:], rounded, strict=True):
        step = (exact.amax(-1).clamp(min=0) - exact.amin(-1).clamp(max=0)) / ((1 << bits) - 1)
        error = (found - exact).abs().amax(-1)
        assert torch.all(error <= 0.5001 * step) and torch.all(error > 0)
        assert step.max() > 100 * step.min()  # one range for all would have erred by that much more


def test_queries_are_rounded_to_the_bits_of_activations(qkv: tuple[Tensor, Tensor, Tensor]) -> None:
    found: list[Tensor] = []
    rounding(lambda _module, *qkv: found.extend(qkv), 8, 4)(None, *qkv)
    for exact, rounded, bits in zip(qkv, found, (4, 8, 8), strict=True):
        assert torch.equal(rounded, per_token(exact, bits, symmetric=False)) and not torch.equal(rounded, exact)


def test_a_token_is_rounded_the_same_whatever_the_other_tokens_and_heads_are(
    qkv: tuple[Tensor, Tensor, Tensor],
) -> None:
    _, key, value = seen(qkv, 4)
    for head in range(2):
        for token in range(6):
            alone = tuple(x[:, [head], token : token + 1] for x in qkv)
            _, k, v = seen((qkv[0], alone[1], alone[2]), 4)
            assert torch.equal(k[0, 0, 0], key[0, head, token]) and torch.equal(v[0, 0, 0], value[0, head, token])


def test_the_gradient_is_that_of_attention_at_the_rounded_point(qkv: tuple[Tensor, Tensor, Tensor]) -> None:
    def grads(q: Tensor, k: Tensor, v: Tensor, attend: Callable[..., Any]) -> tuple[Tensor, ...]:
        leaves = [x.clone().requires_grad_(True) for x in (q, k, v)]
        module = torch.nn.Module()
        module.num_key_value_groups, module.is_causal = 2, True  # type: ignore[assignment]
        output = attend(module, *leaves, None, scaling=0.3)[0]
        weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
        return torch.autograd.grad((output * weight).sum(), leaves)

    q, k, v = qkv
    ours = grads(q, k, v, rounding(sdpa_attention_forward, 4))
    k_, v_ = (per_token(x, 4, symmetric=False) for x in (k, v))
    expected = grads(q, k_, v_, sdpa_attention_forward)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    assert not torch.equal(ours[0], grads(q, k, v, sdpa_attention_forward)[0])


def test_keys_are_rounded_after_rope_and_in_the_whole_model(load: Callable[[], Any]) -> None:
    ids = torch.arange(20)[None]
    model, exact = load(), load()
    round_kv(model, 4)
    errors = []
    for bits in (4, 8):
        round_kv(other := load(), bits)
        errors.append((other(ids).logits - exact(ids).logits).abs().max().item())
    assert errors[0] > 5 * errors[1] > 0
    assert torch.equal(exact(ids).logits, load()(ids).logits)  # a model that nobody asked for is left alone

    caught: list[Tensor] = []
    attention = model.model.layers[0].self_attn
    hook = attention.k_proj.register_forward_hook(lambda _m, _a, out: caught.append(out))
    states = model.model.layers[0].input_layernorm(model.model.embed_tokens(ids))
    rope = model.model.rotary_emb(states, torch.arange(20)[None])
    output, _ = attention(states, position_embeddings=rope, attention_mask=None)
    hook.remove()

    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q, k, v = (
        project(states).view(1, 20, -1, 64).transpose(1, 2)
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    q, k = apply_rotary_pos_emb(q, k, *rope)
    k, v = (per_token(x, 4, symmetric=False).repeat_interleave(2, dim=1) for x in (k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
    torch.testing.assert_close(output, attention.o_proj(expected), rtol=1e-5, atol=1e-6)  # float32 sums


@pytest.mark.parametrize("bits", [4, 8])
def test_no_token_sees_a_later_one(load: Callable[[], Any], bits: int) -> None:
    model = load()
    round_kv(model, bits)
    ids = torch.randint(0, 400, (1, 24), generator=torch.Generator().manual_seed(0))
    whole = model(ids, use_cache=False).logits
    changed = ids.clone()
    changed[0, 12:] = (changed[0, 12:] + 7) % 400
    other = model(changed, use_cache=False).logits
    assert torch.equal(whole[:, :12], other[:, :12]) and not torch.equal(whole[:, 12:], other[:, 12:])


def test_decoding_with_a_cache_gives_what_one_pass_gives(load: Callable[[], Any]) -> None:
    model = load().double()  # the rounding itself is in float32
    round_kv(model, 4)
    ids = torch.randint(0, 400, (1, 10), generator=torch.Generator().manual_seed(0))
    whole = model(ids, use_cache=False).logits
    past, rows = None, []
    for token in ids[0]:
        found = model(token.view(1, 1), past_key_values=past, use_cache=True)
        past = found.past_key_values
        rows.append(found.logits)
    torch.testing.assert_close(torch.cat(rows, 1), whole, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (Gemma3ForCausalLM, Gemma3TextConfig(**SMALL)),
        (Qwen3ForCausalLM, Qwen3Config(**SMALL)),
        (MixtralForCausalLM, MixtralConfig(**SMALL, num_local_experts=2)),
    ],
    ids=["gemma3", "qwen3", "mixtral"],
)
def test_architectures_that_ask_transformers_for_attention_are_taken(kind: Any, config: Any) -> None:
    model = kind(config).eval().requires_grad_(False)
    ids = torch.arange(12)[None]
    exact = model(ids).logits
    check_kv(model, 4)
    assert torch.equal(model(ids).logits, exact)  # only asked
    round_kv(model, 4)
    assert not torch.equal(model(ids).logits, exact)


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (BloomForCausalLM, "eager"),
        (MambaForCausalLM, "MambaForCausalLM"),
    ],
)
def test_architectures_with_attention_of_their_own_are_refused_in_one_line(model: Any, named: str) -> None:
    config = BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)
    if model is MambaForCausalLM:
        config = MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4)
    with pytest.raises(LrqatError, match=rf"^kv: [^\n]*{named}[^\n]*leave --kv out$"):
        round_kv(model(config).eval(), 8)
