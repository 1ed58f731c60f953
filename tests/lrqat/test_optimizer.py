"""Adam's moments, in 32 and in 8 bits, and what a checkpoint keeps of them."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

from lrqat.errors import LrqatError
from lrqat.optimizer import check_optimizer, load_state, make_optimizer, moment_bytes, state_of
from lrqat.settings import OPTIMIZERS

torchao = pytest.importorskip("torchao", reason="moments in 8 bits need torchao, which slows every import")
SHAPES = ((64, 128), (7, 3))  # 8192 numbers; too few for 8 bits


def parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def step(optimizer: torch.optim.Optimizer, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.randn(p.shape, generator=generator)
    optimizer.step()


def made(name: str, trained: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return make_optimizer(name, [{"params": trained[:1], "lr": 1e-2}, {"params": trained[1:], "lr": 1e-3}])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_behind_a_checkpoint_is_the_step_that_would_have_been(name: str) -> None:
    straight, broken = parameters(), parameters()
    first, second = made(name, straight), made(name, broken)
    for number in (1, 2):
        step(first, number)
        step(second, number)
    tensors, groups = state_of(second)
    assert all(isinstance(group["lr"], float) for group in groups)
    again = made(name, broken)
    load_state(again, {key: value.clone() for key, value in tensors.items()}, groups)
    for number in (3, 4):
        step(first, number)
        step(again, number)
    assert all(torch.equal(p, q) for p, q in zip(straight, broken, strict=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_bytes_of_moments_are_those_that_a_plan_counts(name: str) -> None:
    trained = parameters()
    optimizer = made(name, trained)
    step(optimizer, 1)
    held = sum(t.nbytes for t in state_of(optimizer)[0].values() if t.ndim)
    assert held == sum(moment_bytes(name, p.numel()) for p in trained)


def test_moments_of_8_bits_take_steps_like_those_of_32() -> None:
    full, eight = parameters(), parameters()
    for name, trained in (("adamw", full), ("adamw8bit", eight)):
        optimizer = made(name, trained)
        for number in range(20):
            step(optimizer, number)
    begun = parameters()[0]
    moved, apart = (full[0] - begun).norm(), (full[0] - eight[0]).norm()
    assert 0 < apart < 0.1 * moved  # arXiv 2110.02861: the error of a step is a few percent, and not systematic


def test_eight_bits_without_torchao_are_refused_before_anything_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str, *_: Any) -> None:
        assert name == "torchao"

    monkeypatch.setattr(importlib.util, "find_spec", missing)
    with pytest.raises(LrqatError, match=r"^--optimizer adamw8bit needs torchao: pip install [^\n]*$"):
        check_optimizer("adamw8bit")
    check_optimizer("adamw")
