"""A mixture's experts, one matrix per expert and projection, in the place of transformers' two 3-D parameters.

    y_t = sum over the experts e that t is routed to of  p_te * down_e(act(gate_e x_t) * up_e x_t)

Each matrix is a layer of its own, under its name in checkpoints, quantized or not. Tokens and sums are taken in the
order of transformers' eager implementation; the router stays outside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lrqat.sites import EXPERT, Site


class QuantExperts(nn.Module):
    """Experts of a gated MLP.

    Args:
        experts: of each expert, its layers by name.
        roles: the names of gate, up and down.
        act_fn: the activation.
    """

    def __init__(self, experts: Sequence[Mapping[str, nn.Module]], roles: tuple[str, str, str], act_fn: Any) -> None:
        super().__init__()
        for number, layers in enumerate(experts):
            self.add_module(str(number), nn.ModuleDict(layers))
        self.num_experts = len(experts)
        self.roles = roles
        self.act_fn = act_fn

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[T, H], the experts [T, K] of each token and their weights -> [T, H]."""
        y_TH, chosen_S = torch.zeros_like(hidden_states), top_k_index.T.flatten()  # S: slot by slot, all tokens
        sorted_S, end = chosen_S.argsort(stable=True), 0
        counts = chosen_S.bincount(minlength=self.num_experts).tolist()  # a GPU is waited for once
        for number in range(self.num_experts):
            if counts[number] == 0:
                continue
            end += counts[number]
            places = sorted_S[end - counts[number] : end]
            slot, token = places // len(y_TH), places % len(y_TH)
            layers = self.get_submodule(str(number))
            gate, up, down = (layers[role] for role in self.roles)  # type: ignore[index]
            x = hidden_states[token]
            found = down(self.act_fn(gate(x)) * up(x)) * top_k_weights[token, slot, None]
            y_TH.index_add_(0, token, found.to(y_TH.dtype))
        return y_TH


def split_experts(module: Any, sites: Sequence[Site], make: Callable[[Site, Tensor], nn.Module]) -> QuantExperts:
    """The experts of one module, each matrix in the layer that `make` gives for its site and a view of it [O, I]."""
    experts: list[dict[str, nn.Module]] = [{} for _ in range(module.num_experts)]
    roles: dict[tuple[str, int | None], str] = {}
    for site in sites:
        origin = site.origin
        own = origin.parameter.rpartition(".")[2]
        assert origin.expert is not None
        experts[origin.expert][leaf(site)] = make(site, origin.of(module.get_parameter(own)).detach())
        roles[own, origin.half] = leaf(site)
    names = (roles["gate_up_proj", 0], roles["gate_up_proj", 1], roles["down_proj", None])
    return QuantExperts(experts, names, module.act_fn)


@contextmanager
def experts_apart(model: nn.Module, sites: Sequence[Site]) -> Iterator[dict[str, Site]]:
    """Within, experts in 3-D parameters are linear layers, whose weights are views of them.

    Args:
        model: holds the sites.
        sites: linear layers and experts, of an expert all that its module has.

    Yields the sites by the names of the modules that hold them meanwhile.
    """
    together: dict[str, list[Site]] = {}
    found = {}
    for site in sites:
        path = site.origin.parameter.rpartition(".")[0]
        if site.kind == EXPERT:
            together.setdefault(path, []).append(site)
            path = f"{path}.{site.origin.expert}.{leaf(site)}"
        found[path] = site
    with ExitStack() as after:
        for path, held in together.items():
            module = model.get_submodule(path)
            after.callback(model.set_submodule, path, module)
            model.set_submodule(path, split_experts(module, held, lambda _, weight_OI: linear(weight_OI)))
        yield found


def linear(weight_OI: Tensor) -> nn.Linear:
    """A frozen layer with this very tensor."""
    rows, columns = weight_OI.shape
    layer = nn.Linear(columns, rows, bias=False, device="meta")
    layer.weight = nn.Parameter(weight_OI, requires_grad=False)
    return layer


def leaf(site: Site) -> str:
    """The last part of an expert's name in checkpoints: gate_proj, w1."""
    return site.name.removesuffix(".weight").rpartition(".")[2]
