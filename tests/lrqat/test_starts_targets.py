"""Targets: stages in the model's order, sums over two models, and the least-squares weight that they ask for."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lrqat.assign import Assignment
from lrqat.block_ap import relative_error
from lrqat.data import blocks
from lrqat.errors import LrqatError
from lrqat.grid import Grid
from lrqat.plan import plan
from lrqat.ptq import rtn
from lrqat.sites import LINEAR
from lrqat.starts.codes import rounded
from lrqat.starts.gptq import gptq_layer
from lrqat.starts.stages import Half, Stage, halves, holding, residual_streams, see
from lrqat.starts.targets import RIDGE, Sums, gather, regression
from lrqat.starts.walk import Walk

# Sums of some hundred float32 products, in another order; relative to the largest.
FLOAT32_SUMS = 1e-5
SIZES = {
    "vocab_size": 96, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ORDER = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


def tiny(model_type: str = "llama", dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    config = AutoConfig.for_model(model_type, **{**SIZES, **options})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
        for name, parameter in model.named_parameters():
            parameter.mul_(1 if "norm" in name else 5)
    return model


def tokens(count: int = 4) -> Tensor:
    return torch.randint(0, 96, (count, 24), generator=torch.Generator().manual_seed(0))


def linear(model: Any, number: int = 1) -> list[str]:
    """Names of a decoder layer's planned linear modules."""
    decided = plan(model, Assignment.make(Grid.parse("w4g16")))
    parameters = [decided.sites[name].origin.parameter for name in decided.grids if decided.sites[name].kind == LINEAR]
    return [name.rpartition(".")[0] for name in parameters if name.startswith(f"model.layers.{number}.")]


def staged(walk: Walk, number: int, states_NTH: Tensor, paths: list[str]) -> list[tuple[Half, Stage]]:
    """All stages, and what each is part of."""
    return [(half, stage) for half in halves(walk, number, states_NTH[:1], paths) for stage in half.stages]


def noisy(weight_OI: Tensor) -> Tensor:
    return weight_OI + 0.1 * weight_OI.std() * torch.randn(weight_OI.shape, generator=torch.Generator().manual_seed(1))


def near(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= FLOAT32_SUMS * expected.abs().max())


def test_stages_come_in_the_order_of_their_inputs_and_share_them() -> None:
    walk = Walk(tiny(), tokens())
    paths = linear(walk.model)
    found = [stage for _, stage in staged(walk, 1, walk.begin(), sorted(paths))]
    assert [sorted(path.rpartition(".")[2] for path in stage.modules) for stage in found] == [sorted(x) for x in ORDER]
    layer = walk.layers[1]
    assert [stage.stream for stage in found] == [None, layer.input_layernorm, None, layer.post_attention_layernorm]
    assert all(stage.whole for stage in found)


@pytest.mark.parametrize(
    ("model_type", "options", "adds"),
    [
        ("llama", {}, {"o_proj", "down_proj"}),
        ("llama", {"attention_bias": True, "mlp_bias": True}, {"o_proj", "down_proj"}),
        ("qwen3", {}, {"o_proj", "down_proj"}),
        ("phi3", {}, {"o_proj", "down_proj"}),
        ("granite", {"residual_multiplier": 0.5}, set()),  # h + 0.5 W x
        ("gemma2", {"query_pre_attn_scalar": 16}, set()),  # h + norm(W x)
        ("mixtral", {"num_local_experts": 4}, {"o_proj"}),
    ],
)
def test_only_what_is_just_added_to_the_residual_stream_makes_up_for_it(
    model_type: str, options: dict[str, Any], adds: set[str]
) -> None:
    walk = Walk(tiny(model_type, **options), tokens())
    found = residual_streams(walk.layers[1], see(walk, 1, walk.begin()[:1]))
    names = {module: name.rpartition(".")[2] for name, module in walk.layers[1].named_modules()}
    assert {names[writer] for writer in found} == adds


