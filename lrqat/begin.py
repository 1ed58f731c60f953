"""Where training and rounding begin: the pretrained model is prepared, then its weights become quantizers.

    pretrained -> rotate -> fold AWQ's scales -> GPTQ -> quantizers of the method, Block-AP

What is done before the quantizers changes the model's weights (`Beginning`, `prepare`); GPTQ gives the grids' parts
along. A run keeps the result in one safetensors file, so that it is resumed from the very same weights; on the CPU
the model then reads them from there, and its private copies of them are let go:

    NAME            every dense parameter, by its checkpoint name
    NAME#PART       parts of the grid that GPTQ found for a weight

Quantizers may be trained layer by layer (`lrqat.block_ap`) before they are trained end to end, EfficientQAT's always;
GPTQ then works on each layer behind the trained prefix.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrqat import kept
from lrqat.block_ap import BlockSettings, block_ap, frozen_codes
from lrqat.console import log
from lrqat.fused import open_safetensors
from lrqat.grid import Grid
from lrqat.grids.affine import AffineGrid
from lrqat.layers import Make, compile_tiles, dense_tensors, swap
from lrqat.methods.base import WeightQuantizer
from lrqat.methods.l4q import L4Q, l4q_start
from lrqat.methods.lr_qat import LRQAT
from lrqat.methods.lsq import LSQ
from lrqat.methods.rounded import Rounded
from lrqat.methods.scales import Scales
from lrqat.offload import FrozenFile, HostMemory
from lrqat.pages import give_back, in_file
from lrqat.plan import Plan
from lrqat.ranges import start
from lrqat.rounding import Rounding
from lrqat.settings import Beginning, TrainSettings
from lrqat.sites import TRAINED, Site, origins
from lrqat.starts.awq import awq_fold
from lrqat.starts.codes import rounded
from lrqat.starts.fold import LlamaLayer
from lrqat.starts.gptq import gptq_layer, gptq_model
from lrqat.starts.loftq import loftq
from lrqat.starts.rotation import rotate, untie_head
from lrqat.starts.walk import Walk, decoder_layers

Found = dict[str, dict[str, Tensor]]  # parts of the grid, by the weight's name


def untie(model: Any, beginning: Beginning) -> None:
    """Untie the head, on the meta device too, if there is a rotation: refused unless it was allowed."""
    head = model.get_output_embeddings()
    if beginning.rotate is not None and head is not None and head.weight is model.get_input_embeddings().weight:
        untie_head(model, beginning.untie_head)


def check_layers(model: Any, beginning: Beginning) -> None:
    """Refuse layers that nothing folds into, before anything long is done."""
    if beginning.rotate is not None or "awq" in beginning.steps:
        name, layers = decoder_layers(model)
        for number, layer in enumerate(layers):
            LlamaLayer(layer, f"{name}.{number}")


def uncalibrated(plan: Plan, beginning: Beginning) -> dict[str, int]:
    """For the provenance: how many planned weights GPTQ and AWQ leave to rounding to nearest (the head, embeddings)."""
    left = sum(plan.sites[name].kind not in TRAINED for name in plan.grids) if beginning.calibrated else 0
    return {"rounded_to_nearest": left} if left else {}


def tell_uncalibrated(plan: Plan, beginning: Beginning) -> dict[str, int]:
    """`uncalibrated`, told in the log too."""
    found = uncalibrated(plan, beginning)
    if found:
        own = sum(math.prod(plan.sites[name].shape) for name in plan.grids if plan.sites[name].kind in TRAINED)
        log(
            f"{beginning.method} works on linear layers; {found['rounded_to_nearest']} of {len(plan.grids)} weights, "
            f"{1 - own / plan.weights:.0%} of all numbers, are rounded to nearest"
        )
    return found


def prepare(
    model: Any,
    plan: Plan,
    beginning: Beginning,
    blocks_NT: Tensor,
    p: float | None,
    stored: torch.dtype,
    folder: Path | None = None,
    key: str = "",
) -> Found:
    """Change the model's weights in place; returns the parts that they are to be rounded with, where GPTQ found some.

    Args:
        model: the pretrained model.
        plan: which matrices, on which grids.
        beginning: what to do.
        blocks_NT: calibration tokens; not looked at by a rotation alone.
        p: exponent of the range search.
        stored: what is not quantized will be in it.
        folder: where GPTQ keeps its finished layers, under `key`.
    """
    if beginning.rotate is not None:
        rotate(model, beginning.rotate, untie=beginning.untie_head)
        narrow(model, plan, stored)
    if "awq" in beginning.steps:
        awq_fold(model, plan, blocks_NT, p)
    return gptq_model(model, plan, blocks_NT, p, folder=folder, key=key) if "gptq" in beginning.steps else {}


@torch.no_grad()
def narrow(model: Any, plan: Plan, stored: torch.dtype) -> None:
    """Round what is not quantized, the head and the embedding above all, to 16 bits where it came from 16, in place.

    Rotated in a wider dtype they would stay there, as large again as the whole model was. Bfloat16 that float16 holds
    too, but for sizes beyond its range, is served as it is in both.
    """
    if stored.itemsize > 2:
        return
    for name, tensor in dense_tensors(model).items():
        if name not in plan.grids and tensor.dtype == model.dtype:
            own = tensor.to(stored)
            half = own.to(torch.float16)
            tensor.copy_(half if half.isfinite().all() else own)


def prepare_once(
    model: Any,
    plan: Plan,
    beginning: Beginning,
    blocks_NT: Tensor,
    p: float | None,
    stored: torch.dtype,
    path: Path,
    key: str,
) -> Found:
    """`prepare`, or what it gave when the file at `path` was written under the same key."""
    if not beginning.changes:
        return {}
    if path.is_file():
        with open_safetensors(path) as file:
            if (file.metadata() or {}).get("key") == key:
                return load_prepared(model, beginning, file)
    layers = path.with_suffix("")
    parts = prepare(model, plan, beginning, blocks_NT, p, stored, layers, key)
    kept.write(path, dict(dense_tensors(model)) | kept.named_parts(parts), key)
    shutil.rmtree(layers, ignore_errors=True)
    with open_safetensors(path) as file:
        return load_prepared(model, beginning, file)


def load_prepared(model: Any, beginning: Beginning, file: Any) -> Found:
    """Put a file's weights into the model, on the CPU as views of the file; returns its parts."""
    untie(model, beginning)
    places, state, parts = origins(model), model.state_dict(keep_vars=True), Found()
    for name, part, values in kept.content(file):
        parameter = state[places[name].parameter]
        if part:
            parts.setdefault(name, {})[part] = values.to(parameter.device)
        else:
            put(parameter, places[name].of(parameter.detach()), values)
    return parts


