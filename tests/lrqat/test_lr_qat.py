"""LR-QAT: starts at RTN's codes, has the straight-through gradient, keeps nothing of the weight's size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lrqat.errors import LrqatError
from lrqat.grid import INSIDE, Affine, Grid, dequantize
from lrqat.layers import QuantLinear
from lrqat.methods.lr_qat import DOWNCASTS, LRQAT
from lrqat.ptq import rtn
from lrqat.ranges import start

# Gradients are three float32 sums in a row, of at most 96 terms each: 3 * 96 * 2^-25 = 8.6e-6 from the exact ones.
FLOAT32_SUMS = 1e-5
ROWS, COLUMNS = 48, 256
EXACT = sorted({*DOWNCASTS} - {"eq7"})  # those that begin at the very codes of the start
GRIDS = ["w4g32", "w3", "w2g16", "w8", "w5g64", "w4g8-fp16", "w4g32-asym", "w3-asym", "w4g32-min"]
GRIDS += ["iq4_nl", "mxfp4", "tq2_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k"]


def random_weight(generator: torch.Generator) -> Tensor:
    """Float32 [ROWS, COLUMNS]."""
    return torch.randn(ROWS, COLUMNS, generator=generator) * 0.05


def make(
    spelling: str = "w4g32", downcast: str = "fixed", *, p: float | None = 3.5, seed: int = 0, **options: Any
) -> LRQAT:
    """A quantizer of a random weight."""
    grid = Grid.parse(spelling)
    generator = torch.Generator().manual_seed(seed)
    weight_OI = random_weight(generator)
    settings = {"rank": 8, "alpha": 8.0, "learn_scales": True, **options}
    return LRQAT(weight_OI, start(weight_OI, grid, p), grid, downcast=downcast, generator=generator, **settings)


def perturb(quantizer: LRQAT, seed: int = 1, size: float = 0.3) -> None:
    """Move it as training would: adapters away from zero (by steps of the grid), scales away from their start."""
    generator = torch.Generator().manual_seed(seed)
    low, high = quantizer.grid.bounds
    quantizer.b_RI.data.normal_(0, size * (high - low) / quantizer.grid.step / 4, generator=generator)
    for gain in quantizer.gains.values():
        gain.data += 0.1 * torch.rand(gain.shape, generator=generator)


def straight_through(quantizer: LRQAT, a_OR: Tensor, b_RI: Tensor, gains: dict[str, Tensor]) -> Tensor:
    """The weight of eq. 8 with the straight-through estimator, in plain autograd, float64."""
    grid = quantizer.grid
    u_OI = quantizer.frozen(slice(None)).double() + quantizer.multiplier * a_OR @ b_RI
    at_OI = quantizer.frozen(slice(None)) + quantizer.multiplier * a_OR.detach().float() @ b_RI.detach().float()
    low, high = grid.bounds  # which float32 decides
    l_OI = grid.nearest(at_OI.clone()) + (u_OI - u_OI.detach()) * ((at_OI >= low) & (at_OI <= high))
    learned = {name: gain.float() for name, gain in gains.items()}  # which rounds to what the wire stores
    affine = grid.affine(grid.learn(dict(quantizer.start.named_buffers()), learned))
    return dequantize(l_OI, Affine(*(None if part is None else part.double() for part in affine)))


def parameters_of(quantizer: LRQAT) -> dict[str, Tensor]:
    """All that is trained, by a short name."""
    return {"a_OR": quantizer.a_OR, "b_RI": quantizer.b_RI, **quantizer.gains}


@pytest.mark.parametrize("p", [None, 2.0, 3.5])
@pytest.mark.parametrize("downcast", EXACT)
@pytest.mark.parametrize("group", ["", "g16", "g32", "g64"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_training_starts_at_the_codes_of_rtn(bits: int, group: str, downcast: str, p: float | None) -> None:
    starts_at_rtn(Grid.parse(f"w{bits}{group}"), downcast, p)


@pytest.mark.parametrize("p", [None, 3.5])
@pytest.mark.parametrize("downcast", EXACT)
@pytest.mark.parametrize("spelling", GRIDS)
def test_training_starts_at_the_codes_of_rtn_on_every_grid(spelling: str, downcast: str, p: float | None) -> None:
    starts_at_rtn(Grid.parse(spelling), downcast, p)


def starts_at_rtn(grid: Grid, downcast: str, p: float | None) -> None:
    """The quantizer's codes and parts before any step are those of round-to-nearest."""
    weight_OI = random_weight(torch.Generator().manual_seed(grid.bits))
    quantizer = LRQAT(
        weight_OI,
        start(weight_OI, grid, p),
        grid,
        rank=4,
        alpha=4.0,
        downcast=downcast,
        learn_scales=True,
        generator=torch.Generator(),
    )
    first, baseline = quantizer.fuse(), rtn(weight_OI, grid, p)
    assert torch.equal(first.codes_OI, baseline.codes_OI)
    assert first.parts.keys() == baseline.parts.keys()
    assert all(torch.equal(first.parts[name], baseline.parts[name]) for name in first.parts)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_eq7_is_the_papers_fixed_point(bits: int) -> None:
    """int8(round(2^(8-b) clip(W0 / s0))) / 2^(8-b): begins at codes of round-to-nearest but for weights at an edge."""
    quantizer, least, one = make(f"w{bits}", "eq7"), -(2 ** (bits - 1)), 2 ** (8 - bits)
    weight_OI = random_weight(torch.Generator().manual_seed(0))
    latent_OI = (weight_OI / quantizer.affine().scale_OG).clamp(least, -least - 1)
    assert quantizer.phi.dtype == torch.int8
    assert torch.equal(quantizer.phi, (one * latent_OI).round().to(torch.int8))
    assert torch.equal(quantizer.frozen(slice(None)), quantizer.phi.float() / one)
    moved_OI = quantizer.started(slice(None)) != latent_OI.round()
    edge_OI = quantizer.phi.abs() % one == one // 2
    assert moved_OI.any() and not moved_OI[~edge_OI].any()


