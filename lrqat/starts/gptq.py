"""GPTQ (arXiv 2210.17323): round column by column, and let the columns left make up for the error.

    H = X^T X / T of the inputs that the layer sees behind the already quantized prefix     [I, I]
    U = upper Cholesky factor of (H + damp mean(diag H))^-1                                 (section 3.3)
    for each column i:   e = (w_i - w^_i) / U_ii,     w_j -= U_ij e for all j > i           (eq. 2-3)

Columns are taken in blocks of 128: inside, errors are passed on at once; to the columns beyond, once a block. With
`act_order`, columns come in falling order of diag H, and each keeps the group that it had: parts are found before
("static groups") and codes come out in the original order. Without, a group's parts are found when its first column
comes, from the weights as they are by then. Any grid: only s, m and `Grid.nearest` are asked for.

Decoder layers come one after the other, so memory is the model, hidden states and the Hessians of one layer's inputs;
matrices that share their input (q, k, v) share the Hessian. Experts in 3-D parameters, the head and the embeddings are
left to the range search.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lrqat.console import bar
from lrqat.errors import LrqatError
from lrqat.fused import FusedTensor
from lrqat.grid import Grid
from lrqat.plan import Plan
from lrqat.ranges import start
from lrqat.sites import LINEAR, Site
from lrqat.starts.codes import rounded, start_from
from lrqat.starts.walk import Walk

BLOCK = 128
DAMP = 0.01


@torch.no_grad()
def gptq_model(
    model: Any,
    plan: Plan,
    blocks_NT: Tensor,
    p: float | None,
    *,
    act_order: bool = True,
    damp: float = DAMP,
    keep: str = "weight",
) -> dict[str, dict[str, Tensor]]:
    """Put W' (`lrqat.starts.codes`) in the place of the planned linear weights; returns their parts by site name.

    Rounding the weights that are left in the model with these parts gives GPTQ's codes.

    Args:
        model: the full-precision model; what needs its outputs (a teacher) must have had them before.
        plan: which matrices, on which grids.
        blocks_NT: calibration tokens; some 16k suffice.
        p: exponent of the range search.
        act_order: columns in falling order of their inputs' energy.
        damp: share of the mean of diag H that is added to it.
        keep: what W' is near to: "weight", the pretrained one, or "compensated", as it was when its column came.
    """
    walk = Walk(model, blocks_NT)
    states_NTH = walk.states_NTH
    found: dict[str, dict[str, Tensor]] = {}
    for number in bar(range(len(walk.layers)), "gptq"):
        parts = gptq_layer(model, plan, walk, number, states_NTH, p, act_order=act_order, damp=damp, keep=keep)
        real = {}
        for name in parts:
            weight_OI = model.get_parameter(plan.sites[name].origin.parameter).data
            real[name] = weight_OI.clone()
            weight_OI.copy_(rounded(weight_OI, parts[name], plan.grids[name]).dequantize())
        states_NTH = walk.run(number, states_NTH)
        for name, weight_OI in real.items():
            model.get_parameter(plan.sites[name].origin.parameter).data.copy_(weight_OI)
        found |= parts
    return found


@torch.no_grad()
def gptq_layer(
    model: Any,
    plan: Plan,
    walk: Walk,
    number: int,
    states_NTH: Tensor,
    p: float | None,
    *,
    act_order: bool = True,
    damp: float = DAMP,
    keep: str = "weight",
) -> dict[str, dict[str, Tensor]]:
    """`gptq_model` of one decoder layer, in front of which the quantized prefix has left `states_NTH`."""
    sites = layer_sites(plan, f"{walk.name}.{number}")
    hessians = input_hessians(walk, number, states_NTH, [module_path(site) for site in sites])
    found = {}
    for site in sites:
        weight_OI, grid = model.get_parameter(site.origin.parameter).data, plan.grids[site.name]
        hessian_II = hessians[module_path(site)]
        fused, before_OI = gptq(weight_OI, hessian_II, grid, p, act_order=act_order, damp=damp, name=site.name)
        real_OI = weight_OI if keep == "weight" else before_OI.to(weight_OI.dtype)
        adjusted_OI, found[site.name] = start_from(real_OI, fused, site.name)
        weight_OI.copy_(adjusted_OI)
    return found


def layer_sites(plan: Plan, layer: str) -> list[Site]:
    """The planned linear layers inside one decoder layer."""
    return [
        site
        for name, site in plan.sites.items()
        if name in plan.grids and site.kind == LINEAR and site.origin.parameter.startswith(f"{layer}.")
    ]


def module_path(site: Site) -> str:
    """The name of the module that holds a site."""
    return site.origin.parameter.rpartition(".")[0]


@torch.no_grad()
def input_hessians(walk: Walk, number: int, states_NTH: Tensor, paths: list[str]) -> dict[str, Tensor]:
    """X^T X / T, float32 [I, I], of the inputs of a decoder layer's linear layers, by their names in the model."""
    layer, prefix = walk.layers[number], f"{walk.name}.{number}."
    sums: dict[str, Tensor] = {}
    leaders: dict[str, str] = {}  # of the layers that are given one and the same tensor
    given: dict[int, tuple[Tensor, str]] = {}

    def hook(path: str) -> Any:
        def add(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            x = arguments[0]
            if path not in leaders:
                leaders[path] = given[id(x)][1] if id(x) in given else path
            if leaders[path] == path:
                given[id(x)] = (x, path)
                x_TI = x.reshape(-1, x.shape[-1]).float()
                if path not in sums:
                    sums[path] = x_TI.new_zeros(x_TI.shape[1], x_TI.shape[1])
                sums[path].addmm_(x_TI.T, x_TI)

        return add

    handles = [layer.get_submodule(path.removeprefix(prefix)).register_forward_pre_hook(hook(path)) for path in paths]
    try:
        for state_TH in states_NTH:
            walk.call(number, state_TH[None])
            given.clear()
    finally:
        for handle in handles:
            handle.remove()
    tokens = states_NTH.shape[0] * states_NTH.shape[1]
    for total_II in sums.values():
        total_II /= tokens
    return {path: sums[leaders[path]] if path in leaders else _identity(layer, path, prefix) for path in paths}


def _identity(layer: nn.Module, path: str, prefix: str) -> Tensor:
    """The Hessian of a layer that no token reached: round-to-nearest."""
    weight_OI: Any = layer.get_submodule(path.removeprefix(prefix)).weight
    return torch.eye(weight_OI.shape[1], device=weight_OI.device)


@torch.no_grad()
def gptq(
    weight_OI: Tensor,
    hessian_II: Tensor,
    grid: Grid,
    p: float | None,
    *,
    act_order: bool = True,
    damp: float = DAMP,
    name: str = "weight",
) -> tuple[FusedTensor, Tensor]:
    """(codes and parts, the compensated weights float32 [O, I] that were rounded to them)."""
    columns = weight_OI.shape[1]
    parts = start(weight_OI, grid, p, name)
    energy_I = hessian_II.diagonal()
    order_I = energy_I.argsort(descending=True, stable=True) if act_order else torch.arange(columns)
    order_I = order_I.to(weight_OI.device)
    factor_II = inverse_factor(hessian_II[order_I][:, order_I], damp, name)
    rest_IO = weight_OI.float().T[order_I].contiguous()
    levels_IO = torch.empty_like(rest_IO)
    group, unit = grid.columns_per_group(columns), fitted_together(grid, columns)
    block = max(1, BLOCK // unit) * unit if not act_order and unit < columns else BLOCK
    affine = grid.affine(parts)
    for first in range(0, columns, block):
        end = min(first + block, columns)
        errors_KO = torch.empty_like(rest_IO[first:end])
        for i in range(first, end):
            column = int(order_I[i])
            if not act_order and unit < columns and column % unit == 0:
                refit(parts, grid, rest_IO[column : column + unit].T, column // unit, columns // unit, p)
                affine = grid.affine(parts)
            s_O = affine.scale_OG[:, column // group]
            m_O = affine.offset_OG[:, column // group] if affine.offset_OG is not None else 0.0
            levels_IO[i] = grid.nearest((rest_IO[i] - m_O) / s_O)
            error_O = (rest_IO[i] - (s_O * levels_IO[i] + m_O)) / factor_II[i, i]
            rest_IO[i + 1 : end].addr_(factor_II[i, i + 1 : end], error_O, alpha=-1)
            errors_KO[i - first] = error_O
        rest_IO[end:].addmm_(factor_II[first:end, end:].T, errors_KO, alpha=-1)
    back_I = order_I.argsort()
    codes_OI = grid.encode(levels_IO[back_I].T.contiguous())
    return FusedTensor.make(codes_OI, parts, grid), rest_IO[back_I].T.contiguous()


def inverse_factor(hessian_II: Tensor, damp: float, name: str) -> Tensor:
    """U with U^T U = (H + damp mean(diag H))^-1; more damping where float32 needs it. Inputs that never fire cost 1."""
    hessian_II = hessian_II.clone()
    diagonal_I = hessian_II.diagonal()
    diagonal_I[diagonal_I == 0] = 1.0
    mean = diagonal_I.mean()
    for more in (damp, 9 * damp, 90 * damp):
        diagonal_I += more * mean
        lower_II, failed = torch.linalg.cholesky_ex(hessian_II)
        if not failed:
            upper_II: Tensor
            upper_II, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower_II), upper=True)
            if not failed:
                return upper_II
    raise LrqatError(f"{name}: the calibration inputs are not finite, or have no inverse; give more --data")


def fitted_together(grid: Grid, columns: int) -> int:
    """Columns whose parts `Grid.fit` finds together: a group; of a K-quant, a super-block."""
    return columns // min(part.shape[1] for part in grid.parts(1, columns).values())


def refit(parts: dict[str, Tensor], grid: Grid, weight_OK: Tensor, number: int, count: int, p: float | None) -> None:
    """Find the parts of one run of columns again, in place."""
    fitted: Mapping[str, Tensor] = grid.fit(weight_OK.contiguous(), p)
    for name, values in fitted.items():
        width = parts[name].shape[1] // count
        parts[name][:, number * width : (number + 1) * width] = values
