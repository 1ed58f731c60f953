"""Walk through a model's decoder layers with calibration blocks, one layer at a time.

    h_0 = what reaches the first layer;   h_{k+1} = layer_k(h_k)

The hidden states of all blocks in front of one layer, [N, T, H] in the model's dtype, are the caller's to keep. They
lie in the CPU's memory: of EfficientQAT's 4096 blocks of 2048 tokens a model of 7B has 69 GB. What a layer is called
with besides (positions, masks) is recorded once, in a run of one block through the whole model; it must not depend on
the tokens, which is checked on a second block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lrqat.errors import LrqatError


class Reached(Exception):
    """A forward pass has come as far as it is needed. Its argument tells whose it is.

    To be made anew each time: one that is raised again holds the tensors of all passes that it has ended.
    """


def decoder_layers(model: Any) -> tuple[str, nn.ModuleList]:
    """The list of decoder layers and its name: the module list as long as the configuration says."""
    count = model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return name, module
    raise LrqatError(f"{type(model).__name__}: no list of {count} decoder layers, for calibration, --shard, --offload")


class Walk:
    """Hidden states of calibration blocks on their way through a model.

    Attributes:
        name: of the list of layers.
        layers: the decoder layers.
    """

    @torch.no_grad()
    def __init__(self, model: Any, blocks_NT: Tensor) -> None:
        self.name, self.layers = decoder_layers(model)
        self.model, self.blocks_NT = model, blocks_NT
        self.device = next(model.parameters()).device
        self.calls = _calls(model, self.layers, blocks_NT[:1].to(self.device))
        for first, second in zip(self.calls, _calls(model, self.layers, blocks_NT[1:2].to(self.device)), strict=False):
            if not _same(first, second):
                raise LrqatError(
                    f"{type(model).__name__}: its layers see more than hidden states and positions; "
                    "use a start without calibration"
                )

    @torch.no_grad()
    def begin(self) -> Tensor:
        """All blocks in front of the first layer."""
        states_NTH = None
        for number, block_T in enumerate(self.blocks_NT):
            state_1TH = self._first(block_T[None].to(self.device))
            if states_NTH is None:
                states_NTH = state_1TH.new_empty(len(self.blocks_NT), *state_1TH.shape[1:], device="cpu")
            states_NTH[number] = state_1TH[0]
        assert states_NTH is not None
        return states_NTH

    def _first(self, block_1T: Tensor) -> Tensor:
        found = []

        def stop(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            found.append(_hidden(arguments, named))
            raise Reached

        handle = self.layers[0].register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self.model.base_model(block_1T, use_cache=False)
        except Reached:
            pass
        finally:
            handle.remove()
        state: Tensor = found[0]
        return state

    def call(self, number: int, states_BTH: Tensor) -> Tensor:
        """Layer `number` on hidden states; differentiable."""
        arguments, named = self.calls[number]
        output = self.layers[number](states_BTH.to(self.device), *arguments, **named)
        found: Tensor = output[0] if isinstance(output, tuple) else output
        return found

    @torch.no_grad()
    def run(self, number: int, states_NTH: Tensor, into_NTH: Tensor | None = None) -> Tensor:
        """Layer `number` on all blocks, one at a time; `into_NTH` may be the states themselves."""
        found_NTH = torch.empty_like(states_NTH) if into_NTH is None else into_NTH
        for block, state_TH in enumerate(states_NTH):
            found_NTH[block] = self.call(number, state_TH[None])[0]
        return found_NTH


@torch.no_grad()
def _calls(model: Any, layers: nn.ModuleList, block_1T: Tensor) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """What each layer is called with besides hidden states."""
    if len(block_1T) == 0:
        return []
    found: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def record(number: int) -> Any:
        def hook(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            found[number] = (arguments[1:], {k: v for k, v in named.items() if k != "hidden_states"})

        return hook

    handles = [layer.register_forward_pre_hook(record(i), with_kwargs=True) for i, layer in enumerate(layers)]
    try:
        model.base_model(block_1T, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return [found[number] for number in range(len(layers))]


def _hidden(arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
    return arguments[0] if arguments else named["hidden_states"]


def _same(one: Any, other: Any) -> bool:
    """Equal in every tensor; other objects are not compared."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(value, other[key]) for key, value in one.items())
    return True
