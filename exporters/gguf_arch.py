"""Model architectures in GGUF: one row of FAMILIES each, for tensor names, row order, metadata and what is refused.

Names. A GGUF tensor is one HF weight; or, of a mixture of experts, the stack [E, O, I] of E of them:

    blk.N.attn_q.weight         <-  model.layers.N.self_attn.q_proj.weight
    blk.N.ffn_gate_exps.weight  <-  model.layers.N.mlp.experts.0.gate_proj.weight .. experts.{E-1}

Row order. Hugging Face rotates feature i of a head with feature i + d/2. llama.cpp does the same for most
architectures (its NEOX rope), but rotates neighbours (2i, 2i + 1) for llama and smollm3. There the rows of every head
of q_proj and k_proj (weights, scales, biases) are interleaved on the way out:

    head of 4 rows:   HF  a0 a1 b0 b1   ->   GGUF  a0 b0 a1 b1

Values. Gemma computes x * (1 + w) in its norms; GGUF stores 1 + w, in float32 as transformers adds it. Nothing else
changes.

Sliding windows. llama.cpp computes them for gemma3 only. Elsewhere the context length that the file states ends
with the window, up to which both are the same.

Sources: ggml-org/llama.cpp conversion/{llama,qwen,gemma,phi,smollm,olmo}.py, src/models/*.cpp (load_arch_hparams,
load_arch_tensors and the graphs), llama_model_rope_type in src/llama-model.cpp; transformers' configuration_*.py and
modeling_*.py of each model and modeling_rope_utils.py.

Refuses, before anything is written: other architectures, missing and unknown tensors, shapes that contradict
config.json, and every setting of config.json that llama.cpp's graph does not compute.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from exporters import gguf_rope
from exporters.gguf_families import ELSEWHERE, FAMILIES, Config, Family, family_of, heads_of, local_layers, period
from lrqat.errors import LrqatError
from lrqat.fused import FusedCheckpoint, Lazy
from lrqat.gguf_file import GgufFile

MAX_EXPERTS = 512  # LLAMA_MAX_EXPERTS
EXTRA_TENSORS = gguf_rope.FACTOR_TENSORS
extra_tensors = gguf_rope.factor_tensors
REQUIRED = (
    "vocab_size",
    "max_position_embeddings",
    "hidden_size",
    "num_hidden_layers",
    "intermediate_size",
    "num_attention_heads",
    "rms_norm_eps",
)


@dataclass(frozen=True)
class Architecture:
    """A family and the numbers that names and row order depend on: all that `gguf.write` and `gguf.read` share."""

    family: Family
    blocks: int
    heads: int
    kv_heads: int
    experts: int = 0

    def names(self) -> dict[str, tuple[str, ...]]:
        """GGUF tensor -> the HF weights it holds (one, or one for each expert), in the order of the model."""
        names: dict[str, tuple[str, ...]] = {
            "token_embd.weight": ("model.embed_tokens.weight",),
            "output_norm.weight": ("model.norm.weight",),
            "output.weight": ("lm_head.weight",),
        }
        for block in range(self.blocks):
            for module, gguf in self.family.modules.items():
                experts = range(self.experts) if "{}" in module else [None]
                hf = [f"model.layers.{block}.{module}.".format(expert) for expert in experts]
                names[f"blk.{block}.{gguf}.weight"] = tuple(f"{name}weight" for name in hf)
                if any(part in module for part in self.family.biases):
                    names[f"blk.{block}.{gguf}.bias"] = tuple(f"{name}bias" for name in hf)
        return names

    def to_gguf(self, name: str, rows: Tensor) -> Tensor:
        """Rows of an HF weight (codes, scales, values, a bias: [O, ...]) in GGUF's order."""
        heads = self.interleaved_heads(name)
        return rows if heads is None else rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)

    def to_hf(self, name: str, rows: Tensor) -> Tensor:
        """The inverse of `to_gguf`."""
        heads = self.interleaved_heads(name)
        return rows if heads is None else rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)

    def shift(self, name: str) -> float:
        """What is added to the values of this HF weight, in float32."""
        return self.family.norm_shift if name.endswith("norm.weight") else 0.0

    def interleaved_heads(self, name: str) -> int | None:
        """How many heads have their rows interleaved in this HF weight, or None."""
        module = name.rpartition(".")[0].rpartition(".")[2]
        return {"q_proj": self.heads, "k_proj": self.kv_heads}.get(module) if self.family.interleaved else None