class Experts(nn.Module):
    """Three linear layers: of even tokens, of odd ones, of none."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.even, self.odd, self.idle = (nn.Linear(size, size, bias=False) for _ in range(3))

    def forward(self, x_BTH: Tensor) -> Tensor:
        """Every other token."""
        found_BTH = torch.empty_like(x_BTH)
        found_BTH[:, ::2], found_BTH[:, 1::2] = self.even(x_BTH[:, ::2]), self.odd(x_BTH[:, 1::2])
        return found_BTH


def test_experts_come_last_with_the_sums_of_their_own_tokens() -> None:
    model = tiny()
    model.model.layers[0].mlp = Experts(48).requires_grad_(False)
    walk = Walk(model, tokens())
    x_NTH = walk.begin()
    paths = [f"model.layers.0.{name}" for name in ("mlp.even", "mlp.odd", "mlp.idle", "self_attn.o_proj")]
    (_, attention), (half, experts) = staged(walk, 0, x_NTH, paths)
    assert list(attention.modules) == paths[3:] and set(experts.modules) == set(paths[:3]) and not experts.whole
    seen: list[Tensor] = []
    hook = model.model.layers[0].mlp.even.register_forward_pre_hook(lambda _, x: seen.append(x[0].flatten(0, 1)))
    half.run(x_NTH.clone())
    hook.remove()
    found = gather(half, experts, x_NTH, x_NTH, {})
    x_TI = torch.cat(seen)
    assert near(found["model.layers.0.mlp.even"].hessian_II, x_TI.T @ x_TI / len(x_TI))
    assert torch.equal(found["model.layers.0.mlp.idle"].hessian_II, torch.eye(48))
    assert [found[path].tokens for path in paths[:3]] == [len(x_TI), len(x_NTH) * 24 - len(x_TI), 0]
    weight_OI = model.model.layers[0].mlp.even.weight
    assert torch.equal(found["model.layers.0.mlp.even"].target(weight_OI), weight_OI)


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "phi3", "mixtral"])
def test_two_halves_are_the_layer(model_type: str) -> None:
    walk = Walk(tiny(model_type), tokens())
    states_NTH = walk.begin()
    expected_NTH = walk.run(1, states_NTH)
    both = halves(walk, 1, states_NTH[:1], linear(walk.model))
    attended: list[int] = []
    hook = walk.layers[1].get_submodule("self_attn.o_proj").register_forward_hook(lambda *_: attended.append(1))
    for half in both:
        half.run(states_NTH)
    hook.remove()
    assert len(both) == 2 and len(attended) == len(states_NTH)
    assert torch.equal(states_NTH, expected_NTH) and torch.equal(walk.run(1, walk.begin()), expected_NTH)


@pytest.mark.parametrize(("model_type", "options"), [("llama", {}), ("llama", {"mlp_bias": True}), ("olmo2", {})])
@pytest.mark.parametrize("place", range(4))
def test_a_stage_regresses_what_the_full_precision_model_has_on_what_is_there(
    model_type: str, options: dict[str, Any], place: int
) -> None:
    model = tiny(model_type, **options)
    walk = Walk(model, tokens())
    y_NTH = walk.begin()
    x_NTH = noisy(y_NTH)
    half, stage = staged(walk, 1, x_NTH, linear(model))[place]
    before = half.stages[: half.stages.index(stage)]
    quantized = {module: noisy(module.weight) for each in before for module in each.modules.values()}
    own = [module.weight.clone() for module in quantized]
    sums = gather(half, stage, x_NTH, y_NTH, quantized)
    assert all(torch.equal(module.weight, own_OI) for module, own_OI in zip(quantized, own, strict=True))
    one = next(iter(sums.values()))
    assert sums.keys() == stage.modules.keys() and all(each is one for each in sums.values())

    def seen(states_NTH: Tensor) -> tuple[Tensor, Tensor]:
        """The stage's input, and what leaves the half."""
        inputs: list[Tensor] = []
        hook = next(iter(stage.modules.values())).register_forward_pre_hook(lambda _, x: inputs.append(x[0]))
        left_NTH = half.call(states_NTH)
        hook.remove()
        return inputs[0].flatten(0, 1), left_NTH.flatten(0, 1)

    full_TI, full_TO = seen(y_NTH)
    with holding(quantized):
        own_TI, own_TO = seen(x_NTH)
    count, inputs = own_TI.shape
    assert near(one.hessian_II, own_TI.T @ own_TI / count)
    assert (one.change_OI is not None) == (stage.stream is not None) == (model_type == "llama" and place in (1, 3))
    missed = full_TI - own_TI if one.change_OI is None else full_TO - own_TO
    found = one.factor_II if one.change_OI is None else one.change_OI
    assert found is not None
    ridge = RIDGE * inputs / count * one.hessian_II.diagonal().mean().double()
    exact_II = one.hessian_II.double() + ridge * torch.eye(inputs)
    assert near(found, (torch.linalg.solve(exact_II, own_TI.T.double() @ missed.double() / count).T).float())


