"""With one scale a row, dL/dW is not formed; the gradients are those of the tiles that form it."""

from __future__ import annotations

import pytest
import torch
from test_tiles import needs_compiler
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from lrqat.grid import Grid, Rows
from lrqat.methods import base
from lrqat.methods.base import WeightQuantizer
from lrqat.methods.lr_qat import DOWNCASTS, LRQAT
from lrqat.methods.scales import Scales
from lrqat.ranges import start

ROWS, COLUMNS, TOKENS, RANK = 96, 256, 600, 4  # six times what is summed at once, and more than whole runs
# Three float32 sums in a row, of at most 600 terms each, in two orders; ds and dm share digits on grids with zeros.
FLOAT32_SUMS = 3 * TOKENS * 2.0**-24 * 4
# bfloat16 products: g, X, A, B, X B^T, the weight and the output are rounded once each, 2^-9, and errors are random.
BFLOAT16 = 0.02


def quantizer(spelling: str, downcast: str | None, clipped: float) -> WeightQuantizer:
    """LR-QAT, or scales alone, some way into its training; about this share of latents is clipped."""
    grid = Grid.parse(spelling)
    generator = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(ROWS, COLUMNS, generator=generator) * 0.05
    parts = start(weight_OI, grid, 3.5)
    if downcast is None:
        return Scales(weight_OI, parts, grid)
    made = LRQAT(
        weight_OI, parts, grid, rank=RANK, alpha=6.0, downcast=downcast, learn_scales=True, generator=generator
    )
    made.b_RI.data.normal_(0, 0.3, generator=generator)
    if clipped:
        made.b_RI.data[:, : max(1, int(clipped * COLUMNS))] *= 1000
    for gain in made.gains.values():
        gain.data += 0.1 * torch.rand(gain.shape, generator=generator)
    return made


def gradients(found: WeightQuantizer, dtype: torch.dtype, size: float | None = 1.0) -> dict[str, Tensor]:
    """Of everything that is trained, of x and of the bias, whose size is given."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, TOKENS // 2, COLUMNS, generator=generator).to(dtype).requires_grad_()
    bias = None if size is None else (size * torch.randn(ROWS, generator=generator)).to(dtype).requires_grad_()
    weights = torch.randn(2, TOKENS // 2, ROWS, generator=generator).to(dtype)
    found.zero_grad()
    (found(x, bias) * weights).sum().backward()
    named = {**dict(found.named_parameters()), "x": x, **({} if bias is None else {"bias": bias})}
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in named.values())
    return {name: p.grad.clone() for name, p in named.items() if p.grad is not None}


@pytest.mark.parametrize("clipped", [0.0, 0.004, 0.5])
@pytest.mark.parametrize("spelling", ["w4", "w3", "w2", "w8", "w4-asym", "w3-asym"])
@pytest.mark.parametrize("downcast", [*DOWNCASTS, None])
def test_factored_gradients_are_those_of_the_tiles(
    spelling: str, downcast: str | None, clipped: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lrqat.ranges.TILE_WEIGHTS", 40 * COLUMNS)
    monkeypatch.setattr("lrqat.methods.factored.AT_ONCE", 100 * ROWS)
    found = quantizer(spelling, downcast, clipped)
    if downcast and clipped:
        low, high = found.grid.bounds
        latent_OI = found.latent(slice(None), found.affine())
        share = ((latent_OI <= low) | (latent_OI >= high)).float().mean().item()
        assert clipped / 2 < share < 2 * clipped + 0.2
    factored = gradients(found, torch.float32)
    found.factored = False
    for name, expected in gradients(found, torch.float32).items():
        assert (factored[name] - expected).abs().max() <= FLOAT32_SUMS * expected.abs().max(), name


@pytest.mark.parametrize("widened", [False, True])
@pytest.mark.parametrize("spelling", ["w4", "w3-asym", "w4g32"])
@pytest.mark.parametrize("downcast", ["fixed", None])
@pytest.mark.parametrize("bias", [None, 128.0])  # of Qwen2's keys, in which a bfloat16 Y has lost X W^T
def test_in_bfloat16_they_differ_by_its_rounding(
    spelling: str, downcast: str | None, bias: float | None, widened: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lrqat.methods.products.widens", lambda dtype, device: widened and dtype == torch.bfloat16)
    monkeypatch.setattr("lrqat.methods.products.FEW", 0)
    found = quantizer(spelling, downcast, 0.0)
    exact = gradients(found, torch.float32, bias)
    for name, rough in gradients(found, torch.bfloat16, bias).items():
        assert (rough - exact[name]).norm() <= BFLOAT16 * exact[name].norm(), name


def test_a_factored_step_multiplies_what_lora_does() -> None:
    found = quantizer("w4", "fixed", 0.0)
    found.large()["b_RI"].data *= 0.1  # nothing is clipped
    x = torch.randn(TOKENS, COLUMNS, requires_grad=True)
    with FlopCounterMode(display=False) as counted:
        found(x, None).sum().backward()
    product = 2 * TOKENS * ROWS * COLUMNS
    low_rank = 4 * TOKENS * (ROWS + COLUMNS) * RANK  # X B^T, g^T of it, g A, and that with X
    merged = 2 * (2 * ROWS * COLUMNS * RANK)  # A B, in forward and backward
    assert counted.get_total_flops() == 2 * product + low_rank + merged


def test_what_is_kept_for_backward_is_the_input_and_the_output() -> None:
    found = quantizer("w4", "fixed", 0.0)
    x = torch.randn(TOKENS, COLUMNS, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = found(x, None)
    large = {t.data_ptr() for t in saved if t.numel() > ROWS}
    assert large == {x.data_ptr(), y.data_ptr()}


@needs_compiler
def test_under_checkpointing_codes_are_kept_and_not_rounded_a_third_time(monkeypatch: pytest.MonkeyPatch) -> None:
    found = quantizer("w4", "fixed", 0.004)
    found.compiled = True
    expected = gradients(found, torch.float32)
    found.checkpointed = True
    forward, made = found.forward, LRQAT.pieces
    asked: list[Rows] = []
    monkeypatch.setattr(LRQAT, "pieces", lambda self, rows: asked.append(rows) or made(self, rows))
    monkeypatch.setattr(found, "forward", lambda x, bias: checkpoint(forward, x, bias, use_reentrant=False))
    for name, again in gradients(found, torch.float32).items():
        assert torch.equal(again, expected[name]), name
    assert len([rows for rows in asked if isinstance(rows, slice)]) == 2 * len(found.calls(found.affine()))
    assert any(isinstance(rows, Tensor) for rows in asked)  # of the rows that hold a clipped weight


def test_groups_take_the_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "weigh_reaching", None)
    gradients(quantizer("w4g32", "fixed", 0.0), torch.float32)