def is_stack(gguf_name: str) -> bool:
    """Whether this GGUF tensor holds the weights of all experts, [E, O, I]."""
    return gguf_name.endswith("_exps.weight")


def architecture(config: Config) -> Architecture:
    """What config.json names; refuses architectures that are not in the table."""
    family = family_of(config)
    required = (*REQUIRED, "num_experts_per_tok") if family.experts else REQUIRED
    if absent := [key for key in required if config.get(key) is None]:
        raise LrqatError(f"config.json: no {absent[0]}; use the model's own config.json")
    heads, kv_heads, _ = heads_of(config)
    return Architecture(family, config["num_hidden_layers"], heads, kv_heads, _experts(config, family))


def architecture_of(file: GgufFile) -> Architecture:
    """What a GGUF file says it holds; refuses architectures that are not in the table."""
    name = file.metadata.get("general.architecture")
    experts = file.field(f"{name}.expert_count", int) if f"{name}.expert_count" in file.metadata else 0
    family = next((f for f in FAMILIES.values() if f.name == name and f.experts == bool(experts)), None)
    if family is None:
        known = ", ".join(sorted({f.name for f in FAMILIES.values()}))
        raise LrqatError(f"{file.path}: architecture {name!r}; lrqat reads back {known}")
    heads = file.field(f"{name}.attention.head_count", int)
    kv_heads = file.field(f"{name}.attention.head_count_kv", int)
    blocks = file.field(f"{name}.block_count", int)
    whole = blocks <= len(file.tensors) and f"blk.{blocks - 1}.attn_output.weight" in file.tensors
    if not whole or heads < 1 or kv_heads < 1 or not 0 <= experts <= MAX_EXPERTS:
        raise LrqatError(
            f"{file.path}: {blocks} blocks of {heads} and {kv_heads} heads, {experts} experts; export it again"
        )
    found = Architecture(family, blocks, heads, kv_heads, experts)
    for gguf, names in found.names().items():
        split = 2 * (found.interleaved_heads(names[0]) or 1)
        if gguf in file.tensors and "attn_" in gguf and math.prod(file.tensors[gguf].shape[:1]) % split:
            raise LrqatError(f"{file.path}: {gguf} has rows of other than {split // 2} heads; export it again")
    return found


def as_stored(checkpoint: FusedCheckpoint) -> FusedCheckpoint:
    """The checkpoint with the values that can be had back from a GGUF file, for comparing with one.

    Of a norm of Gemma GGUF stores 1 + w, which is what transformers computes with; the last bits of a w below 2^-16
    are in neither.
    """
    ours = architecture(checkpoint.hf_config)

    def kept(name: str) -> Tensor:
        values, shift = checkpoint.dense[name], ours.shift(name)
        return values.to(torch.float32) + shift - shift if shift else values

    return replace(checkpoint, dense=Lazy(checkpoint.dense_specs, kept))


def check(config: Config, shapes: Mapping[str, tuple[int, ...]], tied_head: bool) -> None:
    """Refuse what llama.cpp would compute otherwise, or not load.

    Args:
        config: config.json.
        shapes: HF name -> shape of every tensor, quantized or dense.
        tied_head: the embedding is the output head too.
    """
    ours = architecture(config)
    family = ours.family
    for key, (value, default) in family.fixed.items():
        found = config.get(key, default)
        if (default if found is None else found) != value:
            raise LrqatError(f"{key} {found}: llama.cpp's {family.name} computes {value} only; {ELSEWHERE}")
    gguf_rope.check(config, family)
    if ours.experts > MAX_EXPERTS:
        raise LrqatError(f"{ours.experts} experts: llama.cpp takes {MAX_EXPERTS} at most; {ELSEWHERE}")
    if wrong := family.also(config):
        raise LrqatError(f"{wrong}; {ELSEWHERE}")
    heads, _, head_dim = heads_of(config)
    if family.square and heads * head_dim != config["hidden_size"]:
        raise LrqatError(f"head_dim {head_dim}: llama.cpp's {family.name} has hidden_size / heads only; {ELSEWHERE}")
    gguf_names = {hf: gguf for gguf, names in ours.names().items() for hf in names}
    if unknown := sorted(shapes.keys() - gguf_names.keys()):
        raise LrqatError(f"{unknown[0]}: llama.cpp's {family.name} has no such tensor; {ELSEWHERE}")
    needed = {name for name in gguf_names if name.endswith(".weight") or _biased(config, family, name)}
    if tied_head:
        needed.discard("lm_head.weight")
    if missing := sorted(needed - shapes.keys()):
        raise LrqatError(f"{missing[0]}: missing from the fused checkpoint, which config.json says has it")
    for name, shape in shapes.items():
        if tuple(shape) != (expected := _shape(config, family, gguf_names[name])):
            raise LrqatError(
                f"{name}: shape {list(shape)}, but config.json says {list(expected)}; use the model's config.json"
            )


