"""Block-AP (EfficientQAT, arXiv 2407.11062, section 3.2): train one decoder layer after the other.

    x_0 = y_0 = what reaches the first layer
    y_{k+1} = layer_k(y_k)                             full precision: the targets
    min |layer^_k(x_k) - y_{k+1}|^2                    over all that layer k's method trains
    x_{k+1} = layer^_k(x_k)                            the quantized prefix: the inputs

The paper trains all weights and the grid (method `LSQ`) and calls what follows E2E-QP: codes frozen, the grid trained
end to end (method `Scales`: pass `finish=frozen_codes`). Here the method is any: with `LRQAT`, layers begin with
adapters that have learnt their layer's output, before they are trained end to end.

Memory: the model, what the method needs for *one* layer with its gradients and Adam's moments, and two sets of
hidden states [N, T, H], x and y, three while it is found where a layer begins. Each finished layer is a file, so an
interrupted run goes on behind the last; where all are finished, no state is computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrqat import kept
from lrqat.console import bar
from lrqat.errors import LrqatError
from lrqat.layers import Make, compile_tiles, quantizers, swap
from lrqat.methods.base import WeightQuantizer
from lrqat.methods.gains import GainQuantizer
from lrqat.methods.scales import Scales
from lrqat.optimizer import make_optimizer
from lrqat.plan import Plan
from lrqat.rounding import Rounding, quantized_layers
from lrqat.sites import TRAINED
from lrqat.starts.walk import Walk, decoder_layers

Begin = Callable[[Walk, int, Tensor, Tensor], Mapping[str, Tensor]]
Finish = Callable[[WeightQuantizer], WeightQuantizer]
NOTHING = Rounding()


@dataclass(frozen=True)
class BlockSettings:
    """How each layer is trained.

    Attributes:
        epochs: passes over the calibration blocks.
        batch_size: blocks of a step.
        lr: of weights or adapters; the paper's for weights is 1e-5, 2e-5 at 2 bits.
        lr_scales: of the gains, which are relative.
        last_lr: both fall along a cosine to this share.
        seed: of the order of the blocks.
        compile: the quantizers' element-wise work.
        optimizer: adamw or adamw8bit, without decay.
    """

    epochs: int = 2
    batch_size: int = 2
    lr: float = 1e-5
    lr_scales: float = 1e-3
    last_lr: float = 0.05
    seed: int = 0
    compile: bool = False
    optimizer: str = "adamw"


def block_ap(
    model: Any,
    plan: Plan,
    blocks_NT: Tensor,
    make: Make,
    settings: BlockSettings,
    *,
    begin: Begin | None = None,
    finish: Finish | None = None,
    rounding: Rounding = NOTHING,
    folder: Path | None = None,
    key: str = "",
) -> list[float]:
    """Swap and train every decoder layer; what is planned outside of them is swapped at the end.

    Returns each planned layer's mean squared error at x_k, relative to its targets' mean square.

    Args:
        model: the full-precision model; left as `swap` leaves it.
        plan: which matrices, on which grids.
        blocks_NT: calibration tokens; the paper has 4096 blocks of 2048.
        make: as in `swap`.
        settings: of the training.
        begin: called with the walk, a layer's number, a copy of x_k, and y_k, which it makes y_{k+1}; returns the
            weights that the layer is to begin with, by site, for example GPTQ's W' (`gptq_layer`). Not called for
            a layer that is read from its file: there `make` may begin anywhere, what it made is overwritten.
        finish: what becomes of each trained quantizer.
        rounding: of what flows into quantized layers, from when they are trained on. Keys and values stay as they are.
        folder: holds a file for each finished layer; None: nothing is kept.
        key: identifies model, data and settings; files under another key are refused.
    """
    prefix, layers = decoder_layers(model)
    plans = [inside(plan, f"{prefix}.{number}.") for number in range(len(layers))]
    paths = [kept.layer_path(folder, n) if folder and own.grids else None for n, own in enumerate(plans)]
    done = [path is not None and path.is_file() for path in paths]
    left = [number for number, own in enumerate(plans) if own.grids and not done[number]]
    walk = Walk(model, blocks_NT) if left else None
    if walk:
        student_NTH = walk.begin()
        teacher_NTH = student_NTH.clone()
    generator = torch.Generator().manual_seed(settings.seed)
    errors = []
    for number in bar(range(len(layers)), "block-ap"):
        order = [torch.randperm(len(blocks_NT), generator=generator) for _ in range(settings.epochs)]
        path, layer, trains = paths[number], layers[number], number in left
        if walk and number > left[-1]:
            walk = None
        if walk:
            if begin and trains:
                for name, weight_OI in begin(walk, number, student_NTH.clone(), teacher_NTH).items():
                    plan.sites[name].origin.within(model).copy_(weight_OI)
            else:
                walk.run(number, teacher_NTH, teacher_NTH)
        swap(model, plans[number], make)
        rounding.inputs(layer, quantized_layers(layer))
        if walk and trains:
            if settings.compile:
                compile_tiles(layer)
            train_layer(walk, number, student_NTH, teacher_NTH, settings, order)
        if finish:
            replace_quantizers(layer, finish)
        if path and done[number]:
            errors.append(load_layer(layer, path, key))
        layer.requires_grad_(False)
        if walk:
            walk.run(number, student_NTH, student_NTH)
            if trains:
                errors.append(relative_error(student_NTH, teacher_NTH))
                if path:
                    save_layer(layer, path, key, errors[-1])
    rest = outside(plan, f"{prefix}.")
    if rest.grids:
        swap(model, rest, make)
        rounding.inputs(model, [name for name in quantized_layers(model) if not name.startswith(f"{prefix}.")])
    for name, quantizer in quantizers(model).items():
        quantizer.requires_grad_(plan.sites[name].kind in TRAINED)
    return errors


def inside(plan: Plan, prefix: str) -> Plan:
    """The part of a plan whose parameters' names begin so."""
    sites = {name: site for name, site in plan.sites.items() if site.origin.parameter.startswith(prefix)}
    return Plan(sites, {name: grid for name, grid in plan.grids.items() if name in sites})


