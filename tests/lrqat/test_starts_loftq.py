"""LoftQ: adapters that begin with what the codes lack."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lrqat.errors import LrqatError
from lrqat.grid import Grid, to_latent
from lrqat.methods.lr_qat import LRQAT
from lrqat.ranges import start
from lrqat.starts.codes import start_from
from lrqat.starts.gptq import gptq
from lrqat.starts.loftq import loftq, truncated_svd

ROWS, COLUMNS = 48, 256


def weight() -> Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)) * 0.05


def make(spelling: str, rank: int, **options: Any) -> LRQAT:
    grid, generator = Grid.parse(spelling), torch.Generator().manual_seed(0)
    chosen = {"alpha": 3.0, "downcast": "int", "learn_scales": True, **options}
    return LRQAT(weight(), start(weight(), grid, 2.0), grid, rank=rank, generator=generator, **chosen)


def distance(quantizer: LRQAT) -> float:
    """Root mean square between the latents and those of the weight."""
    affine = quantizer.affine()
    x_OI = to_latent(weight(), affine).clamp_(*quantizer.grid.ends)
    return (quantizer.latent(slice(None), affine) - x_OI).square().mean().sqrt().item()


@pytest.mark.parametrize("spelling", ["w2g32", "w3g32", "w3g32-min", "w4", "tq2_0", "q2_k"])
def test_latents_begin_nearer_to_the_weights(spelling: str) -> None:
    quantizer = make(spelling, 16)
    before = distance(quantizer)
    loftq(quantizer, weight(), torch.Generator().manual_seed(0))
    assert distance(quantizer) < 0.8 * before


@pytest.mark.parametrize("spelling", ["w2g32", "w3g32-min", "w4", "tq2_0", "q2_k"])
@pytest.mark.parametrize("calibrated", [False, True])
def test_training_begins_at_the_very_codes_of_its_start(spelling: str, calibrated: bool) -> None:
    quantizer, own_OI = make(spelling, 16), weight()
    if calibrated:
        inputs_TI = torch.randn(512, COLUMNS, generator=torch.Generator().manual_seed(2)).cumsum(1)
        begun = gptq(own_OI, inputs_TI.T @ inputs_TI / 512, quantizer.grid, 2.0)
        own_OI, parts = start_from(own_OI, begun)
        generator = torch.Generator().manual_seed(0)
        quantizer = LRQAT(
            own_OI, parts, begun.grid, rank=16, alpha=3.0, downcast="int", learn_scales=True, generator=generator
        )
        assert torch.equal(quantizer.fuse().codes_OI, begun.codes_OI)
    codes_OI = quantizer.fuse().codes_OI
    loftq(quantizer, own_OI, torch.Generator().manual_seed(0))
    assert torch.equal(quantizer.fuse().codes_OI, codes_OI)
    assert quantizer.moved() == 0
    quantizer.a_OR.data += torch.randn(quantizer.a_OR.shape, generator=torch.Generator().manual_seed(1))
    assert quantizer.moved() > 0


def test_full_rank_begins_as_near_to_the_weights_as_their_codes_allow() -> None:
    # A row has a weight near the edge of its cell, and is shrunk once: a tenth of what is missing is left.
    quantizer = make("w3g32", ROWS)
    before = distance(quantizer)
    loftq(quantizer, weight(), torch.Generator().manual_seed(0))
    assert distance(quantizer) < 0.11 * before


def test_more_rank_begins_nearer() -> None:
    found = []
    for rank in (2, 8, 32):
        quantizer = make("w2g32", rank)
        loftq(quantizer, weight(), torch.Generator().manual_seed(0))
        found.append(distance(quantizer))
    assert found == sorted(found, reverse=True)


@pytest.mark.parametrize("alpha", [0.5, 8.0])
def test_the_adapters_multiplier_is_divided_out(alpha: float) -> None:
    found = []
    for chosen in (alpha, 4.0):
        quantizer = make("w3g32", 4, alpha=chosen)
        loftq(quantizer, weight(), torch.Generator().manual_seed(0))
        found.append(quantizer.latent(slice(None), quantizer.affine()))
    assert torch.allclose(*found, atol=1e-5)


def test_the_truncated_svd_is_nearly_the_best() -> None:
    x_OI = torch.rand(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)) - 0.5
    left_OR, right_RI = truncated_svd(x_OI, 8, torch.Generator().manual_seed(1))
    best = torch.linalg.svdvals(x_OI)[:8].square().sum()
    assert (left_OR @ right_RI).square().sum() > 0.98 * best


def test_fractions_that_are_kept_need_no_loftq() -> None:
    with pytest.raises(LrqatError, match=r"^loftq: [^\n]*--downcast int$"):
        loftq(make("w4g32", 4, downcast="fixed"), weight(), torch.Generator())
