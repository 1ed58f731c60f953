"""The architectures that GGUF export knows: one row of FAMILIES each, as llama.cpp and transformers have them.

Sources: ggml-org/llama.cpp conversion/{llama,qwen,gemma,phi,smollm,olmo}.py, src/models/*.cpp (load_arch_hparams,
load_arch_tensors and the graphs), llama_model_rope_type in src/llama-model.cpp; transformers' configuration_*.py and
modeling_*.py of each model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lrqat.errors import LrqatError

Config = Mapping[str, Any]
ELSEWHERE = "export with --format gptq"

# HF module of a block -> its GGUF name; {} is the number of an expert.
QKVO = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
}
QK_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
MLP = {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
PRE_NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
POST_NORMS = {"post_attention_layernorm": "post_attention_norm", "post_feedforward_layernorm": "post_ffw_norm"}
QWEN_EXPERTS = {
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.{}.gate_proj": "ffn_gate_exps",
    "mlp.experts.{}.up_proj": "ffn_up_exps",
    "mlp.experts.{}.down_proj": "ffn_down_exps",
}
MIXTRAL_EXPERTS = {
    "block_sparse_moe.gate": "ffn_gate_inp",
    "block_sparse_moe.experts.{}.w1": "ffn_gate_exps",
    "block_sparse_moe.experts.{}.w3": "ffn_up_exps",
    "block_sparse_moe.experts.{}.w2": "ffn_down_exps",
}


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
        name: llama.cpp's name, `general.architecture`.
        modules: HF module of a block -> GGUF name.
        interleaved: rows of q and k change their order.
        biases: part of a module's name -> the flag of config.json that gives it a bias (None: always has one).
        ropes: rope types that llama.cpp computes here.
        theta: transformers' default rope base.
        square: heads * head_dim must be hidden_size.
        flagged_window: `sliding_window` counts only where `use_sliding_window` says so.
        norm_shift: what is added to the weights of norms.
        experts: feed-forward layers are a mixture of experts.
        fixed: key of config.json -> (the only value llama.cpp computes, transformers' default).
        also: one more refusal: config -> what is wrong, or None.
    """

    name: str
    modules: Mapping[str, str]
    interleaved: bool = False
    biases: Mapping[str, str | None] = field(default_factory=dict)
    ropes: tuple[str, ...] = ("default", "linear", "yarn")
    theta: float = 10000.0
    square: bool = False
    flagged_window: bool = False
    norm_shift: float = 0.0
    experts: bool = False
    fixed: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    also: Callable[[Config], str | None] = lambda config: None


def heads_of(config: Config) -> tuple[int, int, int]:
    """(heads, key-value heads, features of a head)."""
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    return heads, kv_heads, config.get("head_dim") or config["hidden_size"] // heads


def local_layers(config: Config) -> list[bool]:
    """Gemma 3: which layers see a window only."""
    layers = range(config["num_hidden_layers"])
    every = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or 6
    kinds = config.get("layer_types") or ["sliding_attention" if (i + 1) % every else "full_attention" for i in layers]
    return [kind == "sliding_attention" for kind in kinds]


def period(config: Config) -> int:
    """Gemma 3: the first layer that sees everything, counted from 1 (one past the last when none does)."""
    return [*local_layers(config), False].index(False) + 1


def _gemma3(config: Config) -> str | None:
    """The scale of attention and the pattern of layers, which llama.cpp derives by itself."""
    heads, _, head_dim = heads_of(config)
    layers = config["num_hidden_layers"]
    scalar = config["hidden_size"] // heads if layers == GEMMA3_27B_LAYERS else head_dim
    if (found := config.get("query_pre_attn_scalar", 256)) != scalar:
        return f"query_pre_attn_scalar {found}: llama.cpp's gemma3 computes with {scalar}"
    if local_layers(config) != [bool((i + 1) % period(config)) for i in range(layers)]:
        return "layer_types: llama.cpp's gemma3 has every n-th layer global, the n-th being the first"
    if any(local_layers(config)) and not config.get("sliding_window"):
        return "config.json: no sliding_window"
    return None


def _smollm3(config: Config) -> str | None:
    """Every fourth layer goes without rope, in llama.cpp's code."""
    every = config.get("no_rope_layer_interval", 4)
    layers = range(1, config["num_hidden_layers"] + 1)
    found = config.get("no_rope_layers") or [int(i % every != 0) for i in layers]
    return None if found == [int(i % 4 != 0) for i in layers] else f"no_rope_layers {found}: llama.cpp has every fourth"


