"""Swap a model's matrices for quantized ones, as planned, and fuse the result."""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any

import torch
from torch import Tensor, nn

from lrqat.console import bar, log
from lrqat.experts import linear, split_experts
from lrqat.fused import FusedCheckpoint, FusedSpec, FusedTensor, Lazy, Spec, config_dtype
from lrqat.grid import EvenGrid, Grid
from lrqat.memory import return_freed_memory
from lrqat.methods.base import WeightQuantizer
from lrqat.pages import give_back, in_file
from lrqat.plan import Plan
from lrqat.sites import EXPERT, LINEAR, Site, checkpoint_tensors

Make = Callable[[Site, Tensor, Grid], WeightQuantizer]


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


def swap(model: nn.Module, plan: Plan, make: Make) -> None:
    """Put quantizers in the place of the planned weights, module by module, each freeing its weight; freeze the rest.

    A head or an embedding keeps its layer: its weight becomes the rounded one, in the model's dtype, and with it a
    head that is tied to it. The quantizer lies beside it with the codes. Of a weight in a mapped file (`lrqat.pages`),
    the pages are given back, so that no more than one is in memory, wherever a method keeps none of it.

    Args:
        model: a transformers causal language model.
        plan: made for it, or for its skeleton (`lrqat.plan.plan`).
        make: (site, weight [O, I], grid) -> quantizer.
    """
    model.requires_grad_(False)
    modules: dict[str, list[Site]] = {}
    for site in plan.sites.values():
        modules.setdefault(site.origin.parameter.rpartition(".")[0], []).append(site)
    for path in bar([path for path, held in modules.items() if any(s.name in plan.grids for s in held)], "quantize"):
        module: Any = model.get_submodule(path)

        def quantizer(site: Site, weight_OI: Tensor) -> WeightQuantizer:
            made = make(site, weight_OI, plan.grids[site.name])
            made.name = site.name
            return made

        site = modules[path][0]
        if site.kind == EXPERT:

            def layer(site: Site, weight_OI: Tensor) -> nn.Module:
                planned = site.name in plan.grids
                return QuantLinear(quantizer(site, weight_OI), None) if planned else linear(weight_OI.clone())

            model.set_submodule(path, split_experts(module, modules[path], layer))
        elif site.kind == LINEAR:
            weight_OI = module.weight.detach()
            made = quantizer(site, weight_OI)
            model.set_submodule(path, QuantLinear(made, module.bias))
            if in_file(weight_OI) and not any(same_memory(kept, weight_OI) for kept in made.buffers()):
                give_back(weight_OI)
        else:
            module.quantizer = quantizer(site, module.weight.detach())
            module.weight.data = module.quantizer.weight(module.weight.dtype)
        return_freed_memory()  # of the temporaries, which lie between the packed weights


def same_memory(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are views of one storage."""
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def quantizers(model: nn.Module) -> dict[str, WeightQuantizer]:
    """The quantizers of a swapped model, by the checkpoint name of their weight."""
    return {module.name: module for module in model.modules() if isinstance(module, WeightQuantizer)}


def compile_tiles(model: nn.Module) -> None:
    """From now on the quantizers' element-wise work is compiled; where there is no compiler, it goes on without.

    Codebooks are not: looking levels up is no faster compiled.
    """
    found = [quantizer for quantizer in quantizers(model).values() if isinstance(quantizer.grid, EvenGrid)]
    if not found:
        return
    try:
        for quantizer in found:
            quantizer.compiled = True
        found[0].weight()
    except Exception as error:  # torch.compile raises what its compilers raise
        log(f"compile: torch.compile does not work here ({type(error).__name__}); going on without")
        for quantizer in found:
            quantizer.compiled = False


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
        found[name].release()
        return fused

    dense = stored_dense(model, hf_config)
    return FusedCheckpoint(
        tensors=Lazy(found, fuse),
        dense=dense,
        specs={name: FusedSpec(q.grid, q.shape) for name, q in found.items()},
        dense_specs=dense.specs,
        hf_config=effective_config(model, hf_config),
        assets=assets,
        provenance=provenance,
    )


def stored_dense(model: Any, hf_config: dict[str, Any], quantized: Container[str] = ()) -> Lazy[Tensor]:
    """What no quantizer owns and is not in `quantized`: in the checkpoint's dtype, where that holds every value."""
    stored = stored_dtype(model, hf_config)
    dense = {name: tensor for name, tensor in dense_tensors(model).items() if name not in quantized}
    specs = {
        name: Spec(narrowed(tensor, stored).dtype if tensor.dtype == model.dtype else tensor.dtype, tuple(tensor.shape))
        for name, tensor in dense.items()
    }
    return Lazy(specs, lambda name: dense[name].to(specs[name].dtype))


def stored_dtype(model: Any, hf_config: dict[str, Any]) -> torch.dtype:
    """The dtype that config.json names for the checkpoint's tensors, if the model has been widened from it."""
    found = getattr(torch, str(config_dtype(hf_config)), None)
    own: torch.dtype = model.dtype
    return found if isinstance(found, torch.dtype) and found.itemsize < own.itemsize else own


def narrowed(tensor: Tensor, stored: torch.dtype) -> Tensor:
    """In the checkpoint's dtype, if that holds every value."""
    narrow = tensor.to(stored)
    return narrow if torch.equal(narrow.to(tensor.dtype), tensor) else tensor


def effective_config(model: Any, hf_config: dict[str, Any]) -> dict[str, Any]:
    """config.json with what decides what is stored: whether the head is tied, as the model has it.

    transformers does not tie what its config ties, where the file holds two different tensors.
    """
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    return {**hf_config, "tie_word_embeddings": tied}


def dense_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and persistent buffer that no quantizer owns, by checkpoint name; a tied head only once."""
    owned = quantizers(model)
    dense: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in checkpoint_tensors(model).items():
        if tensor.data_ptr() not in seen and name not in owned:
            dense[name] = tensor
        seen.add(tensor.data_ptr())
    return dense
