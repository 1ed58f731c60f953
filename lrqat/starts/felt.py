"""What an error of q, k or v does behind attention.

    y [T, H]        what leaves attention's half of a layer, of one block;  u [T, H]  noise, N(0, 1)
    G [O, I]        d<u, y> / dW = sum over tokens of g_t x_t^T
    E_u <dW, G>^2 = |dy|^2        for a small change dW of the weight

GPTQ has |X dW^T|^2 in its place, as if all outputs and all tokens counted alike. But scores ask for few directions of q
and k, everybody looks at the first token, and errors of v average out over the tokens that are looked at, unless they
are the same in all of them: G knows it, being a sum over tokens. The second moment of G is kept as two factors (K-FAC,
arXiv 1503.05671; for rounding YAQA, arXiv 2505.22988, of the whole model's loss); in that of the outputs G is whitened
by the inputs' own H, damped:

    inputs  H_I = E[G^T G]             outputs  H_O = E[G H^-1 G^T],   H = X^T X / T

A pass forward and one backward through attention's half for each block, and more draws of u where blocks are few;
nothing but sums is kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lrqat.starts.stages import Half, Stage

DRAWS = 64  # of all blocks together, at least


class Felt(NamedTuple):
    """Float32: H_I [I, I] and H_O [O, O]."""

    inputs_II: Tensor
    outputs_OO: Tensor


def felt(half: Half, stage: Stage, x_NTH: Tensor, factor_II: Tensor) -> dict[str, Felt]:
    """By the names of a stage's linear layers; without those that what leaves the half has no gradient to.

    Args:
        half: attention's, with its full-precision weights.
        stage: one of `half.stages` that every token reaches.
        x_NTH: states in front of it, behind the quantized prefix.
        factor_II: U of its inputs' Hessian (`lrqat.starts.factor`).
    """
    sums = {
        path: Felt(torch.zeros_like(factor_II), factor_II.new_zeros(module.out_features, module.out_features))
        for path, module in stage.modules.items()
    }
    generator, draws = torch.Generator().manual_seed(0), math.ceil(DRAWS / len(x_NTH))
    share = 1 / (len(x_NTH) * draws)
    for x_TH in x_NTH:
        for found in gradients(half, stage, x_TH[None], generator, draws):
            for path, gradient_OI in found.items():
                white_OI = gradient_OI @ factor_II.T
                sums[path].inputs_II.addmm_(gradient_OI.T, gradient_OI, alpha=share)
                sums[path].outputs_OO.addmm_(white_OI, white_OI.T, alpha=share)
    return {path: both for path, both in sums.items() if both.inputs_II.diagonal().any()}


def gradients(
    half: Half, stage: Stage, x_1TH: Tensor, generator: torch.Generator, draws: int = 1
) -> Iterator[dict[str, Tensor]]:
    """G, float32 [O, I], of one block and each draw; nothing where no gradient arrives."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def begin_at(path: str) -> Any:
        def hook(_: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
            inputs[path], outputs[path] = arguments[0], output.detach().requires_grad_()
            return outputs[path].clone()  # some models clamp it in place

        return hook

    with ExitStack() as context:
        for path, module in stage.modules.items():
            context.callback(module.register_forward_hook(begin_at(path)).remove)
        context.enter_context(torch.enable_grad())
        y_1TH = half.call(x_1TH)
    for draw in range(draws if y_1TH.requires_grad else 0):
        noise_1TH = torch.randn(y_1TH.shape, generator=generator).to(y_1TH)
        found = torch.autograd.grad(
            y_1TH, list(outputs.values()), noise_1TH, retain_graph=draw < draws - 1, materialize_grads=True
        )
        yield {
            path: gradient.flatten(0, -2).float().T @ inputs[path].detach().flatten(0, -2).float()
            for path, gradient in zip(outputs, found, strict=True)
        }