@pytest.mark.parametrize("model_type", ["llama", "olmo2"])  # whose first stage reads the states themselves
@pytest.mark.parametrize("place", range(4))
def test_states_that_leave_on_the_way_change_no_sum(model_type: str, place: int) -> None:
    model = tiny(model_type)
    walk = Walk(model, tokens())
    y_NTH = walk.begin()
    x_NTH = noisy(y_NTH)
    half, stage = staged(walk, 1, x_NTH, linear(model))[place]
    on_NTH, expected_NTH = y_NTH.clone(), y_NTH.clone()
    half.run(expected_NTH)
    ended = gather(half, stage, x_NTH, y_NTH, {})
    on = gather(half, stage, x_NTH, on_NTH, {}, last=True)
    assert torch.equal(on_NTH, expected_NTH)
    for path, sums in ended.items():
        weight_OI = stage.modules[path].weight
        assert torch.equal(sums.hessian_II, on[path].hessian_II)
        assert torch.equal(sums.target(weight_OI), on[path].target(weight_OI))


@pytest.mark.parametrize("stream", [False, True])
def test_the_target_is_the_ridge_regressions_weight(stream: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight_OI, full_TI = torch.randn(8, 24, generator=generator), torch.randn(200, 24, generator=generator)
    own_TI = full_TI + 0.3 * torch.randn(200, 24, generator=generator)
    off_TO = torch.randn(200, 8, generator=generator) if stream else torch.zeros(200, 8)
    hessian_II = own_TI.T @ own_TI / 200
    missed_TO = (full_TI - own_TI) @ weight_OI.T + off_TO
    missed_KI = missed_TO.T @ own_TI / 200 if stream else (full_TI - own_TI).T @ own_TI / 200
    change_KI = regression(hessian_II, missed_KI, 0.3, "layer")
    sums = Sums(hessian_II, 200, None, change_KI) if stream else Sums(hessian_II, 200, change_KI)
    # min |X V^T - Y|^2 + T lambda |V - W|^2, as a least-squares problem of T + I rows
    root = (200 * 0.3 * hessian_II.diagonal().mean()).sqrt().double()
    rows = torch.cat((own_TI.double(), root * torch.eye(24)))
    wanted = torch.cat(((full_TI @ weight_OI.T + off_TO).double(), root * weight_OI.T.double()))
    expected_OI = torch.linalg.lstsq(rows, wanted).solution.T
    assert torch.allclose(sums.target(weight_OI).double(), expected_OI, rtol=1e-4, atol=1e-5)


def test_where_nothing_is_missed_the_target_is_the_weight() -> None:
    model = tiny()
    walk = Walk(model, tokens())
    x_NTH = walk.begin()
    for half, stage in staged(walk, 1, x_NTH, linear(model)):
        sums = gather(half, stage, x_NTH, x_NTH, {})
        for path, module in stage.modules.items():
            assert torch.equal(sums[path].target(module.weight), module.weight)


def test_inputs_that_never_fire_leave_the_weight() -> None:
    assert regression(torch.zeros(4, 4), torch.zeros(4, 4), 1.0, "layer") is None
    assert torch.equal(Sums(torch.zeros(4, 4), 8).target(torch.ones(2, 4)), torch.ones(2, 4))


def test_states_that_are_no_numbers_are_one_line() -> None:
    model = tiny()
    walk = Walk(model, tokens())
    x_NTH = walk.begin()
    half, stage = staged(walk, 1, x_NTH, linear(model))[0]
    y_NTH = x_NTH.clone()
    y_NTH[2, 3, 4] = torch.inf
    with pytest.raises(LrqatError, match=r"^model.layers.1.self_attn.q_proj: [^\n]*not finite[^\n]*float32$"):
        gather(half, stage, x_NTH, y_NTH, {})
    assert not next(iter(stage.modules.values()))._forward_pre_hooks


class Picky(nn.Module):
    """A linear layer that sees the tokens whose first channel is positive."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size, bias=False)

    def forward(self, x_BTH: Tensor) -> Tensor:
        """Of all tokens."""
        chosen_BT = x_BTH[..., 0] > 0
        found_BTH = torch.zeros_like(x_BTH)
        found_BTH[chosen_BT] = self.linear(x_BTH[chosen_BT])
        return found_BTH


def test_what_sees_all_tokens_of_the_first_block_alone_is_one_line() -> None:
    model = tiny()
    model.model.layers[0].mlp = Picky(48).requires_grad_(False)
    model.model.layers[0].post_attention_layernorm = nn.Identity()
    walk = Walk(model, tokens())
    x_NTH = walk.begin()
    x_NTH[0, :, 0], x_NTH[1, :, 0] = 9.0, -9.0
    half, stage = staged(walk, 0, x_NTH, ["model.layers.0.mlp.linear"])[0]
    assert stage.whole
    with pytest.raises(LrqatError, match=r"^model.layers.0.mlp.linear: [^\n]*--skip$"):
        gather(half, stage, x_NTH, x_NTH, {})


@pytest.mark.parametrize("place", range(4))
def test_passes_that_end_on_the_way_leave_nothing_for_the_garbage_collector(place: int) -> None:
    model = tiny()
    walk = Walk(model, tokens())
    x_NTH = walk.begin()
    half, stage = staged(walk, 1, x_NTH, linear(model))[place]
    made: list[weakref.ref[Tensor]] = []
    walk.layers[1].input_layernorm.register_forward_hook(lambda _module, _arguments, y: made.append(weakref.ref(y)))
    gc.collect()
    gc.disable()
    try:
        gather(half, stage, x_NTH, x_NTH.clone(), {}, last=stage is half.stages[-1])
        left = [one for one in made if one() is not None]
    finally:
        gc.enable()
    assert len(made) == 2 * len(x_NTH) and not left


def test_a_layer_makes_up_for_what_the_one_before_it_lost(
    trained_model_dir: Path, prose: list[str], tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text(prose[0])
    tokenizer = AutoTokenizer.from_pretrained(trained_model_dir)
    blocks_NT = blocks([str(tmp_path / "text.txt")], tokenizer, 128, limit=64)
    model = AutoModelForCausalLM.from_pretrained(trained_model_dir).eval().requires_grad_(False)
    decided = plan(model, Assignment.make(Grid.parse("w3")))
    walk = Walk(model, blocks_NT)
    states_NTH = walk.begin()
    y_NTH = walk.run(0, states_NTH)
    expected_NTH = walk.run(1, y_NTH)
    for name, grid in decided.grids.items():
        if ".layers.0." in name:
            model.get_parameter(name).data.copy_(rtn(model.get_parameter(name), grid, 2.0).dequantize())
    x_NTH = walk.run(0, states_NTH)
    weights = {name: model.get_parameter(name).data.clone() for name in decided.grids}
    errors = []
    for wanted_NTH in (x_NTH, y_NTH):  # its own inputs' outputs, as GPTQ has it, or the full-precision model's
        begun = gptq_layer(model, decided, walk, 1, x_NTH.clone(), wanted_NTH.clone(), 2.0)
        assert all(torch.equal(model.get_parameter(name), own_OI) for name, own_OI in weights.items())
        for name, (adjusted_OI, parts) in begun.items():
            model.get_parameter(name).data.copy_(rounded(adjusted_OI, parts, decided.grids[name]).dequantize())
        errors.append(relative_error(walk.run(1, x_NTH), expected_NTH))
        for name, own_OI in weights.items():
            model.get_parameter(name).data.copy_(own_OI)
    assert errors[1] < 0.25 * errors[0]  # measured: .0037 of .0294
