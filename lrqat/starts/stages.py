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
        mine = object()

        def stop(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            outputs.append(arguments[0])
            raise Reached(mine)

        with ExitStack() as context:
            if self.attention is not None:
                context.enter_context(_silent(self.attention, self.more_outputs))
            if self.end is not None:
                context.callback(self.end.register_forward_pre_hook(stop).remove)
            try:
                return self.walk.call(self.number, state_1TH)
            except Reached as reached:
                if reached.args != (mine,):
                    raise
        return outputs[0]

    def run(self, states_NTH: Tensor) -> None:
        """All blocks, in place."""
        for state_TH in states_NTH:
            state_TH.copy_(self.call(state_TH[None])[0])


@dataclass(frozen=True)
class Seen:
    """One block of tokens in a decoder layer.

    Attributes:
        inputs: each module's first argument, of all its calls; held, so that no id is used twice.
        outputs: of its last call.
        output_1TH: of the layer.
    """

    inputs: dict[nn.Module, list[Tensor]]
    outputs: dict[nn.Module, Any]
    output_1TH: Tensor


@torch.no_grad()
def see(walk: Walk, number: int, state_1TH: Tensor) -> Seen:
    """Run it through the layer."""
    inputs: dict[nn.Module, list[Tensor]] = {}
    outputs: dict[nn.Module, Any] = {}

    def note(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        inputs.setdefault(module, []).extend(arguments[:1])
        outputs[module] = output

    with ExitStack() as hooks:
        for module in walk.layers[number].modules():
            hooks.callback(module.register_forward_hook(note).remove)
        return Seen(inputs, outputs, walk.call(number, state_1TH))


@torch.no_grad()
def halves(walk: Walk, number: int, state_1TH: Tensor, paths: list[str]) -> list[Half]:
    """A decoder layer, with the stages of the named linear layers, as one block of tokens shows them."""
    layer, seen = walk.layers[number], see(walk, number, state_1TH)
    modules: dict[str, Any] = {path: walk.model.get_submodule(path) for path in paths}
    streams = residual_streams(layer, seen)
    attention: Any = getattr(layer, "self_attn", None)
    inside = set(attention.modules()) if isinstance(attention, nn.Module) else set()
    if any(writer in inside for writer in streams):
        given = seen.outputs[attention]
        more = len(given) - 1 if isinstance(given, tuple) else 0
        first, second = (
            stages({path: m for path, m in modules.items() if (m in inside) == attends}, seen, streams)
            for attends in (True, False)
        )
        both = [
            Half(walk, number, first, end=layer.get_submodule("post_attention_layernorm")),
            Half(walk, number, second, attention=attention, more_outputs=more),
        ]
        if torch.equal(both[1].call(both[0].call(state_1TH)), seen.output_1TH):
            return both
    return [Half(walk, number, stages(modules, seen, streams))]


def stages(modules: dict[str, nn.Linear], seen: Seen, streams: Mapping[nn.Module, nn.Module]) -> list[Stage]:
    """Some of a decoder layer's linear layers, in the order of their inputs; experts come last."""
    tokens = seen.output_1TH.shape[1]
    places = {module: place for place, module in enumerate(seen.inputs)}
    together: dict[int, dict[str, nn.Linear]] = {}
    for path, module in sorted(modules.items(), key=lambda each: places.get(each[1], len(places))):
        inputs = seen.inputs.get(module, [])
        whole = len(inputs) == 1 and inputs[0].numel() == tokens * inputs[0].shape[-1]
        if whole and "experts" not in path.split("."):
            together.setdefault(id(inputs[0]), {})[path] = module
    found = [
        Stage(each, streams.get(next(iter(each.values()))) if len(each) == 1 else None) for each in together.values()
    ]
    rest = {path: module for path, module in modules.items() if not any(path in stage.modules for stage in found)}
    return [*found, Stage(rest, whole=False)] if rest else found


def residual_streams(layer: nn.Module, seen: Seen) -> dict[nn.Module, nn.Module]:
    """{o_proj, down_proj: the norm that reads what it is added to}, of those whose outputs are just added to it."""
    norm: Any = getattr(layer, "input_layernorm", None)
    mlp_norm: Any = getattr(layer, "post_attention_layernorm", None)
    o = getattr(getattr(layer, "self_attn", None), "o_proj", None)
    down = getattr(getattr(layer, "mlp", None), "down_proj", None)
    if not seen.inputs.get(norm) or not seen.inputs.get(mlp_norm):
        return {}
    before, between = seen.inputs[norm][0], seen.inputs[mlp_norm][0]
    return {
        writer: reader
        for writer, reader, front, behind in ((o, norm, before, between), (down, mlp_norm, between, seen.output_1TH))
        if isinstance(writer, nn.Linear) and writer in seen.outputs
        if torch.equal(front + seen.outputs[writer], behind)
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
