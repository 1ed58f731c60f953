"""GPTQ (arXiv 2210.17323): round column by column, and let the columns left make up for the error.

    H = X^T X / T of a linear layer's inputs, behind the decoder layers already quantized   [I, I]
    U = upper Cholesky factor of (H + damp mean(diag H))^-1                                 (section 3.3)
    for each column i:   e = (w_i - w^_i) / U_ii,     w_j -= U_ij e for all j > i           (eq. 2-3)

Columns are taken in blocks of 128: inside, errors are passed on at once; to the columns beyond, once a block. They come
in falling order of diag H, and each keeps the group that it had ("act-order" with "static groups"): parts are found
before, and codes come out in the original order. Any grid: only s, m and `Grid.nearest` are asked for.

The range that rounds a row's weights best is not the one that rounds it best behind this compensation: narrower ones
are, at few bits. Rows do not know of each other, and sum e^2 over the columns is the error of a row's outputs,
(w - w^) (H + damp mean(diag H)) (w - w^)^T. So every row is rounded in each of some RANGES, and the best is kept.
Inputs that never fire come last and do not count.

Known from T tokens H errs by some sqrt(I / T) of its size, and what is made up for along directions that it has seen
too little of is lost on other text. So that much is added to it in place of the paper's .01, with which outputs of few
tokens, as an expert has, are worse than behind rounding to nearest.

Decoder layers come one after the other, and inside of them one input after the other. What is rounded is not W, but the
weight that gives the full-precision model's outputs behind all that has been rounded before (`lrqat.starts.targets`).
Behind the pass over its columns, codes and ranges descend further (`lrqat.starts.descent`). Where attention's
output is just added to the residual stream, what attention reads (q, k, v) has another H, which tells what becomes of
an error there, and one of outputs beside it (`lrqat.starts.felt`), with which it is rounded once more
(`lrqat.starts.two_sided`).
Memory is the model, one decoder layer twice more, two sets of hidden states, and up to five [I, I] of one input, shared
by matrices that share it; or two, and one more beside [O, O] for each of q, k, v; or one for each expert's inputs and
one for what is inside of it. The head and the embeddings are left to the range search.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lrqat import kept
from lrqat.console import bar
from lrqat.experts import experts_apart
from lrqat.fused import FusedTensor
from lrqat.grid import Grid, Parts
from lrqat.plan import Plan
from lrqat.ranges import row_tiles, start
from lrqat.sites import TRAINED, Site
from lrqat.starts.codes import Start, nearest, start_from
from lrqat.starts.descent import descend
from lrqat.starts.factor import inverse_factor
from lrqat.starts.felt import felt
from lrqat.starts.stages import halves, holding
from lrqat.starts.targets import gather
from lrqat.starts.two_sided import two_sided
from lrqat.starts.walk import Walk

BLOCK = 128
DAMP = 0.01  # where nothing is known of tokens
RANGES = (1.1, 1.0, 0.92, 0.84, 0.77, 0.7, 0.64, 0.58, 0.52)  # shares of the range that the search has found
AT_ONCE = 1 << 24  # numbers of a float32 temporary: rows, in all ranges, times columns
GPU_AT_ONCE = 1 << 27  # there a column costs its launches, of however many rows it is


@torch.no_grad()
def gptq_model(
    model: Any,
    plan: Plan,
    blocks_NT: Tensor,
    p: float | None,
    *,
    folder: Path | None = None,
    key: str = "",
) -> dict[str, dict[str, Tensor]]:
    """Put W' (`lrqat.starts.codes`) in the place of the planned linear weights; returns their parts by site name.

    Rounding the weights that are left in the model with these parts gives the codes.

    Args:
        model: the full-precision model; what needs its outputs (a teacher) must have had them before.
        plan: which matrices, on which grids.
        blocks_NT: calibration tokens; the more, the better: twenty for each input of the widest matrix at least.
        p: exponent of the range search.
        folder: holds a file for each finished layer, so that an interrupted run goes on behind the last; None: nothing
            is kept.
        key: identifies model, data and settings; files under another key are refused.
    """
    walk = Walk(model, blocks_NT)
    x_NTH = walk.begin()
    y_NTH = x_NTH.clone()
    found: dict[str, dict[str, Tensor]] = {}
    for number in bar(range(len(walk.layers)), "gptq"):
        path = None if folder is None else kept.layer_path(folder, number)
        if path and path.is_file():
            begun = load_layer(path, key, walk.device)
            walk.run(number, y_NTH, y_NTH)
            with apart(model, plan, walk, number) as sites, holding(quantized_weights(model, plan, sites, begun)):
                walk.run(number, x_NTH, x_NTH)
        else:
            begun = gptq_layer(model, plan, walk, number, x_NTH, y_NTH, p)
            if path:
                save_layer(begun, path, key)
        for name, (adjusted_OI, parts) in begun.items():
            plan.sites[name].origin.within(model).copy_(adjusted_OI)
            found[name] = parts
    return found


@torch.no_grad()
def gptq_layer(
    model: Any,
    plan: Plan,
    walk: Walk,
    number: int,
    x_NTH: Tensor,
    y_NTH: Tensor,
    p: float | None,
    *,
    leave: bool = True,
) -> dict[str, Start]:
    """`gptq_model` of one decoder layer, whose weights stay as they are.

    Args:
        model: holds the layer, in full precision.
        plan: which matrices, on which grids.
        walk: through the model.
        number: of the layer.
        x_NTH: states in front of it, behind the quantized prefix; become those behind the quantized layer, if they are
            to leave it, else something in between.
        y_NTH: states in front of it in the full-precision model; become those behind it.
        p: exponent of the range search.
        leave: whether x_NTH is wanted afterwards.
    """
    done: dict[nn.Linear, Tensor] = {}
    found = {}
    with apart(model, plan, walk, number) as sites:
        both = halves(walk, number, y_NTH[:1], list(sites))
        for half in both:
            for stage in half.stages:
                sums = gather(half, stage, x_NTH, y_NTH, done, last=stage is half.stages[-1])
                behind = {}
                if half.end is not None and stage.whole and stage.stream is None:  # what attention reads
                    path = next(iter(stage.modules))
                    behind = felt(half, stage, x_NTH, inverse_factor(sums[path].hessian_II, DAMP, path))
                for path, module in stage.modules.items():
                    name, weight_OI = sites[path].name, module.weight.data
                    target_OI = sums[path].target(weight_OI).to(weight_OI.dtype)
                    damp = DAMP if path in behind else damping(module.in_features, sums[path].tokens)
                    hessian_II = behind[path].inputs_II if path in behind else sums[path].hessian_II
                    fused = gptq(target_OI, hessian_II, plan.grids[name], p, damp=damp, name=name)
                    fused = descend(target_OI, hessian_II, fused, damp)
                    if path in behind:
                        fused = two_sided(target_OI, behind[path], fused, damp, name)
                    found[name] = start_from(target_OI, fused, name)
                    done[module] = fused.dequantize().to(weight_OI)
            if not half.stages:
                half.run(y_NTH)
            if leave or half is not both[-1]:
                with holding(done):
                    half.run(x_NTH)
    return found


@contextmanager
def apart(model: Any, plan: Plan, walk: Walk, number: int) -> Iterator[dict[str, Site]]:
    """The planned linear layers and experts of a decoder layer, by the names of the modules that they are within."""
    prefix = f"{walk.name}.{number}."
    inside = [site for site in plan.sites.values() if site.origin.parameter.startswith(prefix) and site.kind in TRAINED]
    with experts_apart(model, inside) as found:
        yield {path: site for path, site in found.items() if site.name in plan.grids}


def damping(inputs: int, tokens: int) -> float:
    """The share of the mean of diag H that is added to it."""
    return math.sqrt(inputs / max(tokens, 1))


def quantized_weights(
    model: Any, plan: Plan, sites: Mapping[str, Site], begun: Mapping[str, Start]
) -> dict[nn.Linear, Tensor]:
    """Of a finished layer's modules: their quantized weights."""
    found: dict[nn.Linear, Tensor] = {}
    for path, site in sites.items():
        module: Any = model.get_submodule(path)
        adjusted_OI, parts = begun[site.name]
        found[module] = nearest(adjusted_OI, parts, plan.grids[site.name]).to(adjusted_OI)
    return found


