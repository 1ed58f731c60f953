"""The linear layers of a llama-like decoder layer, and what stands before them: for scales and rotations that fold.

    input_layernorm                                    -> q_proj, k_proj, v_proj   (or qkv_proj)
    v_proj                                             -> o_proj
    post_attention_layernorm                           -> gate_proj, up_proj       (or gate_up_proj)
    up_proj                                            -> down_proj

A norm must multiply by its weight: norm(x) = weight * normalized(x). Gemma's (1 + weight), LayerNorm, and norms between
a branch and the residual stream are refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lrqat.errors import LrqatError

QKV = ("q_proj", "k_proj", "v_proj", "qkv_proj")
GATE_UP = ("gate_proj", "up_proj", "gate_up_proj")
NORMS = {"input_layernorm", "post_attention_layernorm"}


class LlamaLayer:
    """Named modules of one decoder layer.

    Attributes:
        norms: (norm, the linear layers that read it): of attention, of the MLP.
        v, qkv, o, up, down: None where a model fuses or lacks them.
        head_dim: of a value.
    """

    def __init__(self, layer: Any, name: str) -> None:
        attention, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
        self.norms: list[tuple[Any, list[nn.Linear]]] = []
        for norm_name, owner, names in (
            ("input_layernorm", attention, QKV),
            ("post_attention_layernorm", mlp, GATE_UP),
        ):
            norm = getattr(layer, norm_name, None)
            readers = [module for child in names if isinstance(module := getattr(owner, child, None), nn.Linear)]
            others = {child for child, _ in layer.named_children() if "norm" in child} - NORMS
            if norm is None or not readers or others:
                raise LrqatError(f"{name}: not a llama-like layer (a norm, then q, k, v; a norm, then gate and up)")
            check_norm(norm, name)
            self.norms.append((norm, readers))
        self.v: Any = getattr(attention, "v_proj", None)
        self.qkv: Any = getattr(attention, "qkv_proj", None)
        self.o: Any = getattr(attention, "o_proj", None)
        self.up: Any = getattr(mlp, "up_proj", None)
        self.down: Any = getattr(mlp, "down_proj", None)
        self.head_dim = int(getattr(attention, "head_dim", 0) or 0)

    def folds(self) -> list[tuple[Any, list[nn.Linear], Tensor]]:
        """(what scales go into, the linear layers that read it, of each of their inputs the row that it comes from)."""
        found = [(norm, readers, torch.arange(readers[0].in_features)) for norm, readers in self.norms]
        if self.v is not None and self.o is not None and self.head_dim:
            found.insert(1, (self.v, [self.o], self.value_of_inputs()))
        if self.up is not None and self.down is not None:
            found.append((self.up, [self.down], torch.arange(self.down.in_features)))
        return found

    def values(self) -> list[Tensor]:
        """Weight, and bias if there is one, of the values: v_proj's, or the last rows of qkv_proj's (views)."""
        if self.v is not None:
            return [p for p in (self.v.weight, self.v.bias) if p is not None]
        if self.qkv is None or self.o is None:
            return []
        count = (self.qkv.out_features - self.o.in_features) // 2
        return [p[-count:] for p in (self.qkv.weight, self.qkv.bias) if p is not None]

    def value_of_inputs(self) -> Tensor:
        """Rows of v_proj that o_proj's inputs come from: with K value heads for H heads, head h reads h // (H / K)."""
        rows = torch.arange(self.v.out_features).view(-1, self.head_dim)
        return rows.repeat_interleave(self.o.in_features // self.v.out_features, dim=0).flatten()


@torch.no_grad()
def check_norm(norm: Any, name: str) -> None:
    """Refuse a norm that does more than multiply by its weight, or that takes the mean off; on "meta", a bias alone."""
    weight_I = getattr(norm, "weight", None)
    if weight_I is None:
        raise LrqatError(f"{name}: {type(norm).__name__} has no weight; nothing folds into it")
    refusal = LrqatError(f"{name}: {type(norm).__name__} is no plain RMSNorm; nothing folds into it")
    if getattr(norm, "bias", None) is not None:
        raise refusal
    if weight_I.is_meta:
        return
    x_I = torch.linspace(1, 2, len(weight_I), device=weight_I.device, dtype=weight_I.dtype)
    saved_I = weight_I.clone()
    try:
        weight_I.zero_()
        silent = not norm(x_I).any()
        weight_I.fill_(1)
        rms = torch.allclose(norm(x_I).float(), x_I.float() * x_I.float().square().mean().rsqrt(), rtol=0.02)
    finally:
        weight_I.copy_(saved_I)
    if not (silent and rms):
        raise refusal
