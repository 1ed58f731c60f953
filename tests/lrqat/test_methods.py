"""LSQ, L4Q and scales alone: the straight-through gradient on every grid, nothing kept, fused as trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrqat.errors import LrqatError
from lrqat.grid import Grid, dequantize
from lrqat.layers import QuantLinear
from lrqat.methods.gains import GainQuantizer
from lrqat.methods.l4q import L4Q, l4q_start
from lrqat.methods.lsq import LSQ
from lrqat.methods.scales import Scales
from lrqat.ptq import rtn
from lrqat.ranges import start

# Two float32 sums in a row, of at most 256 terms each, against float64: typically sqrt(512) * 2^-24 = 1.3e-6.
FLOAT32_SUMS = 1e-5
ROWS, COLUMNS = 48, 256
METHODS = ["lsq", "l4q", "scales"]
GRIDS = ["w4g32", "w3", "w2g16", "w8", "w4g8-fp16", "w4g32-asym", "w3-asym", "w4g32-min", "w2g64-min"]
GRIDS += ["iq4_nl", "mxfp4", "tq2_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k"]


def weight(seed: int = 0) -> Tensor:
    """Random, with rows of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(ROWS, COLUMNS, generator=generator) * torch.linspace(0.02, 0.1, ROWS)[:, None]


def make(method: str, spelling: str = "w4g32", p: float | None = 2.0, **options: Any) -> GainQuantizer:
    """A quantizer of a random weight."""
    grid, weight_OI = Grid.parse(spelling), weight()
    parts = start(weight_OI, grid, p)
    if method == "lsq":
        return LSQ(weight_OI, parts, grid, **{"learn_scales": True, **options})
    if method == "l4q":
        return L4Q(weight_OI, parts, grid, generator=torch.Generator().manual_seed(0), **options)
    return Scales(weight_OI, parts, grid)


