"""What a linear layer is to give, behind a prefix that is quantized: the full-precision model's outputs.

    x, x^ [T, I]        its inputs in the full-precision model, and behind all that has been rounded so far
    r, r^ [T, O]        the residual stream that its outputs are added to, for o_proj and down_proj
    min |x^ V^T + r^ - (x W^T + r)|^2 + T lambda |V - W|^2
    V = W + D^T X^ (X^T X^ + T lambda)^-1,      D = (x - x^) W^T + r - r^         [T, O]

Rounding V instead of W takes back what earlier layers have lost, as far as this layer's inputs can tell it: GPTAQ's
asymmetric calibration (arXiv 2504.02692), in closed form, and with the residual stream, which that leaves out. Stages
(`lrqat.starts.stages`) come one after the other, so that each sees what those before it have become. Experts, which see
some of the tokens, may see others once routers differ: they keep W, and come last.

A stage is two passes over the blocks that end where its input arrives; nothing but sums is kept of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lrqat.starts.stages import Arrived, Half, Stage, holding

RIDGE = 0.3  # lambda, as a share of the mean of diag H


@dataclass(frozen=True)
class Sums:
    """Over T tokens, in float32.

    Attributes:
        hessian_II: X^T X^ / T.
        missed: D^T X^ / T, [O, I]; without a stream (x - x^)^T X^ / T, [I, I]; None: not to be made up for.
        stream: whether it is D.
    """

    hessian_II: Tensor
    missed: Tensor | None
    stream: bool

    def target(self, weight_OI: Tensor) -> Tensor:
        """V, float32 [O, I]."""
        if self.missed is None:
            return weight_OI.float()
        missed_OI = self.missed if self.stream else weight_OI.float() @ self.missed
        ridge = RIDGE * self.hessian_II.diagonal().mean()
        if not ridge > 0:
            return weight_OI.float()
        ridged_II = self.hessian_II + ridge * torch.eye(len(self.hessian_II), device=self.hessian_II.device)
        lower_II, failed = torch.linalg.cholesky_ex(ridged_II)
        return weight_OI.float() if failed else weight_OI + torch.cholesky_solve(missed_OI.T, lower_II).T


@torch.no_grad()
def gather(
    half: Half, stage: Stage, x_NTH: Tensor, y_NTH: Tensor, rounded: Mapping[nn.Linear, Tensor], *, last: bool = False
) -> dict[str, Sums]:
    """The sums of a stage's inputs, by the names of its linear layers; those of one input share theirs.

    Args:
        half: of a layer that has its full-precision weights.
        stage: one of `half.stages`.
        x_NTH: states in front of it, behind the quantized prefix.
        y_NTH: the same of the full-precision model.
        rounded: what the weights of earlier stages have become.
        last: of the half: y_NTH becomes what leaves it.
    """
    if not stage.whole:
        if last:
            half.run(y_NTH)
        return _scattered(half, stage, x_NTH, rounded)
    module = next(iter(stage.modules.values()))
    tokens, inputs = x_NTH.shape[0] * x_NTH.shape[1], module.in_features
    hessian_II = torch.zeros(inputs, inputs, device=x_NTH.device)
    missed = torch.zeros(module.out_features if stage.stream else inputs, inputs, device=x_NTH.device)
    seen: dict[str, Any] = {}

    def arrive(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        seen["input"] = arguments[0]
        if not seen.get("on"):
            raise Arrived

    def through(state_TH: Tensor, on: bool) -> tuple[Tensor, Tensor | None]:
        seen["on"] = on
        with suppress(Arrived):
            left_1TH = half.call(state_TH[None])
            state_TH.copy_(left_1TH[0])
        stream = seen.get("stream")
        return seen["input"].flatten(0, -2).float(), None if stream is None else stream.flatten(0, -2).float()

    with ExitStack() as hooks:
        hooks.callback(module.register_forward_pre_hook(arrive).remove)
        if stage.stream:
            # A copy: what leaves the half is written over what the stream begins with.
            note = stage.stream.register_forward_pre_hook(lambda _, x: seen.update(stream=x[0].clone()))
            hooks.callback(note.remove)
        for x_TH, y_TH in zip(x_NTH, y_NTH, strict=True):
            full_TI, full_TO = through(y_TH, last)
            with holding(rounded):
                own_TI, own_TO = through(x_TH, False)
            hessian_II.addmm_(own_TI.T, own_TI)
            off = full_TI - own_TI
            if full_TO is not None and own_TO is not None:
                off = off @ module.weight.float().T + (full_TO - own_TO)
            missed.addmm_(off.T, own_TI)
    sums = Sums(hessian_II.div_(tokens), missed.div_(tokens), stage.stream is not None)
    return dict.fromkeys(stage.modules, sums)


def _scattered(half: Half, stage: Stage, x_NTH: Tensor, rounded: Mapping[nn.Linear, Tensor]) -> dict[str, Sums]:
    """Hessians alone. Of a layer that no token reaches: of inputs that know nothing of each other."""
    sums: dict[str, Tensor] = {}

    def add(path: str) -> Any:
        def hook(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            x_TI = arguments[0].flatten(0, -2).float()
            if path not in sums:
                sums[path] = x_TI.new_zeros(x_TI.shape[1], x_TI.shape[1])
            sums[path].addmm_(x_TI.T, x_TI)

        return hook

    with ExitStack() as hooks, holding(rounded):
        for path, module in stage.modules.items():
            hooks.callback(module.register_forward_pre_hook(add(path)).remove)
        for x_TH in x_NTH:
            half.call(x_TH[None])
    tokens = x_NTH.shape[0] * x_NTH.shape[1]
    nothing = {path: torch.eye(module.in_features, device=x_NTH.device) for path, module in stage.modules.items()}
    return {path: Sums(sums[path] / tokens if path in sums else nothing[path], None, False) for path in stage.modules}
