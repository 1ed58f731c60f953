import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hf_cases import LAYER, checkpoint, fused, mutated, one, quantization_config, refused_or_right, same_tensors, stored
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from exporters import awq, vllm_rules
from lrqat.errors import LrqatError
from lrqat.fused import FusedTensor
from lrqat.grid import Grid


def as_vllm_reads(tensors: dict[str, Tensor]) -> Tensor:
    """W by vllm 0.32.0 auto_awq.py `_convert_awq_to_standard_format`: nibbles in order, then put where they belong."""
    reverse = [0, 4, 1, 5, 2, 6, 3, 7]

    def codes(words: Tensor) -> np.ndarray:
        nibbles = words.numpy()[:, :, None] >> np.arange(0, 32, 4) & 0xF
        return nibbles[:, :, reverse].reshape(len(words), -1)

    qweight, qzeros, scales = (tensors[f"{LAYER}.{part}"] for part in ("qweight", "qzeros", "scales"))
    group = np.arange(len(qweight)) // (len(qweight) // len(scales))
    weight_IO = scales.float().numpy()[group] * (codes(qweight) - codes(qzeros)[group]).astype(np.float32)
    return torch.from_numpy(weight_IO.T)


def test_golden_bytes_written_by_hand(tmp_path: Path) -> None:
    codes = torch.zeros(8, 16, dtype=torch.uint8)
    codes[:, 0] = torch.arange(8)
    codes[:, 15] = torch.tensor([15, 0, 0, 0, 0, 0, 0, 9])
    parts = {
        "scales": torch.full((8, 2), 0.5, dtype=torch.float16),
        "zeros": torch.stack([torch.arange(8), torch.full((8,), 8)], dim=1).to(torch.uint8),
    }
    parts["scales"][3, 1] = -2.0
    weight = FusedTensor(codes, parts, Grid.parse("w4g8-asym"))
    found = stored(awq.write(checkpoint({f"{LAYER}.weight": weight}), tmp_path / "out"))
    assert found[f"{LAYER}.qweight"].tolist() == [[0x75316420], *[[0]] * 14, [0x9000000F - 2**32]]
    assert found[f"{LAYER}.qzeros"].tolist() == [[0x75316420], [0x88888888 - 2**32]]
    assert found[f"{LAYER}.scales"].tolist() == [[0.5] * 8, [0.5, 0.5, 0.5, -2.0, *[0.5] * 4]]
    assert set(found) == {f"{LAYER}.{part}" for part in awq.PARTS}


@settings(max_examples=40, deadline=None)
@given(
    grid=st.sampled_from(["w4g32", "w4g64", "w4", "w4g32-asym", "w4g64-asym", "w4-asym"]),
    blocks=st.tuples(st.integers(1, 30), st.integers(1, 3)),
    seed=st.integers(0, 2**31),
)
def test_read_and_vllm_give_the_trained_weights_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, grid: str, blocks: tuple[int, int], seed: int
) -> None:
    weight = fused(grid, 8 * blocks[0], 64 * blocks[1], seed)
    whole = checkpoint({f"{LAYER}.weight": weight})
    out = awq.write(whole, tmp_path_factory.mktemp("awq") / "out")
    assert same_tensors(awq.read(out), whole)
    assert torch.equal(as_vllm_reads(stored(out)), weight.dequantize())


def test_symmetric_and_asymmetric_weights_lie_in_one_directory(tmp_path: Path) -> None:
    whole = checkpoint({"a.weight": fused("w4g32", 32, 64), "b.weight": fused("w4g32-asym", 16, 64)})
    out = awq.write(whole, tmp_path / "out")
    assert same_tensors(awq.read(out), whole)
    assert stored(out)["a.qzeros"].unique().tolist() == [0x88888888 - 2**32]


def test_config_says_what_vllm_and_transformers_ask(tmp_path: Path) -> None:
    dense = {
        "model.layers.0.mlp.down_proj.weight": torch.zeros(64, 32),
        "model.layers.0.input_layernorm.weight": torch.zeros(64),
    }
    out = awq.write(checkpoint(dict(one("w4g64").tensors), dense), tmp_path / "out")
    config = quantization_config(out)
    assert config == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 64,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["model.layers.0.mlp.down_proj", "lm_head"],
    }
    from transformers.utils.quantization_config import AwqConfig

    read = AwqConfig.from_dict(config)
    assert (read.bits, read.group_size, read.zero_point, read.format) == (4, 64, True, "gemm")
    assert json.loads((out / "config.json").read_text())["dtype"] == "float16"


