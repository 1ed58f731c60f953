"""Rotary embeddings in GGUF: metadata and factor tensors, from the rope settings of config.json.

    default    theta
    linear     every frequency divided by one factor (global layers only, in Gemma 3)
    llama3     a factor for each frequency: the tensor rope_freqs
    yarn       factor and original context; llama.cpp derives the rest as transformers does
    longrope   rope_factors_short within the original context, rope_factors_long beyond it, and a factor on cosines and
               sines. transformers chooses by the sequence, llama.cpp by the context that it was started with

Sources: transformers modeling_rope_utils.py; ggml-org/llama.cpp conversion/{base,llama,phi}.py, ggml_rope_yarn in
ggml/src/ggml-cpu/ops.cpp, get_rope_factors in src/llama-model.cpp.

Refuses: other rope types, those that the architecture's graph does not compute, rotation of a part of a head (but for
phi3), yarn with other than its usual parameters.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from exporters.gguf_families import ELSEWHERE, Config, Family, family_of, heads_of
from lrqat.errors import LrqatError

FACTOR_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
NEEDED: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "longrope": ("long_factor", "short_factor", "original_max_position_embeddings"),
}
LOCAL_THETA = 10000.0  # of Gemma 3's sliding layers
YARN_DEFAULTS = {"beta_fast": 32, "beta_slow": 1, "mscale": None, "mscale_all_dim": None}


def check(config: Config, family: Family) -> None:
    """Refuse what llama.cpp would rotate otherwise."""
    rope, kind = _rope(config), _rope_type(config)
    whole = family.name == "phi3" or _dims(config) == heads_of(config)[2]
    if kind not in family.ropes or not whole:
        carried = ", ".join(family.ropes)
        raise LrqatError(
            f"rope {rope}: GGUF export carries rope_type {carried} {'of whole heads ' * (family.name != 'phi3')}for "
            f"{family.name}; {ELSEWHERE}"
        )
    if absent := [key for key in NEEDED[kind] if rope.get(key) is None]:
        raise LrqatError(f"config.json: rope_type {kind} without {absent[0]}; use the model's own config.json")
    local = _rope(config, "sliding_attention")
    if family.name == "gemma3" and (found := local.get("rope_type", "default")) != "default":
        raise LrqatError(f"rope_type {found} of sliding layers: llama.cpp's gemma3 has default only; {ELSEWHERE}")
    if kind == "yarn":
        for key, usual in _carried_yarn(rope).items():
            raise LrqatError(f"rope {key} {rope[key]}: GGUF export carries {usual} only; {ELSEWHERE}")
    if kind == "longrope":
        for name, factors in factor_tensors(config).items():
            if (dims := _dims(config)) != 2 * len(factors):
                raise LrqatError(
                    f"{name.removesuffix('.weight')}: {len(factors)} factors, expected {dims // 2}; "
                    "use the model's own config.json"
                )


def _carried_yarn(rope: dict[str, Any]) -> dict[str, Any]:
    """{key: what llama.cpp has built in} of the settings by which transformers computes something else."""
    attention = 0.1 * math.log(rope["factor"]) + 1 if rope["factor"] > 1 else 1.0
    found: dict[str, Any] = {key: usual for key, usual in YARN_DEFAULTS.items() if (rope.get(key) or usual) != usual}
    if not rope.get("truncate", True):
        found["truncate"] = True
    if (own := rope.get("attention_factor")) is not None and not math.isclose(own, attention, rel_tol=1e-6):
        found["attention_factor"] = round(attention, 6)
    return found


def add_metadata(writer: Any, config: Config) -> None:
    """Write the rope keys to a gguf.GGUFWriter."""
    from gguf import RopeScalingType

    family, rope, kind = family_of(config), _rope(config), _rope_type(config)
    writer.add_rope_freq_base(_theta(config, family))
    writer.add_rope_dimension_count(_dims(config))
    if family.name == "gemma3":
        writer.add_rope_freq_base_swa(float(_rope(config, "sliding_attention").get("rope_theta", LOCAL_THETA)))
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType.LINEAR if kind == "linear" else RopeScalingType.YARN)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if kind in ("yarn", "longrope"):
        writer.add_rope_scaling_orig_ctx_len(int(rope["original_max_position_embeddings"]))
    if kind == "longrope":
        writer.add_rope_scaling_attn_factors(_longrope_attention(config))


def factor_tensors(config: Config) -> dict[str, Tensor]:
    """Tensors that no HF weight becomes: what llama.cpp divides each rope frequency by, float32 [rope dims / 2]."""
    rope = _rope(config)
    if _rope_type(config) == "llama3":
        return {"rope_freqs.weight": torch.tensor(_llama3_factors(config), dtype=torch.float32)}
    if _rope_type(config) == "longrope":
        return {
            f"rope_factors_{kind}.weight": torch.tensor(rope[f"{kind}_factor"], dtype=torch.float32)
            for kind in ("long", "short")
        }
    return {}


def _rope(config: Config, layers: str = "full_attention") -> dict[str, Any]:
    """The rope settings as transformers 5 has them; transformers 4 kept theta beside the scaling."""
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    if "full_attention" in rope or "sliding_attention" in rope:
        rope = dict(rope.get(layers) or {})
    elif layers == "sliding_attention":
        rope = {"rope_theta": config.get("rope_local_base_freq", LOCAL_THETA)}
    for key in ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings"):
        if key not in rope and config.get(key) is not None:
            rope[key] = config[key]
    return rope


def _rope_type(config: Config) -> str:
    rope = _rope(config)
    kind = str(rope.get("rope_type", rope.get("type", "default")))
    return "longrope" if kind == "su" or "long_factor" in rope else kind


def _theta(config: Config, family: Family) -> float:
    return float(_rope(config).get("rope_theta", family.theta))


def _dims(config: Config) -> int:
    return int(heads_of(config)[2] * (_rope(config).get("partial_rotary_factor") or 1.0))


def _longrope_attention(config: Config) -> float:
    """What cosines and sines are multiplied by: sqrt(1 + ln(factor) / ln(original context))."""
    rope = _rope(config)
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    context = rope["original_max_position_embeddings"]
    factor = rope.get("factor") or config["max_position_embeddings"] / context
    return math.sqrt(1 + math.log(factor) / math.log(context)) if factor > 1 else 1.0


def _llama3_factors(config: Config) -> list[float]:
    rope, head_dim = _rope(config), heads_of(config)[2]
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    context, theta = rope["original_max_position_embeddings"], _theta(config, family_of(config))
    factors = []
    for i in range(0, head_dim, 2):
        turns = context / (2 * math.pi * theta ** (i / head_dim))  # within the original context
        smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
        factors.append(1 / ((1 - smooth) / factor + smooth))
    return factors