def outside(plan: Plan, prefix: str) -> Plan:
    """The rest of `inside`."""
    sites = {name: site for name, site in plan.sites.items() if not site.origin.parameter.startswith(prefix)}
    return Plan(sites, {name: grid for name, grid in plan.grids.items() if name in sites})


def train_layer(
    walk: Walk, number: int, x_NTH: Tensor, y_NTH: Tensor, settings: BlockSettings, order: list[Tensor]
) -> None:
    """Adam on the mean squared error of one layer's output."""
    trained = {name: p for name, p in walk.layers[number].named_parameters() if p.requires_grad}
    if not trained:
        return
    groups = [
        {"params": [p for name, p in trained.items() if ".gains." not in name], "lr": settings.lr},
        {"params": [p for name, p in trained.items() if ".gains." in name], "lr": settings.lr_scales},
    ]
    optimizer = make_optimizer(settings.optimizer, [g for g in groups if g["params"]])
    batches = [batch for epoch in order for batch in torch.split(epoch, settings.batch_size)]

    def share(step: int) -> float:
        return settings.last_lr + (1 - settings.last_lr) * 0.5 * (1 + math.cos(math.pi * step / len(batches)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    for batch in batches:
        with torch.enable_grad():
            wanted_BTH = y_NTH[batch].to(walk.device).float()
            loss = F.mse_loss(walk.call(number, x_NTH[batch]).float(), wanted_BTH)
            if not math.isfinite(loss.item()):
                raise LrqatError(
                    f"block-ap: the loss of layer {number} is {loss.item()}; lower --block-lr, --block-lr-scales"
                )
            torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()


@torch.no_grad()
def relative_error(found_NTH: Tensor, wanted_NTH: Tensor) -> float:
    """sum (found - wanted)^2 / sum wanted^2."""
    error = size = 0.0
    for found_TH, wanted_TH in zip(found_NTH, wanted_NTH, strict=True):
        error += (found_TH.float() - wanted_TH.float()).square().sum().item()
        size += wanted_TH.float().square().sum().item()
    return error / max(size, 1e-30)


def frozen_codes(quantizer: WeightQuantizer) -> WeightQuantizer:
    """A `finish`: from now on only the grid's parts are trained (E2E-QP)."""
    device = next(iter(quantizer.parts().values())).device
    moved = quantizer.moved() if isinstance(quantizer, GainQuantizer) else 0
    scales = Scales.from_fused(quantizer.fuse(), device, moved)
    scales.name = quantizer.name
    return scales


def replace_quantizers(layer: nn.Module, finish: Finish) -> None:
    """Put finish(quantizer) in the place of every quantizer."""
    for path, module in list(layer.named_modules()):
        if isinstance(module, WeightQuantizer):
            layer.set_submodule(path, finish(module))


def layer_tensors(layer: nn.Module) -> dict[str, Tensor]:
    """All that its quantizers hold."""
    return {
        f"{path}.{name}": tensor.detach()
        for path, module in layer.named_modules()
        if isinstance(module, WeightQuantizer)
        for name, tensor in (*module.named_parameters(), *module.named_buffers())
    }


def save_layer(layer: nn.Module, path: Path, key: str, error: float) -> None:
    """Write its quantizers' tensors and its error."""
    kept.write(path, layer_tensors(layer), key, error=repr(error))


@torch.no_grad()
def load_layer(layer: nn.Module, path: Path, key: str) -> float:
    """Read what `save_layer` wrote into quantizers of the same kind; returns the layer's error."""
    tensors = layer_tensors(layer)
    with kept.opened(path, key) as file:
        if set(file.keys()) != tensors.keys():
            raise LrqatError(f"{path}: was written by a run with other settings; remove it, or start a new run")
        for name, tensor in tensors.items():
            tensor.copy_(file.get_tensor(name))
        return float(file.metadata().get("error", math.nan))
