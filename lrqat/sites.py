"""Sites: the matrices of a model that can be quantized, by the names that checkpoints have them by.

transformers fuses some weights at load: the experts of a mixture lie in two 3-D parameters, where every checkpoint,
vLLM and llama.cpp have one matrix per expert and projection. Names and order are transformers' own: its conversion
for saving is run on numbers instead of weights, and where each number comes out is where those rows go.

    model.layers.0.mlp.experts.gate_up_proj [E, 2F, H]  ->  ...mlp.experts.N.gate_proj.weight  [F, H]   rows 0..F-1
                                                            ...mlp.experts.N.up_proj.weight    [F, H]   rows F..2F-1
    Mixtral: ...mlp.experts.gate_up_proj                ->  ...block_sparse_moe.experts.N.w1.weight, ...w3.weight

Refuses weights that transformers stores in any other way than whole, by expert, or by halves of an expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lrqat.errors import LrqatError

LINEAR, EXPERT, HEAD, EMBEDDING = "linear", "expert", "head", "embedding"
TIED_HEAD, ROUTER, UNKNOWN = "tied head", "router", "unknown"
TRAINED = (LINEAR, EXPERT)


@dataclass(frozen=True)
class Origin:
    """Where a checkpoint's tensor lies in the model.

    Attributes:
        parameter: the model's own name of the parameter or buffer.
        expert: which slice of a 3-D parameter; None: all of it.
        half: 0 or 1 for the upper or lower half of that slice's rows; None: all rows.
    """

    parameter: str
    expert: int | None = None
    half: int | None = None

    def of(self, tensor: Tensor) -> Tensor:
        """The view of the model's tensor."""
        if self.expert is None:
            return tensor
        view = tensor[self.expert]
        return view if self.half is None else view.chunk(2)[self.half]

    def within(self, model: nn.Module) -> Tensor:
        """The view of the model's parameter; writing to it writes to the model."""
        return self.of(model.get_parameter(self.parameter).detach())


@dataclass(frozen=True)
class Site:
    """One matrix.

    Attributes:
        name: its parameter name in checkpoints.
        kind: "linear", "expert", "head", "embedding"; or one that stays dense: "tied head", "router", "unknown".
        shape: as the model holds it, (O, I).
        origin: where it lies.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    origin: Origin


def origins(model: nn.Module) -> dict[str, Origin]:
    """Where the tensors of a checkpoint lie in the model, by their checkpoint names; quantizers' own left out."""
    state = {name: t for name, t in model.state_dict().items() if ".quantizer." not in name}
    if not hasattr(model, "config"):
        return {name: Origin(name) for name in state}
    from transformers.core_model_loading import revert_weight_conversion

    probes: dict[str, Tensor] = {}
    owners: list[Origin] = []  # of each number
    for name, tensor in state.items():
        first = len(owners)
        if tensor.ndim == 3:
            owners += [Origin(name, expert, half) for expert in range(len(tensor)) for half in range(2)]
            probes[name] = torch.arange(first, len(owners)).view(-1, 2, 1)
        else:
            owners.append(Origin(name))
            probes[name] = torch.full((1,) * tensor.ndim, first)
    try:
        stored = revert_weight_conversion(model, dict(probes))
    except Exception as error:  # whatever its operations raise on numbers
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise LrqatError(f"{type(model).__name__}: lrqat does not know how its weights are stored ({reason})") from None
    found = {}
    for name, numbers in stored.items():
        owner, count = owners[int(numbers.flatten()[0])], numbers.numel()
        if numbers.shape == probes[owner.parameter].shape:
            found[name] = Origin(owner.parameter)
        elif count == 2 and owner.half == 0:
            found[name] = Origin(owner.parameter, owner.expert)
        elif count == 1 and owner.expert is not None:
            found[name] = owner
        else:
            raise LrqatError(f"{type(model).__name__}: lrqat does not know how {name} is stored in a checkpoint")
    lost = state.keys() - {origin.parameter for origin in found.values()}
    if lost or sum(numbers.numel() for numbers in stored.values()) != len(owners):
        raise LrqatError(f"{type(model).__name__}: lrqat does not know how {min(lost or state)} is stored")
    order = {name: i for i, name in enumerate(state)}
    return dict(sorted(found.items(), key=lambda item: order[item[1].parameter]))


def checkpoint_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers under their checkpoint names; views, so writing to them writes to the model."""
    state = model.state_dict()
    return {name: origin.of(state[origin.parameter]).detach() for name, origin in origins(model).items()}


def sites(model: nn.Module) -> list[Site]:
    """All matrices of a model, on any device (`meta` too), in the order of its state."""
    modules = dict(model.named_modules())
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    head = getattr(model, "get_output_embeddings", lambda: None)()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found = []
    for name, origin in origins(model).items():
        parameter = parameters.get(origin.parameter)
        if parameter is None or parameter.ndim < 2:
            continue
        path = origin.parameter.rpartition(".")[0]
        owner, parent = modules[path], modules[path.rpartition(".")[0]]
        if owner is embedding:
            kind = EMBEDDING
        elif owner is head:
            kind = TIED_HEAD if embedding is not None and parameter is embedding.weight else HEAD
        elif isinstance(owner, nn.Embedding):
            continue  # learned positions
        elif origin.expert is not None and known_experts(owner):
            kind = EXPERT
        elif hasattr(parent, "experts") and parameter.ndim == 2 and len(parameter) <= count_experts(parent.experts):
            kind = ROUTER  # and the gate of a shared expert
        else:
            kind = LINEAR if type(owner) is nn.Linear else UNKNOWN
        found.append(Site(name, kind, tuple(origin.of(parameter).shape), origin))
    return found


def count_experts(experts: Any) -> int:
    """How many experts a module holds, in 3-D parameters or as a list."""
    return int(getattr(experts, "num_experts", 0)) or len(list(experts.children()))


def known_experts(module: Any) -> bool:
    """It computes act(gate x) * up x, then down, from [gate; up] [E, 2F, H] and down [E, H, F], without biases."""
    names = {name for name, _ in module.named_parameters(recurse=False)}
    gate = getattr(type(module), "_apply_gate", None)
    return (
        names == {"gate_up_proj", "down_proj"}
        and all(getattr(module, flag, False) for flag in ("has_gate", "is_concatenated"))
        and not any(getattr(module, flag, True) for flag in ("has_bias", "is_transposed"))
        and getattr(gate, "__name__", "") == "_default_apply_gate"
        and hasattr(module, "act_fn")
    )