GEMMA3_27B_LAYERS = 62  # the model whose scale of attention is not that of its heads
NO_BIAS = {"attention_bias": (False, False)}
GELU_TANH = "gelu_pytorch_tanh"
ALL_ROPES = ("default", "linear", "yarn", "llama3")

FAMILIES = {
    "LlamaForCausalLM": Family(
        "llama",
        {**PRE_NORMS, **QKVO, **MLP},
        interleaved=True,
        biases={"self_attn.": "attention_bias", "mlp.": "mlp_bias"},
        ropes=ALL_ROPES,
        fixed={"hidden_act": ("silu", "silu")},
    ),
    "MistralForCausalLM": Family(
        "llama", {**PRE_NORMS, **QKVO, **MLP}, interleaved=True, ropes=ALL_ROPES, fixed={"hidden_act": ("silu", "silu")}
    ),
    "MixtralForCausalLM": Family(
        "llama",
        {**PRE_NORMS, **QKVO, **MIXTRAL_EXPERTS},
        interleaved=True,
        ropes=ALL_ROPES,
        theta=1e6,
        experts=True,
        fixed={"hidden_act": ("silu", "silu")},
    ),
    "Qwen2ForCausalLM": Family(
        "qwen2",
        {**PRE_NORMS, **QKVO, **MLP},
        biases={"q_proj": None, "k_proj": None, "v_proj": None},
        square=True,
        flagged_window=True,
        fixed={"hidden_act": ("silu", "silu")},
    ),
    "Qwen3ForCausalLM": Family(
        "qwen3",
        {**PRE_NORMS, **QKVO, **QK_NORMS, **MLP},
        flagged_window=True,
        fixed={"hidden_act": ("silu", "silu"), **NO_BIAS},
    ),
    "Qwen3MoeForCausalLM": Family(
        "qwen3moe",
        {**PRE_NORMS, **QKVO, **QK_NORMS, **QWEN_EXPERTS},
        flagged_window=True,
        experts=True,
        fixed={
            "hidden_act": ("silu", "silu"),
            **NO_BIAS,
            "norm_topk_prob": (True, False),
            "decoder_sparse_step": (1, 1),
            "mlp_only_layers": ([], []),
        },
    ),
    "Gemma3ForCausalLM": Family(
        "gemma3",
        {
            **QKVO,
            **QK_NORMS,
            **MLP,
            **POST_NORMS,
            "input_layernorm": "attn_norm",
            "pre_feedforward_layernorm": "ffn_norm",
        },
        ropes=("default", "linear"),
        theta=1e6,
        norm_shift=1.0,
        fixed={
            "hidden_activation": (GELU_TANH, GELU_TANH),
            **NO_BIAS,
            "attn_logit_softcapping": (None, None),
            "use_bidirectional_attention": (False, False),
        },
        also=_gemma3,
    ),
    "Phi3ForCausalLM": Family(
        "phi3",
        {
            **PRE_NORMS,
            "self_attn.qkv_proj": "attn_qkv",
            "self_attn.o_proj": "attn_output",
            "mlp.gate_up_proj": "ffn_up",
            "mlp.down_proj": "ffn_down",
        },
        ropes=("default", "longrope"),
        square=True,
        fixed={"hidden_act": ("silu", "silu")},
    ),
    "SmolLM3ForCausalLM": Family(
        "smollm3",
        {**PRE_NORMS, **QKVO, **MLP},
        interleaved=True,
        theta=2e6,
        flagged_window=True,
        fixed={"hidden_act": ("silu", "silu"), **NO_BIAS, "mlp_bias": (False, False)},
        also=_smollm3,
    ),
    "Olmo2ForCausalLM": Family(
        "olmo2",
        {**QKVO, **QK_NORMS, **MLP, **POST_NORMS},
        square=True,
        fixed={"hidden_act": ("silu", "silu"), **NO_BIAS, "tie_word_embeddings": (False, False)},
    ),
}


def family_of(config: Config) -> Family:
    """The row that config.json names; refuses the others."""
    name = ", ".join(map(str, config.get("architectures") or [config.get("model_type", "none")]))
    if name not in FAMILIES:
        raise LrqatError(f"architecture {name}: GGUF export knows {', '.join(FAMILIES)}; {ELSEWHERE}")
    return FAMILIES[name]
