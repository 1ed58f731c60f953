"""A mixture's experts, one matrix per expert and projection, in the place of transformers' two 3-D parameters.

    y_t = sum over the experts e that t is routed to of  p_te * down_e(act(gate_e x_t) * up_e x_t)

Each matrix is a layer of its own, under its name in checkpoints, quantized or not. Tokens and sums are taken in the
order of transformers' eager implementation; the router stays outside.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


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