def put(parameter: Tensor, own: Tensor, values: Tensor) -> None:
    """Values from a mapped file in the place of a parameter's own; copied where they are not all of it."""
    if own.device != values.device or own.shape != parameter.shape or own.dtype != values.dtype:
        own.copy_(values)
        return
    if in_file(own):
        give_back(own)  # its private copies, which the rest of the file would keep
    parameter.data = values


def maker(settings: TrainSettings, parts: Mapping[str, dict[str, Tensor]]) -> Make:
    """What makes the method's quantizers, from these parts or those of the range search."""
    generator = torch.Generator().manual_seed(settings.seed)
    learn = settings.lr_scales > 0

    def make(site: Site, weight_OI: Tensor, grid: Grid) -> WeightQuantizer:
        if site.name in parts:
            begun = parts[site.name]
        elif settings.method == "l4q" and settings.range_p is None and isinstance(grid, AffineGrid):
            begun = l4q_start(weight_OI, grid, site.name)
        else:
            begun = start(weight_OI, grid, settings.range_p, site.name)
        if site.kind not in TRAINED:
            return Rounded(rounded(weight_OI, begun, grid), weight_OI.device)
        if settings.method in ("lsq", "efficientqat"):
            return LSQ(weight_OI, begun, grid, learn_scales=learn)
        if settings.method == "scales":
            return Scales(weight_OI, begun, grid)
        assert settings.rank is not None
        alpha = settings.rank if settings.alpha is None else settings.alpha
        if settings.method == "l4q":
            return L4Q(weight_OI, begun, grid, rank=settings.rank, alpha=alpha, learn_scales=learn, generator=generator)
        assert settings.downcast is not None
        quantizer = LRQAT(
            weight_OI,
            begun,
            grid,
            rank=settings.rank,
            alpha=alpha,
            downcast=settings.downcast,
            learn_scales=learn,
            generator=generator,
        )
        if settings.loftq:
            loftq(quantizer, weight_OI, generator)
        return quantizer

    return make


def swap_for_training(
    model: Any,
    plan: Plan,
    settings: TrainSettings,
    parts: Mapping[str, dict[str, Tensor]] | None = None,
    exactly: Callable[[Make, str], Make] | None = None,
    frozen: FrozenFile | HostMemory | None = None,
) -> None:
    """Put the method's quantizers in the place of the planned weights, and round what flows into them, if asked to.

    The head and the embeddings, where they are planned, are rounded and stay as they are. `exactly` makes quantizers
    begin with given codes (`lrqat.continuing`); `frozen` is where those live that never change (`lrqat.offload`).
    """
    make = maker(settings, {} if parts is None else parts)
    make = exactly(make, settings.method) if exactly else make
    swap(model, plan, frozen.taking(make) if frozen else make)
    if frozen:
        frozen.finish(model)
    if settings.compile:
        compile_tiles(model)
    Rounding().but(settings.activations, settings.kv).apply(model)


def train_blocks(model: Any, plan: Plan, settings: TrainSettings, blocks_NT: Tensor, folder: Path, key: str) -> None:
    """Block-AP: swap and train layer by layer; EfficientQAT's codes are frozen then. Finished layers are kept."""
    assert settings.block_epochs
    lr = settings.lr if settings.block_lr is None else settings.block_lr
    rounding = Rounding().but(settings.activations, settings.kv)
    parts: Found = {}

    def gptq(walk: Walk, number: int, x_NTH: Tensor, y_NTH: Tensor) -> dict[str, Tensor]:
        begun = gptq_layer(model, plan, walk, number, x_NTH, y_NTH, settings.range_p, leave=False)
        parts.update({name: each.parts for name, each in begun.items()})
        return {name: each.weight_OI for name, each in begun.items()}

    errors = block_ap(
        model,
        plan,
        blocks_NT,
        maker(settings, parts),
        BlockSettings(
            settings.block_epochs,
            settings.batch_size,
            lr=lr or 0.0,  # of scales there is none
            lr_scales=settings.block_lr_scales or 0.0,  # None: frozen in both stages
            seed=settings.seed,
            compile=settings.compile,
            optimizer=settings.optimizer,
        ),
        begin=gptq if "gptq" in settings.beginning.steps else None,
        finish=frozen_codes if settings.method == "efficientqat" else None,
        rounding=rounding,
        folder=folder,
        key=key,
    )
    if errors:
        log(f"block-ap: relative error of the last layer's output {errors[-1]:.3g}")
    if settings.compile:
        compile_tiles(model)
    rounding.keys(model)
