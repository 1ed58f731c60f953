"""Swap a model's linear layers for quantized ones, and fuse the result."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lrqat.console import bar
from lrqat.errors import LrqatError
from lrqat.fused import FusedCheckpoint, FusedSpec, FusedTensor, Lazy, Spec
from lrqat.methods.base import WeightQuantizer


class QuantLinear(nn.Module):
    """A linear layer whose weight is a WeightQuantizer; the bias stays as it was."""

    def __init__(self, quantizer: WeightQuantizer, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        output: Tensor = self.quantizer(x, self.bias)
        return output


def linear_names(model: nn.Module, skip: Sequence[str] = ()) -> list[str]:
    """Names of the linear layers to quantize: all but the output head and those that match a `skip` pattern.

    `skip` holds regular expressions that are searched in the module's name.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    try:
        patterns = [re.compile(pattern) for pattern in skip]
    except re.error as error:
        raise LrqatError(f"skip: {error.pattern!r} is no regular expression ({error})") from None

    def skipped(name: str) -> bool:
        return any(pattern.search(name) for pattern in patterns)

    names = [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear and module is not head and not skipped(name)
    ]
    known = set()
    for module in model.modules():
        if type(module) is nn.Linear or isinstance(module, nn.Embedding) or module is head:
            known |= {id(parameter) for parameter in module.parameters()}
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2 and id(parameter) not in known and not skipped(name):
            raise LrqatError(
                f"{type(model).__name__}: {name} {list(parameter.shape)} is in no linear layer (experts?), which lrqat "
                "cannot quantize yet; leave it as it is with --skip"
            )
    if not names:
        raise LrqatError(f"{type(model).__name__}: no linear layer to quantize; is `--skip` too wide?")
    return names


def swap_linears(
    model: nn.Module, make: Callable[[str, Tensor], WeightQuantizer], skip: Sequence[str] = ()
) -> list[str]:
    """Replace linear layers in place, one at a time, each freeing its weight; everything else is frozen.

    Args:
        model: a transformers causal language model.
        make: (parameter name, weight [O, I]) -> quantizer.
        skip: see `linear_names`.

    Returns:
        the parameter names of the quantized weights, as the HF checkpoint spells them.
    """
    model.requires_grad_(False)
    swapped = []
    for name in bar(linear_names(model, skip), "quantize"):
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        parent, _, child = name.rpartition(".")
        quantizer = make(f"{name}.weight", linear.weight.detach())
        setattr(model.get_submodule(parent), child, QuantLinear(quantizer, linear.bias))
        swapped.append(f"{name}.weight")
    return swapped


def quantizers(model: nn.Module) -> dict[str, WeightQuantizer]:
    """The quantizers of a swapped model, by the HF name of their weight."""
    return {f"{name}.weight": m.quantizer for name, m in model.named_modules() if isinstance(m, QuantLinear)}


def fuse_model(
    model: Any, hf_config: dict[str, Any], assets: dict[str, bytes], provenance: dict[str, Any]
) -> FusedCheckpoint:
    """The swapped model as a fused checkpoint; tensors are fused when asked for, each checked.

    The training forward multiplies by s * (q - z) rounded to its dtype; both that and the float32 weight are checked.

    Raises:
        RuntimeError: a weight's `dequantize()` differs from the weight of the training forward in any bit.
    """
    found = quantizers(model)

    def fuse(name: str) -> FusedTensor:
        fused = found[name].fuse()
        weight_OI = fused.dequantize()
        same = torch.equal(weight_OI, found[name].weight().cpu())
        if not (same and torch.equal(weight_OI.to(model.dtype), found[name].weight(model.dtype).cpu())):
            raise RuntimeError(f"{name}: the fused weight is not the weight of the training forward")
        return fused

    dense = dense_tensors(model)
    return FusedCheckpoint(
        tensors=Lazy(found, fuse),
        dense=dense,
        specs={name: FusedSpec(q.grid, q.shape) for name, q in found.items()},
        dense_specs={name: Spec(tensor.dtype, tuple(tensor.shape)) for name, tensor in dense.items()},
        hf_config=effective_config(model, hf_config),
        assets=assets,
        provenance=provenance,
    )


def effective_config(model: Any, hf_config: dict[str, Any]) -> dict[str, Any]:
    """config.json with what transformers only implies: whether the head is tied, which decides what is stored."""
    return {**hf_config, "tie_word_embeddings": bool(model.config.get_text_config().tie_word_embeddings)}


def dense_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and persistent buffer that no quantizer owns, by HF name; a tied head only once."""
    dense: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict().items():
        if ".quantizer." in name or tensor.data_ptr() in seen:
            continue
        seen.add(tensor.data_ptr())
        dense[name] = tensor.detach()
    return dense
