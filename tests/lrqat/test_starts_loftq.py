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
def test_latents_begin_nearer_to_the_weights_and_no_turn_makes_it_worse(spelling: str) -> None:
    quantizer = make(spelling, 16)
    before = distance(quantizer)
    errors = loftq(quantizer, weight(), torch.Generator().manual_seed(0))
    assert errors == sorted(errors, reverse=True)
    assert distance(quantizer) == pytest.approx(errors[-1], rel=1e-4)
    assert distance(quantizer) < 0.8 * before


@pytest.mark.parametrize("spelling", ["w2g32", "w3g32-min", "w4", "q2_k"])
def test_no_code_has_moved_before_training(spelling: str) -> None:
    quantizer = make(spelling, 16)
    loftq(quantizer, weight(), torch.Generator().manual_seed(0))
    assert quantizer.moved() == 0
    quantizer.a_OR.data += torch.randn(quantizer.a_OR.shape, generator=torch.Generator().manual_seed(1))
    assert quantizer.moved() > 0


def test_full_rank_begins_at_the_weights_themselves() -> None:
    quantizer = make("w3g32", ROWS)
    plain = quantizer.fuse()
    loftq(quantizer, weight(), torch.Generator().manual_seed(0))
    assert distance(quantizer) < 1e-5
    assert (quantizer.fuse().codes_OI == plain.codes_OI).float().mean() > 0.999  # latents within 1e-5 of .5 may move


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