def add_metadata(writer: Any, config: Config) -> None:
    """Write the architecture's keys to a gguf.GGUFWriter."""
    family = family_of(config)
    heads, kv_heads, head_dim = heads_of(config)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(_context(config, family))
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    if family.experts:
        writer.add_expert_count(_experts(config, family))
        writer.add_expert_used_count(config["num_experts_per_tok"])
        if "moe_intermediate_size" in config:
            writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    if family.name == "gemma3":
        if any(local_layers(config)):
            writer.add_sliding_window(config["sliding_window"])
            writer.add_sliding_window_pattern(period(config))
        if config.get("final_logit_softcapping"):
            writer.add_final_logit_softcapping(float(config["final_logit_softcapping"]))
    if family.name == "phi3":
        writer.add_sliding_window(config.get("sliding_window") or 0)
    gguf_rope.add_metadata(writer, config)


def _experts(config: Config, family: Family) -> int:
    if not family.experts:
        return 0
    count = config.get("num_local_experts") or config.get("num_experts")
    if not count:
        raise LrqatError("config.json: no num_experts; use the model's own config.json")
    return int(count)


def _biased(config: Config, family: Family, name: str) -> bool:
    """Whether config.json says that this bias exists."""
    return any(part in name and (flag is None or config.get(flag)) for part, flag in family.biases.items())


def _shape(config: Config, family: Family, gguf_name: str) -> tuple[int, ...]:
    """Of one HF weight that goes into this GGUF tensor."""
    heads, kv_heads, head_dim = heads_of(config)
    hidden, vocab, inner = config["hidden_size"], config["vocab_size"], config["intermediate_size"]
    expert = config.get("moe_intermediate_size", inner)
    queries, keys = heads * head_dim, kv_heads * head_dim
    kind, suffix = gguf_name.split(".")[-2:]
    per_head = family.name != "olmo2"  # which normalizes q and k before the split into heads
    if kind == "attn_q_norm":
        return (head_dim if per_head else queries,)
    if kind == "attn_k_norm":
        return (head_dim if per_head else keys,)
    if kind.endswith("norm"):
        return (hidden,)
    shape: tuple[int, int] = {
        "token_embd": (vocab, hidden),
        "output": (vocab, hidden),
        "attn_q": (queries, hidden),
        "attn_k": (keys, hidden),
        "attn_v": (keys, hidden),
        "attn_qkv": (queries + 2 * keys, hidden),
        "attn_output": (hidden, queries),
        "ffn_gate": (inner, hidden),
        "ffn_up": ((1 if "mlp.up_proj" in family.modules else 2) * inner, hidden),  # phi3: gate and up in one
        "ffn_down": (hidden, inner),
        "ffn_gate_inp": (_experts(config, family), hidden),
        "ffn_gate_exps": (expert, hidden),
        "ffn_up_exps": (expert, hidden),
        "ffn_down_exps": (hidden, expert),
    }[kind]
    return shape if suffix == "weight" else shape[:1]


def _context(config: Config, family: Family) -> int:
    """Positions up to which llama.cpp computes what transformers does."""
    longest = int(config["max_position_embeddings"])
    window = config.get("sliding_window")
    if family.name == "gemma3" or not window or not config.get("use_sliding_window", not family.flagged_window):
        return longest
    return min(longest, int(window))
