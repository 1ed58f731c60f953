"""AdamW with moments in float32, or in 8 bits by torchao; and its state as tensors and JSON, for a checkpoint.

    adamw       8 bytes a trained number                              torch.optim.AdamW
    adamw8bit   2, in blocks of 256 with a float32 scale each         torchao.optim.AdamW8bit (arXiv 2110.02861);
                parameters of fewer than 4096 numbers stay in float32

Clipping comes before the step and is the same. torchao compiles its step, once for each shape of a parameter.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lrqat.errors import LrqatError

BETAS = (0.9, 0.95)  # the paper's
BLOCK = 256  # numbers with a common scale
SMALLEST = 4096  # numbers of a parameter
SIGNED = {"exp_avg": True, "exp_avg_sq": False}
PARTS = ("codes", "scale")  # of an 8-bit moment


def check_optimizer(name: str) -> None:
    """Refuse, before anything is loaded, what is not installed."""
    if name == "adamw8bit" and importlib.util.find_spec("torchao") is None:
        raise LrqatError("--optimizer adamw8bit needs torchao: pip install 'lrqat[adamw8bit]', or --optimizer adamw")


def make_optimizer(name: str, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Without weight decay: it would pull A B to zero, which is the start, not a prior."""
    if name == "adamw":
        return torch.optim.AdamW(groups, betas=BETAS, weight_decay=0.0, fused=True)
    from torchao.optim import AdamW8bit

    found: torch.optim.Optimizer = AdamW8bit(groups, betas=BETAS, weight_decay=0.0, block_size=BLOCK)
    return found


def moment_bytes(name: str, numbers: int) -> float:
    """Of two moments of a parameter."""
    if name == "adamw8bit" and numbers >= SMALLEST and numbers % BLOCK == 0:
        return 2 * (numbers + 4 * numbers / BLOCK)
    return 8 * numbers


def state_of(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """(tensors by `INDEX.MOMENT`, 8-bit ones by `INDEX.MOMENT.PART`; groups as JSON holds them)."""
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    for index, values in state["state"].items():
        for name, value in values.items():
            if hasattr(value, "qmap"):
                tensors |= {f"{index}.{name}.{part}": getattr(value, part) for part in PARTS}
            else:
                tensors[f"{index}.{name}"] = value
    return tensors, json.loads(json.dumps(state["param_groups"], default=float))


def load_state(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], groups: list[dict[str, Any]]) -> None:
    """The inverse of `state_of`."""
    state: dict[int, dict[str, Any]] = {}
    for key, value in tensors.items():
        index, name, *part = key.split(".")
        values = state.setdefault(int(index), {})
        if part:
            values.setdefault(name, {})[part[0]] = value
        else:
            values[name] = value
    for values in state.values():
        for name, value in values.items():
            if isinstance(value, dict):
                values[name] = _eight_bits(name, value)
    rates = [group["lr"] for group in optimizer.param_groups]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if isinstance(rate, Tensor):  # torchao's, which its compiled step reads
            group["lr"] = torch.tensor(group["lr"])


def _eight_bits(name: str, parts: dict[str, Tensor]) -> Tensor:
    from torchao.optim.subclass_8bit import OptimState8bit

    found = OptimState8bit.zeros(parts["codes"].shape, SIGNED[name], BLOCK, dtype=torch.float32)
    for part, values in parts.items():
        getattr(found, part).copy_(values)
    moment: Tensor = found
    return moment
