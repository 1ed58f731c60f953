"""The linear layers of a decoder layer in stages: those of one input together, in the order of their inputs.

What a layer's modules are named does not matter, but for the two that write to the residual stream: o_proj, between
input_layernorm and post_attention_layernorm, and mlp.down_proj behind the latter. Whether their outputs are just added
to it is seen on one block of tokens: Granite scales them, Gemma 2 has a norm in between. Where attention's are, a layer
is walked in two halves, so that the stages of the MLP need not attend again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lrqat.starts.walk import Reached, Walk


@dataclass(frozen=True)
class Stage:
    """Linear layers that are rounded together.

    Attributes:
        modules: by name in the model; one input, or what is left.
        stream: the module that reads what their outputs are added to; None: not known.
        whole: every token reaches them.
    """

    modules: dict[str, nn.Linear]
    stream: nn.Module | None = None
    whole: bool = True


@dataclass(frozen=True)
class Half:
    """A stretch of a decoder layer: attention, or what is behind it, or all.

    Attributes:
        walk: through the model.
        number: of the layer.
        stages: in the order of their inputs.
        end: the module whose input is what leaves the stretch; None: the layer's end.
        attention: adds nothing in this stretch, which begins behind it; None: it begins where the layer does.
        more_outputs: how many attention has beside the hidden states.
    """

    walk: Walk
    number: int
    stages: list[Stage]
    end: nn.Module | None = None
    attention: Any = None
    more_outputs: int = 0

    def call(self, state_1TH: Tensor) -> Tensor:
        """What leaves it."""
        outputs: list[Tensor] = []
        ended = Reached()

        def stop(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            outputs.append(arguments[0])
            raise ended

        with ExitStack() as context:
            if self.attention is not None:
                context.enter_context(_silent(self.attention, self.more_outputs))
            if self.end is not None:
                context.callback(self.end.register_forward_pre_hook(stop).remove)
            try:
                return self.walk.call(self.number, state_1TH)
            except Reached as reached:
                if reached is not ended:
                    raise
        return outputs[0]

    def run(self, states_NTH: Tensor) -> None:
        """All blocks, in place."""
        for state_TH in states_NTH:
            state_TH.copy_(self.call(state_TH[None])[0])


@torch.no_grad()
def halves(walk: Walk, number: int, state_1TH: Tensor, paths: list[str]) -> list[Half]:
    """A decoder layer, with the stages of the named linear layers, as one block of tokens shows them."""
    layer, streams = walk.layers[number], residual_streams(walk, number, state_1TH)
    attention: Any = getattr(layer, "self_attn", None)
    inside = set(attention.modules()) if isinstance(attention, nn.Module) else set()
    if any(writer in inside for writer in streams):
        outputs: list[Any] = []
        with ExitStack() as hooks:
            hooks.callback(attention.register_forward_hook(lambda _, __, output: outputs.append(output)).remove)
            expected_1TH = walk.call(number, state_1TH)
        more = len(outputs[0]) - 1 if isinstance(outputs[0], tuple) else 0
        attending = [path for path in paths if walk.model.get_submodule(path) in inside]
        rest = [path for path in paths if path not in attending]
        first, second = (stages(walk, number, state_1TH, some, streams) for some in (attending, rest))
        both = [
            Half(walk, number, first, end=layer.get_submodule("post_attention_layernorm")),
            Half(walk, number, second, attention=attention, more_outputs=more),
        ]
        if torch.equal(both[1].call(both[0].call(state_1TH)), expected_1TH):
            return both
    return [Half(walk, number, stages(walk, number, state_1TH, paths, streams))]


@torch.no_grad()
def stages(
    walk: Walk, number: int, state_1TH: Tensor, paths: list[str], streams: Mapping[nn.Module, nn.Module]
) -> list[Stage]:
    """The named linear layers of a decoder layer, in the order of their inputs; experts come last."""
    modules: dict[str, Any] = {path: walk.model.get_submodule(path) for path in paths}
    inputs: dict[str, list[Tensor]] = {}  # kept, so that no id is used twice

    def note(path: str) -> Any:
        return lambda _, arguments: inputs.setdefault(path, []).append(arguments[0])

    with ExitStack() as hooks:
        for path, module in modules.items():
            hooks.callback(module.register_forward_pre_hook(note(path)).remove)
        walk.call(number, state_1TH)
    together: dict[int, dict[str, nn.Linear]] = {}
    for path, seen in inputs.items():
        whole = len(seen) == 1 and seen[0].numel() == state_1TH.shape[1] * seen[0].shape[-1]
        if whole and "experts" not in path.split("."):
            together.setdefault(id(seen[0]), {})[path] = modules[path]
    found = [
        Stage(each, streams.get(next(iter(each.values()))) if len(each) == 1 else None) for each in together.values()
    ]
    rest = {path: module for path, module in modules.items() if not any(path in stage.modules for stage in found)}
    return [*found, Stage(rest, whole=False)] if rest else found


@torch.no_grad()
def residual_streams(walk: Walk, number: int, state_1TH: Tensor) -> dict[nn.Module, nn.Module]:
    """{o_proj, down_proj: the norm that reads what it is added to}, of those whose outputs are just added to it."""
    layer = walk.layers[number]
    norm, mlp_norm = getattr(layer, "input_layernorm", None), getattr(layer, "post_attention_layernorm", None)
    o: Any = getattr(getattr(layer, "self_attn", None), "o_proj", None)
    down: Any = getattr(getattr(layer, "mlp", None), "down_proj", None)
    if not isinstance(norm, nn.Module) or not isinstance(mlp_norm, nn.Module):
        return {}
    seen: dict[nn.Module, Tensor] = {}
    with ExitStack() as hooks:
        for reader in (norm, mlp_norm):
            hooks.callback(reader.register_forward_pre_hook(lambda m, x: seen.update({m: x[0]})).remove)
        for writer in (o, down):
            if isinstance(writer, nn.Linear):
                hooks.callback(writer.register_forward_hook(lambda m, _, y: seen.update({m: y})).remove)
        output_1TH = walk.call(number, state_1TH)
    return {
        writer: reader
        for writer, reader, behind in ((o, norm, seen.get(mlp_norm)), (down, mlp_norm, output_1TH))
        if {writer, reader} <= seen.keys() and behind is not None and torch.equal(seen[reader] + seen[writer], behind)
    }


@contextmanager
def holding(weights: Mapping[nn.Linear, Tensor]) -> Iterator[None]:
    """Within, linear layers hold other weights."""
    own = {module: module.weight.data for module in weights}
    try:
        for module, weight_OI in weights.items():
            module.weight.data = weight_OI
        yield
    finally:
        for module, weight_OI in own.items():
            module.weight.data = weight_OI


@contextmanager
def _silent(attention: Any, more_outputs: int) -> Iterator[None]:
    """Within, an attention module gives zeros, and computes nothing."""
    own = attention.__dict__.get("forward")

    def forward(*arguments: Any, **named: Any) -> Any:
        zeros_BTH = torch.zeros_like(named["hidden_states"] if "hidden_states" in named else arguments[0])
        return (zeros_BTH, *[None] * more_outputs) if more_outputs else zeros_BTH

    attention.forward = forward
    try:
        yield
    finally:
        del attention.forward
        if own is not None:
            attention.forward = own
