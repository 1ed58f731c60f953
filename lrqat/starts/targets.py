"""What a linear layer is to give, behind a prefix that is quantized: the full-precision model's outputs.

    x, x' [T, I]        its inputs behind all that has been rounded so far, and in the full-precision model
    r, r' [T, O]        the residual stream that its outputs are added to, for o_proj and down_proj
    min |X V^T + R - (X' W^T + R')|^2 + T lambda |V - W|^2
    V = W + D^T X (X^T X + T lambda)^-1,      D = (X' - X) W^T + R' - R         [T, O]

Rounding V instead of W takes back what earlier layers have lost, as far as this layer's inputs can tell it: GPTAQ's
asymmetric calibration (arXiv 2504.02692), in closed form, and with the residual stream, which that leaves out. Stages
(`lrqat.starts.stages`) come one after the other, so that each sees what those before it have become. Experts, which see
some of the tokens, may see others once routers differ: they keep W, and come last.

The fewer the tokens for each input, the more V fits what is theirs alone: lambda falls with T / I.

A stage is two passes over the blocks that end where its input arrives; nothing but sums is kept of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lrqat.errors import LrqatError
from lrqat.starts.stages import Half, Stage, holding
from lrqat.starts.walk import Reached

RIDGE = 16.0  # lambda is this times I / T times the mean of diag X^T X / T

Arrive = Callable[[Tensor, bool], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Sums:
    """What is known of a stage's inputs, in float32.

    Attributes:
        hessian_II: X^T X / T.
        tokens: whose inputs they are.
        factor_II: V = W + W factor.
        change_OI: V = W + change, of a layer whose residual stream is known.
    """

    hessian_II: Tensor
    tokens: int
    factor_II: Tensor | None = None
    change_OI: Tensor | None = None

    def target(self, weight_OI: Tensor) -> Tensor:
        """V, float32 [O, I]."""
        if self.factor_II is not None:
            return weight_OI.float() + weight_OI.float() @ self.factor_II
        return weight_OI.float() if self.change_OI is None else weight_OI.float() + self.change_OI


@torch.no_grad()
def gather(
    half: Half, stage: Stage, x_NTH: Tensor, y_NTH: Tensor, quantized: Mapping[nn.Linear, Tensor], *, last: bool = False
) -> dict[str, Sums]:
    """The sums of a stage's inputs, by the names of its linear layers; those of one input share theirs.

    Args:
        half: of a layer that has its full-precision weights.
        stage: one of `half.stages`.
        x_NTH: states in front of it, behind the quantized prefix.
        y_NTH: the same of the full-precision model.
        quantized: what the weights of earlier stages have become.
        last: of the half: y_NTH becomes what leaves it.
    """
    if not stage.whole:
        if last:
            half.run(y_NTH)
        return _scattered(half, stage, x_NTH, quantized)
    path, module = next(iter(stage.modules.items()))
    tokens, inputs = x_NTH.shape[0] * x_NTH.shape[1], module.in_features
    weight_OI = None if stage.stream is None else module.weight.float()
    hessian_II = module.weight.new_zeros(inputs, inputs, dtype=torch.float32)
    missed_KI = hessian_II.new_zeros(inputs if stage.stream is None else module.out_features, inputs)
    with arriving(half, path, module, stage.stream) as arrive:
        for x_TH, y_TH in zip(x_NTH, y_NTH, strict=True):
            full_TI, full_TO = arrive(y_TH, last)
            with holding(quantized):
                own_TI, own_TO = arrive(x_TH, False)
            missed_TK = full_TI - own_TI
            if weight_OI is not None and full_TO is not None and own_TO is not None:
                missed_TK = missed_TK @ weight_OI.T + (full_TO - own_TO)
            hessian_II.addmm_(own_TI.T, own_TI)
            missed_KI.addmm_(missed_TK.T, own_TI)
    change_KI = regression(hessian_II.div_(tokens), missed_KI.div_(tokens), RIDGE * inputs / tokens, path)
    changes = (change_KI, None) if stage.stream is None else (None, change_KI)
    sums = Sums(hessian_II, tokens, *changes)
    return dict.fromkeys(stage.modules, sums)


def regression(hessian_II: Tensor, missed_KI: Tensor, ridge: float, name: str) -> Tensor | None:
    """missed (H + ridge mean(diag H))^-1; None where no input fires."""
    check_finite(missed_KI, name)
    added = ridge * hessian_II.diagonal().mean()
    if not added > 0:
        return None
    ridged_II = hessian_II.clone()
    ridged_II.diagonal().add_(added)
    lower_II, failed = torch.linalg.cholesky_ex(ridged_II)
    return None if failed else torch.cholesky_solve(missed_KI.T, lower_II).T.contiguous()


def mean_firing(hessian_II: Tensor) -> Tensor:
    """The mean of diag H over inputs that fire; zero where none does."""
    diagonal_I = hessian_II.diagonal()
    return diagonal_I.sum() / (diagonal_I > 0).sum().clamp_min(1)


def check_finite(sums: Tensor, name: str) -> None:
    """Refuse sums of inputs that have overflowed."""
    if not sums.isfinite().all():
        raise LrqatError(f"{name}: the calibration inputs are not finite; use --dtype bfloat16 or float32")


@contextmanager
def arriving(half: Half, path: str, module: nn.Linear, stream: nn.Module | None) -> Iterator[Arrive]:
    """A function of one block's state [T, H] in front of a half: the module's input, and the residual stream, float32.

    If its second argument is true, the state becomes what leaves the half; else the pass ends where the input arrives.
    """
    seen: dict[str, Tensor] = {}
    mine = object()
    on = False

    def reach(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        seen["input"] = arguments[0].clone() if on else arguments[0]  # may be the state itself, which is written over
        if not on:
            raise Reached(mine)

    def note(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        seen["stream"] = arguments[0].clone()

    def arrive(state_TH: Tensor, going_on: bool) -> tuple[Tensor, Tensor | None]:
        nonlocal on
        on = going_on
        seen.clear()
        try:
            output_1TH = half.call(state_TH[None])
        except Reached as reached:
            if reached.args != (mine,):
                raise
        else:
            state_TH.copy_(output_1TH[0])
        if "input" not in seen or seen["input"].numel() != len(state_TH) * module.in_features:
            raise LrqatError(f"{path}: sees all tokens of one block and not of another; leave it out by --skip")
        x_TI = seen["input"].reshape(-1, module.in_features).float()
        return x_TI, None if stream is None else seen["stream"].reshape(-1, module.out_features).float()

    with ExitStack() as hooks:
        hooks.callback(module.register_forward_pre_hook(reach).remove)
        if stream is not None:
            hooks.callback(stream.register_forward_pre_hook(note).remove)
        yield arrive


def _scattered(half: Half, stage: Stage, x_NTH: Tensor, quantized: Mapping[nn.Linear, Tensor]) -> dict[str, Sums]:
    """Hessians alone, one for layers that are called in turn with one tensor, as gate and up of an expert.

    Of a layer that no token reaches: of inputs that know nothing of each other.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    own: dict[str, str] = {}  # of each layer: the one whose sums are its
    last: tuple[Tensor | None, str] = (None, "")

    def add(path: str) -> Any:
        def hook(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            nonlocal last
            whose = last[1] if arguments[0] is last[0] else path
            if own.setdefault(path, whose) != whose:
                raise LrqatError(f"{path}: shares its input at one time and not at another; leave it out by --skip")
            last = arguments[0], whose
            if whose == path:
                x_TI = arguments[0].flatten(0, -2).float()
                if path not in sums:
                    sums[path], counts[path] = x_TI.new_zeros(x_TI.shape[1], x_TI.shape[1]), 0
                sums[path].addmm_(x_TI.T, x_TI)
                counts[path] += len(x_TI)

        return hook

    with ExitStack() as hooks, holding(quantized):
        for path, module in stage.modules.items():
            hooks.callback(module.register_forward_pre_hook(add(path)).remove)
        for x_TH in x_NTH:
            half.call(x_TH[None])
    for path, sum_II in sums.items():
        sum_II /= max(counts[path], 1)
    return {
        path: Sums(sums[own[path]], counts[own[path]])
        if path in own
        else Sums(torch.eye(module.in_features, device=module.weight.device), 0)
        for path, module in stage.modules.items()
    }
