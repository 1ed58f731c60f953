"""GPTQ of experts in 3-D parameters, on a mixture that computes what the small trained model does.

Every expert is that model's MLP (sparse upcycling, arXiv 2212.05055), so whatever the router chooses the outputs are
its own; two of four experts see each token.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lrqat.assign import Assignment
from lrqat.experts import QuantExperts, experts_apart
from lrqat.grid import Grid
from lrqat.layers import quantizers
from lrqat.plan import Plan, plan
from lrqat.ranges import start
from lrqat.settings import TrainSettings
from lrqat.sites import EXPERT, checkpoint_tensors
from lrqat.starts.codes import rounded
from lrqat.starts.gptq import apart, gptq_model
from lrqat.starts.walk import Walk
from tests.lrqat.small import cut, load, scored

EXPERTS = 4


@pytest.fixture
def mixture(trained_model_dir: Path) -> Any:
    """The small model as a Mixtral."""
    from transformers import MixtralConfig, MixtralForCausalLM

    dense = load(trained_model_dir)
    own = {key: value for key, value in dense.config.to_dict().items() if key not in ("model_type", "architectures")}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MixtralForCausalLM(MixtralConfig(**own, num_local_experts=EXPERTS, num_experts_per_tok=2))
    model.load_state_dict(dense.state_dict(), strict=False)
    for layer, its_like in zip(model.model.layers, dense.model.layers, strict=True):
        mlp = its_like.mlp
        layer.mlp.experts.gate_up_proj.data[:] = torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight))
        layer.mlp.experts.down_proj.data[:] = mlp.down_proj.weight
    model = model.eval().requires_grad_(False)
    ids = torch.arange(5, 69)[None]
    assert torch.allclose(model(ids).logits, dense(ids).logits, atol=1e-3)
    return model


@pytest.fixture
def texts(trained_model_dir: Path, prose: list[str], tmp_path: Path) -> list[Tensor]:
    """Calibration and held-out tokens."""
    return cut(trained_model_dir, prose, tmp_path, 128, 32)


def experts_planned(model: Any, spelling: str) -> Plan:
    """Experts alone."""
    decided = plan(model, Assignment.make(Grid.parse(spelling), skip=("self_attn",)))
    assert {decided.sites[name].kind for name in decided.grids} == {EXPERT} and len(decided.grids) == 2 * 3 * EXPERTS
    return decided


def test_gptq_of_experts_beats_round_to_nearest(mixture: Any, texts: list[Tensor], trained_model_dir: Path) -> None:
    full, decided = load(trained_model_dir), experts_planned(mixture, "w3g32")
    own = {name: tensor.clone() for name, tensor in checkpoint_tensors(mixture).items()}
    modules = [type(module) for module in mixture.modules()]
    nearest = {name: start(own[name], grid, 2.0, name) for name, grid in decided.grids.items()}
    kl = scored(mixture, decided, nearest, texts[1], full).kl
    for name, tensor in checkpoint_tensors(mixture).items():
        tensor.copy_(own[name])
    found = gptq_model(mixture, decided, texts[0], 2.0)
    assert found.keys() == decided.grids.keys()
    assert [type(module) for module in mixture.modules()] == modules
    ours = scored(mixture, decided, found, texts[1], full).kl
    assert ours is not None and kl is not None and ours < 0.2 * kl  # measured: 2.9e-5 of 1.0e-3


def test_experts_apart_are_views_and_come_together_again(mixture: Any) -> None:
    decided = experts_planned(mixture, "w4g32")
    own, ids = mixture.model.layers[0].mlp.experts, torch.arange(5, 69)[None]
    expected = mixture(ids).logits
    with experts_apart(mixture, [decided.sites[name] for name in decided.grids]) as found:
        assert isinstance(mixture.model.layers[0].mlp.experts, QuantExperts) and set(found.values()) == {
            decided.sites[name] for name in decided.grids
        }
        assert torch.allclose(mixture(ids).logits, expected, atol=1e-4)
        mixture.get_submodule("model.layers.0.mlp.experts.3.w1").weight.data[7] = 5.0
    assert mixture.model.layers[0].mlp.experts is own and (own.gate_up_proj[3, 7] == 5.0).all()


def test_gptq_of_experts_goes_on_behind_its_last_layer(
    mixture: Any, texts: list[Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decided = plan(mixture, Assignment.make(Grid.parse("w4g32")))
    own = {name: tensor.clone() for name, tensor in checkpoint_tensors(mixture).items()}
    expected = gptq_model(mixture, decided, texts[0][:4], 2.0, folder=tmp_path, key="key")
    weights = {name: tensor.clone() for name, tensor in checkpoint_tensors(mixture).items()}
    (tmp_path / "layer_0001.safetensors").unlink()
    for name, tensor in checkpoint_tensors(mixture).items():
        tensor.copy_(own[name])
    found = gptq_model(mixture, decided, texts[0][:4], 2.0, folder=tmp_path, key="key")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name][part], values) for name in found for part, values in expected[name].items())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in checkpoint_tensors(mixture).items())


def test_block_ap_begins_with_the_codes_of_gptq_for_experts(mixture: Any, texts: list[Tensor], tmp_path: Path) -> None:
    from lrqat.begin import train_blocks

    decided = experts_planned(mixture, "w3g32")
    settings = TrainSettings(
        model="m", out="o", grid="w3g32", rank=4, start="gptq", calibration_blocks=8, block_epochs=1, batch_size=4,
        block_lr=1e-9, block_lr_scales=1e-9, seq_len=128,
    )  # fmt: skip
    own = {name: tensor.clone() for name, tensor in checkpoint_tensors(mixture).items()}
    train_blocks(mixture, decided, settings, texts[0][:8], tmp_path, "key")
    begun = {name: quantizer.fuse() for name, quantizer in quantizers(mixture).items()}
    name = "model.layers.0.block_sparse_moe.experts.1.w2.weight"
    assert begun.keys() == decided.grids.keys() and name in begun
    nearest = rounded(own[name], start(own[name], decided.grids[name], settings.range_p, name), decided.grids[name])
    assert (begun[name].codes_OI != nearest.codes_OI).float().mean() > 0.02


def test_gate_and_up_of_an_expert_share_the_sums_of_their_inputs(mixture: Any, texts: list[Tensor]) -> None:
    from lrqat.starts.stages import halves
    from lrqat.starts.targets import gather

    decided, walk = experts_planned(mixture, "w4g32"), Walk(mixture, texts[0][:2])
    x_NTH = walk.begin()
    with apart(mixture, decided, walk, 0) as sites:
        last = halves(walk, 0, x_NTH[:1], list(sites))[-1]
        (stage,) = last.stages
        sums = gather(last, stage, x_NTH, x_NTH, {})
        assert set(sums) == set(sites) and not stage.whole
        hessians = {path: found.hessian_II for path, found in sums.items()}
    prefix = "model.layers.0.mlp.experts"
    assert hessians[f"{prefix}.0.w1"] is hessians[f"{prefix}.0.w3"]
    assert len({id(hessian_II) for hessian_II in hessians.values()}) == 2 * EXPERTS
    assert sum(hessians[f"{prefix}.{n}.w1"].diagonal().sum() for n in range(EXPERTS)) > 0
