"""Rounded activations: every token on its own grid, nothing clipped, gradients straight through."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lrqat.activations import per_token, round_inputs


@given(st.integers(2, 8), st.booleans(), st.integers(0, 2**32))
def test_a_token_takes_at_most_two_to_the_bits_values_and_errs_by_half_a_step(
    bits: int, symmetric: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(5, 300, generator=generator) * 10 ** torch.randn(5, 1, generator=generator)
    rounded = per_token(x, bits, symmetric=symmetric)
    assert all(len(token.unique()) <= 1 << bits for token in rounded)
    reach = x.abs().amax(1) / ((1 << (bits - 1)) - 1) if symmetric else (x.amax(1) - x.amin(1)) / ((1 << bits) - 1)
    assert torch.all((rounded - x).abs().amax(1) <= 0.5001 * reach)


def test_rounding_a_token_on_paper() -> None:
    x = torch.tensor([[127.0, -63.4, 0.4], [0.0, 0.0, 0.0]])
    assert per_token(x).tolist() == [[127.0, -63.0, 0.0], [0.0, 0.0, 0.0]]
    assert per_token(torch.tensor([[0.0, 15.0, 3.4]]), 4, symmetric=False).tolist() == [[0.0, 15.0, 3.0]]


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_gradient_passes_straight_through(symmetric: bool) -> None:
    x = torch.randn(3, 8, requires_grad=True)
    weight = torch.randn(3, 8)
    (per_token(x, 4, symmetric=symmetric) * weight).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, weight)


def test_only_the_named_modules_see_rounded_inputs() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    x = torch.randn(4, 8)
    plain = model(x)
    round_inputs(model, ["1"], 4)
    assert torch.equal(model(x), model[1].forward(per_token(model[0](x), 4))) and not torch.equal(model(x), plain)
