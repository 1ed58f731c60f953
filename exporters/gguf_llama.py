"""The Llama architecture in GGUF: names, metadata, and the order of the rows of q and k.

Hugging Face rotates feature i of a head with feature i + d/2, llama.cpp's Llama rotates neighbours (2i, 2i + 1). So
the rows of every head of q_proj and k_proj (weights and biases) are interleaved on the way out:

    head of 4 rows:   HF  a0 a1 b0 b1   ->   GGUF  a0 b0 a1 b1

Source: ggml-org/llama.cpp conversion/llama.py (LlamaModel.permute, set_gguf_parameters, generate_extra_tensors).

Refuses: other architectures, activations other than SiLU, rope scaling other than llama3 and linear, a partial rotary
factor, missing and unknown tensors, shapes that contradict config.json.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lrqat.errors import LrqatError

ARCHITECTURE = "LlamaForCausalLM"
ROPE_FREQS = "rope_freqs.weight"

# HF name -> GGUF name; `{}` is the number of the block.
TOP_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
BLOCK_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
BIASES = {".self_attn.": "attention_bias", ".mlp.": "mlp_bias"}  # part of a name: the flag of config.json
REQUIRED = (
    "vocab_size",
    "max_position_embeddings",
    "hidden_size",
    "num_hidden_layers",
    "intermediate_size",
    "num_attention_heads",
    "rms_norm_eps",
)


def gguf_names(blocks: int) -> dict[str, str]:
    """HF name -> GGUF name of every tensor that the architecture can have."""
    names = dict(TOP_NAMES)
    for block in range(blocks):
        for hf, gguf in BLOCK_NAMES.items():
            for suffix in ("weight", "bias"):
                names[f"model.layers.{block}.{hf}.{suffix}"] = f"blk.{block}.{gguf}.{suffix}"
    return names


def rope_heads(name: str, heads: int, kv_heads: int) -> int | None:
    """Heads whose rows are interleaved in this tensor (HF name), or None when its rows stay."""
    module = name.rpartition(".")[0]
    return {"q_proj": heads, "k_proj": kv_heads}.get(module.rpartition(".")[2])


def interleave(rows: Tensor, heads: int) -> Tensor:
    """Rows in HF's order -> in GGUF's; any trailing axes (columns, groups, none)."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def deinterleave(rows: Tensor, heads: int) -> Tensor:
    """The inverse of `interleave`."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def check(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], tied_head: bool) -> None:
    """Refuse what this file's table cannot express, before anything is written."""
    architectures = config.get("architectures") or [config.get("model_type", "none")]
    if list(architectures) != [ARCHITECTURE]:
        raise LrqatError(
            f"architecture {', '.join(map(str, architectures))}: GGUF export knows {ARCHITECTURE} only; "
            "export with --format gptq"
        )
    if config.get("hidden_act", "silu") != "silu":
        raise LrqatError(f"hidden_act {config['hidden_act']}: llama.cpp's Llama computes SiLU only")
    if absent := [key for key in REQUIRED if key not in config]:
        raise LrqatError(f"config.json: no {absent[0]}; use the model's own config.json")
    _rope_factors(config)
    names = gguf_names(config["num_hidden_layers"])
    if unknown := sorted(shapes.keys() - names.keys()):
        raise LrqatError(f"{unknown[0]}: llama.cpp's Llama has no such tensor (config.json has {ARCHITECTURE})")
    biased = [part for part, flag in BIASES.items() if config.get(flag)]
    needed = {name for name in names if name.endswith(".weight") or any(part in name for part in biased)}
    needed -= {name for name in names if name.endswith("norm.bias") or (tied_head and name == "lm_head.weight")}
    if missing := sorted(needed - shapes.keys()):
        raise LrqatError(f"{missing[0]}: missing from the fused checkpoint, which config.json says has it")
    heads, kv_heads, head_dim = _heads(config)
    rows = {"embed_tokens": config["vocab_size"], "q_proj": heads * head_dim, "k_proj": kv_heads * head_dim}
    for name, shape in shapes.items():
        expected = rows.get(name.split(".")[-2])
        if expected is not None and shape[0] != expected:
            raise LrqatError(f"{name}: {shape[0]} rows, but config.json says {expected}; use the model's config.json")


def add_metadata(writer: Any, config: Mapping[str, Any]) -> None:
    """Write the `llama.*` keys to a gguf.GGUFWriter."""
    from gguf import RopeScalingType

    heads, kv_heads, head_dim = _heads(config)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(float(_rope(config).get("rope_theta", 10000.0)))
    writer.add_rope_dimension_count(head_dim)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    if _rope_type(config) == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(_rope(config)["factor"]))


def rope_freqs(config: Mapping[str, Any]) -> Tensor | None:
    """Llama 3's rope scaling: what llama.cpp divides each frequency by, float32 [head_dim / 2]."""
    factors = _rope_factors(config)
    return None if factors is None else torch.tensor(factors, dtype=torch.float32)


def _rope_factors(config: Mapping[str, Any]) -> list[float] | None:
    kind, rope = _rope_type(config), _rope(config)
    if kind not in ("default", "linear", "llama3") or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise LrqatError(
            f"rope {rope}: GGUF export carries rope_type default, linear and llama3 of whole heads; "
            "export with --format gptq"
        )
    if kind != "llama3":
        return None
    head_dim = _heads(config)[2]
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    context = rope["original_max_position_embeddings"]
    factors = []
    for i in range(0, head_dim, 2):
        turns = context / (2 * math.pi * rope["rope_theta"] ** (i / head_dim))  # within the original context
        smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
        factors.append(1 / ((1 - smooth) / factor + smooth))
    return factors


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rope settings as transformers 5 has them; transformers 4 kept theta beside the scaling."""
    older = config.get("rope_scaling") or {}
    return {"rope_theta": config.get("rope_theta", 10000.0), **older, **(config.get("rope_parameters") or {})}


def _rope_type(config: Mapping[str, Any]) -> str:
    rope = _rope(config)
    return str(rope.get("rope_type", rope.get("type", "default")))


def _heads(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """(heads, key-value heads, features of a head)."""
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    return heads, kv_heads, config.get("head_dim") or config["hidden_size"] // heads