def test_a_quantized_head_is_declared(tmp_path: Path) -> None:
    whole = checkpoint({"lm_head.weight": fused("w4g32", 32, 64)})
    config = quantization_config(awq.write(whole, tmp_path / "out"))
    assert config["lm_head"] is True and config["modules_to_not_convert"] is None


@pytest.mark.parametrize("leaves", [("gate_proj",), ("gate_proj", "up_proj")])
def test_a_dense_name_within_a_quantized_one_is_refused_because_vllm_would_skip_both(
    tmp_path: Path, leaves: tuple[str, ...]
) -> None:
    block = "model.layers.0.mlp"
    tensors = {f"{block}.{leaf}.weight": fused("w4g32", 32, 64) for leaf in leaves}
    whole = checkpoint(tensors, {f"{block}.gate.weight": torch.zeros(8, 64)})
    with pytest.raises(LrqatError, match=r"mlp\.gate stayed dense, but AWQ would then skip .*mlp\.gate_proj too"):
        awq.write(whole, tmp_path / "out")


@pytest.mark.parametrize(
    ("grid", "shape", "says"),
    [
        ("w8g32", (32, 64), "AWQ stores 4-bit grids with integer zeros, not w8g32"),
        ("w4g32-min", (32, 64), "not w4g32-min"),
        ("iq4_nl", (32, 64), "not iq4_nl"),
        ("w4g48", (32, 64), "group_size 48 does not divide in_features 64"),
        ("w4", (36, 64), "out_features 36 is no multiple of 8"),
    ],
)
def test_carries_refuses_with_a_remedy(grid: str, shape: tuple[int, int], says: str) -> None:
    refusal = awq.carries(Grid.parse(grid), shape, "x.weight")
    assert refusal is not None and says in str(refusal) and refusal.remedy and "\n" not in str(refusal)


def test_one_group_size_for_all(tmp_path: Path) -> None:
    whole = checkpoint({"a.weight": fused("w4g32", 32, 64), "b.weight": fused("w4g64", 32, 64)})
    with pytest.raises(LrqatError, match=r"b\.weight has group_size 64 but a\.weight 32"):
        awq.write(whole, tmp_path / "out")


def test_vllm_limits_name_what_vllm_would_refuse() -> None:
    assert vllm_rules.limits("awq", one()) is None
    assert vllm_rules.limits("awq", one("w4g16-asym")) is None
    assert "takes groups of 32, 64, 128" in str(vllm_rules.limits("awq", one("w4g16-asym"), "gpu"))
    assert "multiple of 32, not 24" in str(vllm_rules.limits("awq", one(rows=24)))
    mixed = {f"model.layers.0.mlp.{n}_proj.weight": fused(g, 16, 64) for n, g in (("gate", "w4"), ("up", "w4-asym"))}
    assert vllm_rules.limits("awq", checkpoint(mixed)) is None  # both are stored with zeros


def test_damaged_directories_are_refused_in_one_line_or_read_rightly(tmp_path: Path) -> None:
    whole = one("w4g32-asym")
    assert refused_or_right(awq.read, awq.write(whole, tmp_path / "out"), whole) >= 200


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ({"qzeros": None}, "qzeros: expected torch.int32 [2, 4], got nothing"),
        ({"qweight": torch.zeros(64, 4, dtype=torch.int16)}, "qweight: expected torch.int32 [64, 4], got torch.int16"),
        ({"scales": torch.ones(2, 24).half()}, "qweight: expected torch.int32 [64, 3]"),
        ({"scales": torch.ones(1, 32).half(), "qzeros": torch.zeros(1, 4, dtype=torch.int32)}, "not groups of 32"),
    ],
)
def test_read_refuses_contradicting_tensors_in_one_line(
    tmp_path: Path, parts: dict[str, Tensor | None], says: str
) -> None:
    out = mutated(awq.write(one(), tmp_path / "out"), **parts)
    with pytest.raises(LrqatError, match=re.escape(says)) as caught:
        awq.read(out)
    assert "\n" not in str(caught.value)
