"""AWQ (arXiv 2306.00978): scale up the columns whose inputs are large, before rounding.

    W x = (W diag(t)) (diag(1/t) x)          t = a^alpha / sqrt(max t * min t),   a_i = mean |x_i|       (section 3.2)

1/t goes into what stands before: a norm's weight, or the rows of v_proj or up_proj. So the dense model computes the
same function, in float arithmetic, and W diag(t) is what gets rounded, by any start or method. alpha is searched in
20 steps for the least squared error of the outputs, on the layer's own inputs in the full-precision model:

    min over alpha of sum over the linear layers of |X (W - Q(W diag(t)) diag(1/t))^T|^2

Each of the four places of a llama-like layer (`lrqat.starts.fold`) has its own t; in attention with fewer value heads
than heads, t is shared by the heads that share a value. alpha = 0 is t = 1: no place gets worse. Where a model fuses
qkv_proj and gate_up_proj (Phi-3), two places are left, the norms. For the authors' search for clipping stands the
grid's own search for ranges (`lrqat.ranges`).

The model's dtype rounds W diag(t) and the norms once more: fold in float32 where that matters.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lrqat.console import bar
from lrqat.errors import LrqatError
from lrqat.grid import Grid
from lrqat.plan import Plan
from lrqat.ranges import start
from lrqat.sites import LINEAR
from lrqat.starts.codes import nearest
from lrqat.starts.fold import LlamaLayer
from lrqat.starts.walk import Walk

STEPS = 20
SAMPLES = 1024  # tokens whose outputs are compared
SEED = 0  # that they are drawn with
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.05}  # of a folded layer, |error| / |token|


@torch.no_grad()
def awq_fold(model: Any, plan: Plan, blocks_NT: Tensor, p: float | None) -> dict[str, float]:
    """Fold the best scales into the model, in place; returns the chosen alpha of each place by name.

    Args:
        model: a llama-like model of full precision.
        plan: which matrices, on which grids; a place where nothing is quantized is left alone.
        blocks_NT: calibration tokens; some 16k suffice.
        p: exponent of the range search that the error is measured with.

    Raises:
        LrqatError: layers that are not llama-like, before anything is changed.
    """
    walk = Walk(model, blocks_NT)
    layers = [LlamaLayer(layer, f"{walk.name}.{number}") for number, layer in enumerate(walk.layers)]
    grids = {model.get_submodule(path): grid for path, grid in planned_modules(plan).items()}
    names = {module: name for name, module in model.named_modules()}
    states_NTH, chosen = walk.begin(), {}
    for number in bar(range(len(layers)), "awq"):
        places = layers[number].folds()
        inputs = reader_inputs(walk, number, states_NTH, [readers[0] for _, readers, _ in places])
        after_NTH = walk.run(number, states_NTH)
        for (before, readers, source_I), (x_SI, size_I) in zip(places, inputs, strict=True):
            quantized = [(reader, grids[reader]) for reader in readers if reader in grids]
            if quantized:
                source_I = source_I.to(size_I.device)
                alpha, t_V = search(quantized, x_SI, size_I, source_I, len(before.weight), p)
                fold(before, readers, t_V, source_I)
                chosen[names[before]] = alpha
        before_TH, found_TH = after_NTH[0].float(), walk.run(number, states_NTH[:1])[0].float()
        off_T = (found_TH - before_TH).norm(dim=1) / before_TH.norm(dim=1)  # an attention sink's size hides the others
        if not off_T.max() < TOLERANCE[after_NTH.dtype]:
            raise LrqatError(f"{walk.name}.{number}: scales changed its output; AWQ does not know this layer")
        states_NTH = after_NTH
    return chosen


def planned_modules(plan: Plan) -> dict[str, Grid]:
    """Grids of linear layers, by the modules' names in the model."""
    sites = ((plan.sites[name], grid) for name, grid in plan.grids.items())
    return {site.origin.parameter.rpartition(".")[0]: grid for site, grid in sites if site.kind == LINEAR}


def reader_inputs(walk: Walk, number: int, states_NTH: Tensor, readers: list[nn.Linear]) -> list[tuple[Tensor, Tensor]]:
    """Of each linear layer: inputs of some SAMPLES tokens [S, I], and the mean size of each input [I], float32."""
    count, length = states_NTH.shape[:2]
    drawn = torch.randperm(count * length, generator=torch.Generator().manual_seed(SEED))[:SAMPLES]
    taken_N = [drawn[drawn // length == block] % length for block in range(count)]
    samples: list[list[Tensor]] = [[] for _ in readers]
    sizes = [torch.zeros(reader.in_features, device=reader.weight.device) for reader in readers]

    def hook(place: int) -> Any:
        def add(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            x_TI = arguments[0].flatten(0, -2).float()
            samples[place].append(x_TI[taken_N[len(samples[place])].to(x_TI.device)])
            sizes[place] += x_TI.abs().mean(0) / len(states_NTH)

        return add

    handles = [reader.register_forward_pre_hook(hook(place)) for place, reader in enumerate(readers)]
    try:
        walk.run(number, states_NTH)
    finally:
        for handle in handles:
            handle.remove()
    return [(torch.cat(found), size_I) for found, size_I in zip(samples, sizes, strict=True)]


def search(
    quantized: list[tuple[nn.Linear, Grid]], x_SI: Tensor, size_I: Tensor, source_I: Tensor, width: int, p: float | None
) -> tuple[float, Tensor]:
    """The best alpha, and t [width] for what stands before."""
    counts_V = torch.zeros(width, device=size_I.device).index_add_(0, source_I, torch.ones_like(size_I))
    size_V = torch.zeros_like(counts_V).index_add_(0, source_I, size_I).div_(counts_V.clamp_min(1)).clamp_min(1e-4)
    best, least, best_V = 0.0, torch.inf, torch.ones_like(size_V)
    for step in range(STEPS):
        t_V = size_V.pow(step / STEPS)
        t_V /= (t_V.max() * t_V.min()).sqrt()
        t_I, error = t_V[source_I], 0.0
        for reader, grid in quantized:
            scaled_OI = reader.weight.float() * t_I
            off_OI = scaled_OI - nearest(scaled_OI, start(scaled_OI, grid, p), grid)
            error += (x_SI @ (off_OI / t_I).T).square().sum().item()
        if error < least:
            best, least, best_V = step / STEPS, error, t_V
    return best, best_V


def fold(before: Any, readers: list[nn.Linear], t_V: Tensor, source_I: Tensor) -> None:
    """Columns of the readers times t; the norm's weight, or the linear layer's rows and bias, by t."""
    for reader in readers:
        reader.weight.copy_(reader.weight.float() * t_V[source_I])
    by_V = t_V if before.weight.ndim == 1 else t_V[:, None]
    before.weight.copy_(before.weight.float() / by_V)
    if getattr(before, "bias", None) is not None:
        before.bias.copy_(before.bias.float() / t_V)