def save_layer(begun: Mapping[str, Start], path: Path, key: str) -> None:
    """Write W' and parts of a finished layer."""
    weights = {name: each.weight_OI for name, each in begun.items()}
    kept.write(path, weights | kept.named_parts({name: each.parts for name, each in begun.items()}), key)


def load_layer(path: Path, key: str, device: torch.device) -> dict[str, Start]:
    """What `save_layer` has written."""
    weights: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    with kept.opened(path, key) as file:
        for name, part, values in kept.content(file):
            if part:
                parts.setdefault(name, {})[part] = values.to(device)
            else:
                weights[name] = values.to(device)
    return {name: Start(weight_OI, parts[name]) for name, weight_OI in weights.items()}


@torch.no_grad()
def gptq(
    weight_OI: Tensor, hessian_II: Tensor, grid: Grid, p: float | None, *, damp: float = DAMP, name: str = "weight"
) -> FusedTensor:
    """Codes and parts."""
    rows, columns = weight_OI.shape
    order_I = hessian_II.diagonal().argsort(descending=True, stable=True)
    live = int((hessian_II.diagonal() > 0).sum())
    factor_II, back_I = inverse_factor(hessian_II[order_I][:, order_I], damp, name), order_I.argsort()
    tiles = []
    at_once = AT_ONCE if weight_OI.device.type == "cpu" else GPU_AT_ONCE
    for tile in row_tiles(rows, columns, at_once // len(RANGES)):
        begun = start(weight_OI[tile], grid, p, name)
        levels_KI, found = in_best_range(weight_OI[tile].float(), order_I, live, factor_II, grid, begun)
        tiles.append(FusedTensor.make(grid.encode(levels_KI[:, back_I]), found, grid))
    return FusedTensor.stacked(tiles)


def in_best_range(
    weight_KI: Tensor, order_I: Tensor, live: int, factor_II: Tensor, grid: Grid, begun: Parts
) -> tuple[Tensor, dict[str, Tensor]]:
    """(levels, parts) of some rows, each in the range where its outputs err the least.

    Columns of levels are in the order that they were rounded in; the first `live` have inputs that fire.
    """
    tried = [grid.scaled(begun, share) for share in RANGES]
    parts = {part: torch.cat([each[part] for each in tried]) for part in begun}
    rest_IM = weight_KI.T[order_I].repeat(1, len(RANGES))  # M: rows, in all ranges
    levels_IM, cost_M = by_columns(rest_IM, order_I, live, factor_II, grid, parts)
    rows = len(weight_KI)
    best_K = cost_M.view(len(RANGES), rows).argmin(0) * rows + torch.arange(rows, device=cost_M.device)
    return levels_IM[:, best_K].T.contiguous(), {part: values[best_K] for part, values in parts.items()}


def by_columns(
    rest_IO: Tensor, order_I: Tensor, live: int, factor_II: Tensor, grid: Grid, parts: Parts
) -> tuple[Tensor, Tensor]:
    """(levels [I, O], error of each row's outputs [O]); `rest_IO`, in `order_I`, becomes the compensated weights."""
    columns = len(rest_IO)
    group, affine = grid.columns_per_group(columns), grid.affine(parts)
    group_I = (order_I // group).tolist()
    scale_GO = affine.scale_OG.T.contiguous()
    offset_GO = None if affine.offset_OG is None else affine.offset_OG.T.contiguous()
    levels_IO, cost_O = torch.empty_like(rest_IO), torch.zeros_like(rest_IO[0])
    for first in range(0, columns, BLOCK):
        end = min(first + BLOCK, columns)
        errors_KO = torch.empty_like(rest_IO[first:end])
        for i in range(first, end):
            s_O = scale_GO[group_I[i]]
            m_O = offset_GO[group_I[i]] if offset_GO is not None else 0.0
            levels_IO[i] = grid.nearest((rest_IO[i] - m_O) / s_O)
            error_O = (rest_IO[i] - (s_O * levels_IO[i] + m_O)) / factor_II[i, i]
            rest_IO[i + 1 : end].addr_(factor_II[i, i + 1 : end], error_O, alpha=-1)
            errors_KO[i - first] = error_O
        cost_O += errors_KO[: max(0, live - first)].square().sum(0)
        rest_IO[end:].addmm_(factor_II[first:end, end:].T, errors_KO, alpha=-1)
    return levels_IO, cost_O