@pytest.mark.parametrize("downcast", DOWNCASTS)
@pytest.mark.parametrize("spelling", GRIDS)
def test_gradients_are_those_of_the_straight_through_estimator(spelling: str, downcast: str) -> None:
    quantizer = make(spelling, downcast)
    perturb(quantizer)
    x = torch.randn(5, 7, COLUMNS, generator=torch.Generator().manual_seed(2), requires_grad=True)
    bias = torch.randn(ROWS, generator=torch.Generator().manual_seed(3), requires_grad=True)
    parameters = parameters_of(quantizer)
    ours = quantizer(x, bias)
    ours.square().sum().backward()

    copies = {name: p.detach().double().requires_grad_() for name, p in parameters.items()}
    x_copy, bias_copy = x.detach().double().requires_grad_(), bias.detach().double().requires_grad_()
    gains = {name: copies[name] for name in quantizer.gains}
    theirs = F.linear(x_copy, straight_through(quantizer, copies["a_OR"], copies["b_RI"], gains), bias_copy)
    theirs.square().sum().backward()

    low, high = quantizer.grid.bounds
    latent_OI = quantizer.latent(slice(None), quantizer.affine())
    assert ((latent_OI < low) | (latent_OI > high)).any(), "the test wants clipped weights"
    assert torch.allclose(ours.double(), theirs, rtol=FLOAT32_SUMS, atol=FLOAT32_SUMS * theirs.abs().max().item())
    pairs = [(parameters[name], copies[name]) for name in parameters] + [(x, x_copy), (bias, bias_copy)]
    for found, expected in pairs:
        assert found.grad is not None and expected.grad is not None and expected.grad.abs().max() > 0
        assert (found.grad - expected.grad).abs().max() <= FLOAT32_SUMS * expected.grad.abs().max()


