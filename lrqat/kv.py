"""Keys and values rounded as a quantized KV cache holds them: one range for each token and key-value head.

    k^ = per_token(RoPE(k)),   v^ = per_token(v)     asymmetric (`lrqat.activations`), over the D values of a head
    q^ = per_token(RoPE(q))                          where activations are rounded too, to their bits

A cache stores a token once and reads it often; its range is its own alone, so rounding what is read gives what would
have been stored, and no token sees a later one. The attention's output is left to `activations`; scores are not
rounded. The gradient passes straight through.

Source: LR-QAT's W4A8KV8, W4A8KV4 and W4A4KV4 (arXiv 2406.06385; its code's pattern "na.k.v.qe.ke.ao.nm.mm"). There
k_proj's and v_proj's outputs are rounded, where the heads of a token share one range, to 4 bits in KV4, and keys
behind RoPE once more, to the activations' bits, as are queries. Here keys are rounded once, behind RoPE, with a range
per head: what vLLM's caches int8_per_token_head and int4_per_token_head keep.

Works where transformers lets an attention function be registered (`AttentionInterface`): the model's layers call ours,
which rounds and calls theirs (sdpa). Refuses models that do not ask it in every layer: those with attention of their
own, with layers of another kind, or with a compressed cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lrqat.activations import per_token
from lrqat.errors import LrqatError

BASE = "sdpa"  # the attention function of transformers that computes


def round_kv(model: Any, bits: int, query_bits: int | None = None) -> None:
    """From now on the model's attention sees rounded keys and values.

    Args:
        model: a transformers causal language model.
        bits: of a key's or value's code.
        query_bits: of a query's; None: queries stay as they are.

    Raises:
        LrqatError: not every layer would round them.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    what = type(model).__name__
    config = model.config.get_text_config()
    if model.config._attn_implementation != BASE:
        found = model.config._attn_implementation
        raise LrqatError(f"kv: {what} computes attention by {found!r}, expected {BASE!r}; leave --kv out")
    if getattr(config, "kv_lora_rank", None):
        raise LrqatError(f"kv: {what} caches compressed keys and values, which lrqat cannot round; leave --kv out")
    name, seen = f"lrqat_kv{bits}_q{query_bits}", set[int]()
    attend = rounding(sdpa_attention_forward, bits, query_bits)

    def counted(module: Any, *arguments: Any, **options: Any) -> Any:
        seen.add(id(module))
        return attend(module, *arguments, **options)

    AttentionMaskInterface.register(name, sdpa_mask)
    AttentionInterface.register(name, counted)
    try:
        model.set_attn_implementation(name)
        with torch.no_grad():
            model.base_model(torch.zeros(1, 2, dtype=torch.int64, device=model.device), use_cache=False)
    finally:
        AttentionInterface.register(name, attend)
    if len(seen) != config.num_hidden_layers:
        model.set_attn_implementation(BASE)
        raise LrqatError(
            f"kv: {what} has {config.num_hidden_layers} layers, of which {len(seen)} take their attention from "
            "transformers' interface; lrqat would not round the others; leave --kv out"
        )


def check_kv(model: Any, bits: int) -> None:
    """Refuse what `round_kv` would refuse, and leave the model as it is."""
    round_kv(model, bits)
    model.set_attn_implementation(BASE)


def rounding(attend: Callable[..., Any], bits: int, query_bits: int | None = None) -> Callable[..., Any]:
    """The attention function `attend` on rounded keys and values, and queries if asked to."""

    def on_rounded(module: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Any:
        """query [B, heads, T, D]; key, value [B, key-value heads, T, D]."""
        if query_bits is not None:
            query = per_token(query, query_bits, symmetric=False)
        key = per_token(key, bits, symmetric=False)
        value = per_token(value, bits, symmetric=False)
        return attend(module, query, key, value, *rest, **options)

    return on_rounded