def perturb(quantizer: GainQuantizer, size: float = 0.05, seed: int = 1) -> None:
    """Move it as training would, far enough that weights are clipped."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in quantizer.named_parameters():
        if name.startswith("gains."):
            parameter.data += 0.1 * torch.rand(parameter.shape, generator=generator)
        else:
            parameter.data += size * torch.randn(parameter.shape, generator=generator)


def straight_through(quantizer: GainQuantizer, trained: Mapping[str, Tensor]) -> Tensor:
    """W^ in plain autograd and float64, from copies of the parameters; codes are those of the float32 latents."""
    grid = quantizer.grid
    gains = {name.removeprefix("gains."): p for name, p in trained.items() if name.startswith("gains.")}
    affine = grid.affine(grid.learn(dict(quantizer.start.named_buffers()), gains))
    spread = lambda t: t.double().repeat_interleave(COLUMNS // t.shape[1], dim=1)  # noqa: E731
    scale_OI, offset_OI = spread(affine.scale_OG), torch.zeros(())
    if affine.offset_OG is not None:
        offset_OI = spread(affine.offset_OG)
    latent_OI = quantizer.latent(slice(None), quantizer.affine()).detach()
    level_OI = grid.nearest(latent_OI.clone()).double()
    if isinstance(quantizer, Scales):
        return level_OI * scale_OI + offset_OI
    if isinstance(quantizer, L4Q):
        b_OR, a_RI = trained["b_OR"].double(), trained["a_RI"].double()
        real_OI = quantizer.frozen_OI.double() + quantizer.multiplier * b_OR @ a_RI
    else:
        real_OI = trained["weight_OI"].double()
    x_OI = (real_OI - offset_OI) / scale_OI
    if isinstance(quantizer, L4Q):  # eq. 7 as it is written: autograd through round(clip(x))
        clipped_OI = x_OI.clamp(*grid.ends)
        return (clipped_OI + (level_OI - clipped_OI).detach()) * scale_OI + offset_OI
    low, high = grid.bounds
    return (level_OI + (x_OI - x_OI.detach()) * ((latent_OI > low) & (latent_OI < high))) * scale_OI + offset_OI


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("spelling", GRIDS)
def test_gradients_are_those_of_the_straight_through_estimator(spelling: str, method: str) -> None:
    quantizer = make(method, spelling)
    perturb(quantizer)
    x = torch.randn(3, 5, COLUMNS, generator=torch.Generator().manual_seed(2), requires_grad=True)
    bias = torch.randn(ROWS, generator=torch.Generator().manual_seed(3), requires_grad=True)
    trained = dict(quantizer.named_parameters())
    ours = quantizer(x, bias)
    ours.square().sum().backward()

    copies = {name: p.detach().clone().requires_grad_() for name, p in trained.items()}
    x_copy, bias_copy = x.detach().clone().requires_grad_(), bias.detach().clone().requires_grad_()
    theirs = F.linear(x_copy.double(), straight_through(quantizer, copies), bias_copy.double())
    theirs.square().sum().backward()

    if method != "scales":
        low, high = quantizer.grid.bounds
        latent_OI = quantizer.latent(slice(None), quantizer.affine())
        assert ((latent_OI < low) | (latent_OI > high)).any(), "the test wants clipped weights"
    assert (ours - theirs).abs().max() <= FLOAT32_SUMS * theirs.abs().max()
    for found, expected in [*((trained[n], copies[n]) for n in trained), (x, x_copy), (bias, bias_copy)]:
        assert found.grad is not None and expected.grad is not None and expected.grad.abs().max() > 0
        assert (found.grad - expected.grad).abs().max() <= FLOAT32_SUMS * expected.grad.abs().max()


@pytest.mark.parametrize("method", METHODS)
def test_tiles_do_not_change_a_gradient(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for size in (1 << 18, 5 * COLUMNS):
        monkeypatch.setattr("lrqat.ranges.TILE_WEIGHTS", size)
        quantizer = make(method, "w3g16")
        perturb(quantizer)
        x = torch.randn(9, COLUMNS, generator=torch.Generator().manual_seed(2), requires_grad=True)
        quantizer(x, None).square().sum().backward()
        found.append([*(p.grad for p in quantizer.parameters()), x.grad])
    for whole, tiled in zip(*found, strict=True):
        assert (whole - tiled).abs().max() <= FLOAT32_SUMS * whole.abs().max()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("spelling", GRIDS)
def test_training_starts_at_the_codes_of_rtn(spelling: str, method: str) -> None:
    quantizer, baseline = make(method, spelling), rtn(weight(), Grid.parse(spelling), 2.0)
    first = quantizer.fuse()
    assert torch.equal(first.codes_OI, baseline.codes_OI)
    assert all(torch.equal(first.parts[name], baseline.parts[name]) for name in baseline.parts)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("spelling", GRIDS)
def test_the_fused_weight_is_the_weight_of_the_forward_pass_bit_for_bit(spelling: str, method: str) -> None:
    quantizer = make(method, spelling)
    for size in (0.0, 0.05, 0.5):
        perturb(quantizer, size)
        fused = quantizer.fuse()
        fused.check("weight")
        assert torch.equal(fused.dequantize(), quantizer.weight())
        assert torch.equal(quantizer(torch.eye(COLUMNS), None).detach().T, fused.dequantize())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_only_the_input_and_parts_are_kept_for_backward(method: str, dtype: torch.dtype) -> None:
    layer = QuantLinear(make(method), nn.Parameter(torch.zeros(ROWS, dtype=dtype)))
    x = torch.randn(5, 7, COLUMNS, dtype=dtype, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        y = layer(x)
    assert all(t.numel() <= ROWS * COLUMNS // 32 for t in saved if t.data_ptr() != x.data_ptr())
    assert not [v for v in vars(y.grad_fn).values() if isinstance(v, Tensor)]


@pytest.mark.parametrize(("method", "nbytes"), [("lsq", [4, 0.5]), ("l4q", [4]), ("scales", [0.5])])
def test_one_tensor_of_the_weights_size_is_held_and_by_lsq_the_codes_it_began_with(
    method: str, nbytes: list[float]
) -> None:
    quantizer = make(method)
    held = [t for t in (*quantizer.parameters(), *quantizer.buffers()) if t.numel() >= ROWS * COLUMNS // 2]
    assert [t.nbytes for t in held] == [each * ROWS * COLUMNS for each in nbytes]


def test_integer_zeros_move_beneath_weights_and_not_beneath_codes() -> None:
    assert "zeros" not in make("scales", "w2g64-asym").gains
    for method in ("lsq", "l4q"):
        quantizer = make(method, "w2g64-asym")
        before = quantizer.parts()["zeros"].clone()
        quantizer.gains["zeros"].data += 0.4  # of the two levels below the middle: .8 of a step
        after = quantizer.parts()["zeros"]
        assert torch.equal(after, (before + 1).clamp(max=3)) and not torch.equal(after, before)
        fused = quantizer.fuse()
        assert torch.equal(fused.parts["zeros"].float(), after)
        assert torch.equal(fused.codes_OI, quantizer.fuse().codes_OI)


def test_l4q_keeps_the_pretrained_weight_itself() -> None:
    weight_OI = weight().bfloat16()
    parts = start(weight_OI, Grid.parse("w4g32"), None)
    quantizer = L4Q(weight_OI, parts, Grid.parse("w4g32"), generator=torch.Generator())
    assert quantizer.frozen_OI.data_ptr() == weight_OI.data_ptr() and quantizer.a_RI.shape == (4, COLUMNS)
    assert "frozen_OI" not in quantizer.state_dict()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lsq_trains_a_float32_copy(dtype: torch.dtype) -> None:
    weight_OI = weight().to(dtype)
    quantizer = LSQ(weight_OI, start(weight_OI, Grid.parse("w4"), None), Grid.parse("w4"), learn_scales=False)
    quantizer(torch.ones(2, COLUMNS, dtype=dtype), None).sum().backward()
    assert quantizer.weight_OI.grad is not None and quantizer.weight_OI.grad.dtype == torch.float32
    assert quantizer.weight_OI.data_ptr() != weight_OI.data_ptr()


@pytest.mark.parametrize(("method", "rate"), [("lsq", 5e-4), ("l4q", 2e-4), ("scales", 2e-3)])
def test_steps_lower_the_loss(method: str, rate: float) -> None:
    quantizer = make(method, "w3g32-min" if method == "l4q" else "w3g32")
    x = torch.randn(64, COLUMNS, generator=torch.Generator().manual_seed(0))
    target = x @ weight().T
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=rate)
    losses = []
    for _ in range(30):
        loss = F.mse_loss(quantizer(x, None), target)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert min(losses[-5:]) < 0.985 * losses[0]


@pytest.mark.parametrize("spelling", ["w4g32", "w3-asym", "w4g32-min"])
def test_the_start_of_l4q_clips_nothing_and_has_zero_on_the_grid(spelling: str) -> None:
    grid, weight_OI = Grid.parse(spelling), weight()
    affine = grid.affine(l4q_start(weight_OI, grid))
    levels_OI = torch.full((ROWS, COLUMNS), (sum(grid.ends) + 1) / 2)
    assert not dequantize(levels_OI, affine).any()
    groups_OGK = weight_OI.view(ROWS, affine.scale_OG.shape[1], -1)
    top, bottom = grid.ends[1] - levels_OI[0, 0], levels_OI[0, 0] - grid.ends[0]
    slack = 1 + 2.0**-7  # scales are rounded to 8 significant bits
    assert (groups_OGK.amax(2) <= top * affine.scale_OG * slack).all()
    assert (-groups_OGK.amin(2) <= bottom * affine.scale_OG * slack).all()


def test_the_start_of_l4q_is_for_affine_grids() -> None:
    with pytest.raises(LrqatError, match=r"^weight: [^\n]*affine[^\n]*q4_k[^\n]*$"):
        l4q_start(weight(), Grid.parse("q4_k"))


@pytest.mark.parametrize("spelling", GRIDS)
def test_scales_begin_with_any_fused_weight(spelling: str) -> None:
    fused = rtn(weight(), Grid.parse(spelling), None)
    quantizer = Scales.from_fused(fused)
    assert quantizer.fuse().sha256() == fused.sha256()
    assert {name for name, _ in quantizer.named_parameters()} == {f"gains.{part}" for part in fused.grid.learned}


@pytest.mark.parametrize("rank", [0, ROWS + 1])
def test_an_impossible_rank_is_one_line(rank: int) -> None:
    with pytest.raises(LrqatError, match=r"^rank: expected 1 to 48[^\n]*$"):
        make("l4q", rank=rank)