def test_tiles_do_not_change_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for size in (1 << 18, 5 * COLUMNS):
        monkeypatch.setattr("lrqat.ranges.TILE_WEIGHTS", size)
        quantizer = make("w3g16")
        perturb(quantizer)
        x = torch.randn(9, COLUMNS, generator=torch.Generator().manual_seed(2), requires_grad=True)
        quantizer(x, None).square().sum().backward()
        assert len(quantizer.tiles(quantizer.affine())) == (1 if size > ROWS * COLUMNS else -(-ROWS // 5))
        found.append([*(p.grad for p in parameters_of(quantizer).values()), x.grad])
    for whole, tiled in zip(*found, strict=True):
        assert (whole - tiled).abs().max() <= FLOAT32_SUMS * whole.abs().max()


def test_a_clipped_weight_gets_no_gradient_through_its_adapters() -> None:
    quantizer = make("w2", rank=1, alpha=1.0)
    quantizer.a_OR.data.fill_(1.0)
    quantizer.b_RI.data.fill_(100.0)  # far above every code
    quantizer(torch.ones(3, COLUMNS), None).sum().backward()
    assert quantizer.a_OR.grad is not None and quantizer.b_RI.grad is not None
    assert not quantizer.a_OR.grad.any() and not quantizer.b_RI.grad.any()
    gain_OG = quantizer.gains["scales"]
    assert gain_OG.grad is not None and gain_OG.grad.abs().min() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("downcast", DOWNCASTS)
def test_only_the_input_and_scales_are_kept_for_backward(dtype: torch.dtype, downcast: str) -> None:
    layer = QuantLinear(make(downcast=downcast), torch.nn.Parameter(torch.zeros(ROWS, dtype=dtype)))
    perturb(layer.quantizer)  # type: ignore[arg-type]
    x = torch.randn(5, 7, COLUMNS, dtype=dtype, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = layer(x)
    assert x.data_ptr() in [t.data_ptr() for t in saved]
    per_group = ROWS * COLUMNS // 32  # s, and what its gain is multiplied with
    assert all(t.numel() <= per_group for t in saved if t.data_ptr() != x.data_ptr())
    assert not [v for v in vars(y.grad_fn).values() if isinstance(v, Tensor)]


@pytest.mark.parametrize(("downcast", "nbytes"), [("fixed", ROWS * COLUMNS), ("int", ROWS * COLUMNS // 2)])
def test_a_layer_holds_one_small_tensor_of_the_weights_size(downcast: str, nbytes: int) -> None:
    quantizer = make("w4g32", downcast)
    assert quantizer.phi.nbytes == nbytes
    held = [*quantizer.parameters(), *quantizer.buffers()]
    assert [t is quantizer.phi for t in held if t.numel() >= ROWS * COLUMNS // 2] == [True]


@pytest.mark.parametrize("bits", [2, 3, 4])
@given(seed=st.integers(0, 2**32))
@settings(max_examples=20)
def test_two_codes_a_byte_are_unpacked_as_they_were_packed(bits: int, seed: int) -> None:
    quantizer = make(f"w{bits}", "int")
    codes = torch.randint(0, 1 << bits, (5, COLUMNS), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    packed = quantizer._pack(codes)
    assert packed.shape == (5, COLUMNS // 2) and torch.equal(quantizer._unpack(packed), codes)


def test_packing_on_paper() -> None:
    assert make(downcast="int")._pack(torch.tensor([[3, 10]], dtype=torch.uint8)).tolist() == [[0xA3]]


def test_an_odd_number_of_columns_trains_too() -> None:
    weight_OI = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    grid = Grid.parse("w4")
    quantizer = LRQAT(
        weight_OI,
        start(weight_OI, grid, None),
        grid,
        rank=2,
        alpha=2.0,
        downcast="int",
        learn_scales=False,
        generator=torch.Generator(),
    )
    assert torch.equal(quantizer.fuse().codes_OI, rtn(weight_OI, grid, None).codes_OI)


@pytest.mark.parametrize("downcast", DOWNCASTS)
@pytest.mark.parametrize("spelling", GRIDS)
def test_the_fused_weight_is_the_weight_of_the_forward_pass_bit_for_bit(spelling: str, downcast: str) -> None:
    quantizer = make(spelling, downcast)
    for size in (0.0, 0.3, 3.0):
        perturb(quantizer, size=size)
        fused = quantizer.fuse()
        fused.check("weight")
        assert torch.equal(fused.dequantize(), quantizer.weight())
        assert torch.equal(quantizer.grid.encode(quantizer.grid.decode(fused.codes_OI)), fused.codes_OI)
        identity = torch.eye(COLUMNS)
        assert torch.equal(quantizer(identity, None).detach().T, fused.dequantize())


def test_served_scales_are_exact_in_fp16_and_bf16_whatever_training_does() -> None:
    quantizer = make()
    quantizer.gains["scales"].data.uniform_(-2, 2, generator=torch.Generator().manual_seed(0))
    scales_OG = quantizer.fuse().parts["scales"]
    assert torch.equal(scales_OG.float(), quantizer.affine().scale_OG)
    assert torch.equal(scales_OG.bfloat16().float(), scales_OG.float())


def test_frozen_scales_get_no_gradient_and_stay() -> None:
    quantizer = make(learn_scales=False)
    before_OG = quantizer.affine().scale_OG
    assert set(dict(quantizer.named_parameters())) == {"a_OR", "b_RI"}
    quantizer(torch.ones(3, COLUMNS), None).sum().backward()
    assert quantizer.b_RI.grad is not None
    assert torch.equal(quantizer.affine().scale_OG, before_OG)


def test_an_input_without_gradient_still_trains_the_layer() -> None:
    quantizer = make()
    quantizer(torch.ones(3, COLUMNS), None).sum().backward()
    assert quantizer.b_RI.grad is not None and quantizer.b_RI.grad.any()


@pytest.mark.parametrize(("rank", "alpha"), [(8, 8.0), (8, 1.0), (32, 1.0), (1, 3.0)])
@pytest.mark.parametrize(("spelling", "step"), [("w4g32", 1), ("q4_k", 1), ("iq4_nl", 16), ("mxfp4", 12 / 14)])
def test_adapters_are_multiplied_by_alpha_over_rank_in_steps_of_the_grid(
    rank: int, alpha: float, spelling: str, step: float
) -> None:
    quantizer = make(spelling, rank=rank, alpha=alpha)
    perturb(quantizer)
    added_OI = quantizer.latent(slice(None), quantizer.affine()) - quantizer.frozen(slice(None))
    expected_OI = alpha / rank * step * (quantizer.a_OR @ quantizer.b_RI).detach()
    assert torch.allclose(added_OI, expected_OI, atol=2.0**-20 * step)  # latents below 8 steps carry 2^-21 of rounding


def test_adapters_start_with_a_kaiming_and_b_zero() -> None:
    quantizer = make(rank=16)
    assert not quantizer.b_RI.any()
    bound = 16**-0.5  # Kaiming uniform with a = sqrt(5): 1 / sqrt(fan-in)
    assert 0.9 * bound < quantizer.a_OR.abs().max() <= bound


def test_the_same_generator_gives_the_same_adapters() -> None:
    assert torch.equal(make(seed=3).a_OR, make(seed=3).a_OR)
    assert not torch.equal(make(seed=3).a_OR, make(seed=4).a_OR)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"rank": 0}, "rank"), ({"rank": 49}, "rank: expected 1 to 48"), ({"downcast": "fp8"}, "downcast.*fp8")],
)
def test_impossible_settings_are_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(LrqatError, match=rf"^[^\n]*{message}[^\n]*$"):
        make(**options)


@pytest.mark.parametrize("bits", range(2, 9))
def test_fixed_point_has_eight_bits_and_stays_at_its_code(bits: int) -> None:
    quantizer = make(f"w{bits}", p=None)
    frozen_OI = quantizer.frozen(slice(None))
    assert quantizer.phi.dtype == torch.int8
    assert len(frozen_OI.unique()) <= 256
    begin, one = quantizer.grid.fixed_point
    off_OI = (frozen_OI - begin) * one
    if bits < 6:  # just inside of a piece's even end
        assert ((off_OI - 2 * (off_OI / 2).round()).abs() == INSIDE).all()
    else:
        assert torch.equal(off_OI, off_OI.floor() + 0.5)
    assert (frozen_OI - quantizer.grid.nearest(frozen_OI.clone())).abs().max() < 0.5


@pytest.mark.parametrize("spelling", [*GRIDS, "w6", "w7-asym"])
def test_the_latent_of_a_piece_lies_in_it(spelling: str) -> None:
    grid = Grid.parse(spelling)
    pieces = torch.arange(-128, 128).to(torch.int8)
    assert torch.equal(grid.to_fixed(grid.from_fixed(pieces)), pieces)


@pytest.mark.parametrize("direction", [-1, 1])
@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_the_least_push_moves_what_is_within_a_piece_of_an_edge_and_nothing_else(bits: int, direction: int) -> None:
    quantizer = make(f"w{bits}", rank=1, alpha=1.0)
    weight_OI, grid = random_weight(torch.Generator().manual_seed(0)), quantizer.grid
    quantizer.a_OR.data.fill_(1)
    latent_OI = (weight_OI / quantizer.affine().scale_OG).clamp(*grid.ends)
    begun_OI = quantizer.started(slice(None))
    edge_OI = begun_OI + direction * 0.5
    near_OI = ((latent_OI - edge_OI).abs() < 2.0 ** (bits - 8)) & (edge_OI.abs() <= abs(grid.first))
    for push in (0.01, 0.9):  # of two pieces
        quantizer.b_RI.data.fill_(direction * push * 2.0 ** (bits - 7))
        moved_OI = quantizer.levels(slice(None), quantizer.affine()) != begun_OI
        assert near_OI.any() and torch.equal(moved_OI, near_OI)
