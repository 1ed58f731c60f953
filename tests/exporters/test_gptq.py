import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hf_cases import LAYER, checkpoint, fused, mutated, one, quantization_config, refused_or_right, same_tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from exporters import gptq, vllm_rules
from lrqat.errors import LrqatError
from lrqat.fused import FusedTensor
from lrqat.grid import Grid


def autogptq_codes(words_RW: np.ndarray, bits: int) -> np.ndarray:
    """Codes by AutoGPTQ's table: 32/b a word; at 3 bits ten, a split one, ten, a split one, ten in three words."""
    words = words_RW.view(np.uint32)
    if bits != 3:
        places = [words >> shift for shift in range(0, 32, bits)]
    else:
        low, mid, high = words[:, 0::3], words[:, 1::3], words[:, 2::3]
        places = [low >> 3 * j for j in range(10)]
        places += [low >> 30 | (mid & 1) << 2]
        places += [mid >> 3 * j + 1 for j in range(10)]
        places += [mid >> 31 | (high & 3) << 1]
        places += [high >> 3 * j + 2 for j in range(10)]
    return (np.stack(places, axis=2) & (1 << bits) - 1).reshape(len(words), -1).astype(np.int32)


def as_autogptq_reads(tensors: dict[str, Tensor], bits: int, plus_one: bool) -> Tensor:
    """W = scales[g_idx] * (codes - zeros[g_idx]), zeros stored minus one; AutoGPTQ@058fd80 qlinear_cuda.py."""
    part = {name: tensors[f"{LAYER}.{name}"].numpy() for name in ("qweight", "qzeros", "scales", "g_idx")}
    codes_OI = autogptq_codes(np.ascontiguousarray(part["qweight"].T), bits)
    zeros_GO = autogptq_codes(part["qzeros"], bits) + plus_one
    group = part["g_idx"]
    return torch.from_numpy((part["scales"].astype(np.float32)[group] * (codes_OI.T - zeros_GO[group])).T)


def test_golden_bytes_written_by_hand(tmp_path: Path) -> None:
    grid = Grid.parse("w4g8")
    codes = torch.full((8, 16), 8, dtype=torch.uint8)
    codes[0, :8] = torch.tensor([1, 2, 3, 4, 5, 6, 7, 8])
    codes[1, 8:] = torch.tensor([15, 14, 13, 12, 11, 10, 9, 0])
    scales = torch.ones(8, 2, dtype=torch.float16)
    scales[1] = torch.tensor([0.5, -2.0])
    gptq.write(checkpoint({f"{LAYER}.weight": FusedTensor(codes, {"scales": scales}, grid)}), tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    eights = 0x88888888 - 2**32
    assert found[f"{LAYER}.qweight"].tolist() == [
        [0x87654321 - 2**32, *[eights] * 7],
        [eights, 0x09ABCDEF, *[eights] * 6],
    ]
    assert found[f"{LAYER}.qzeros"].tolist() == [[0x77777777], [0x77777777]]
    assert found[f"{LAYER}.scales"].tolist() == [[1, 0.5, *[1] * 6], [1, -2.0, *[1] * 6]]
    assert found[f"{LAYER}.g_idx"].tolist() == [0] * 8 + [1] * 8


@pytest.mark.parametrize(("bits", "word"), [(2, 0x55555555), (4, 0x77777777), (8, 0x7F7F7F7F)])
def test_gptq_zeros_store_z_minus_one(tmp_path: Path, bits: int, word: int) -> None:
    gptq.write(one(f"w{bits}g32"), tmp_path / "v1")
    gptq.write(one(f"w{bits}g32"), tmp_path / "v2", zeros="v2")
    v1, v2 = (load_file(tmp_path / v / "model.safetensors")[f"{LAYER}.qzeros"] for v in ("v1", "v2"))
    one_each = sum(1 << shift for shift in range(0, 32, bits))
    assert v1.unique().tolist() == [word]
    assert v2.unique().tolist() == [word + one_each - 2**32]
    assert quantization_config(tmp_path / "v1")["checkpoint_format"] == "gptq"
    assert quantization_config(tmp_path / "v2")["checkpoint_format"] == "gptq_v2"


def test_golden_zeros_of_an_asymmetric_grid(tmp_path: Path) -> None:
    weight = fused("w4g32-asym", 8, 32)
    weight.parts["zeros"][:, 0] = torch.tensor([1, 2, 3, 4, 5, 6, 7, 15])
    out = gptq.write(checkpoint({f"{LAYER}.weight": weight}), tmp_path / "v2")
    assert load_file(out / "model.safetensors")[f"{LAYER}.qzeros"].tolist() == [[0xF7654321 - 2**32]]
    assert quantization_config(out)["checkpoint_format"] == "gptq_v2"
    assert quantization_config(out)["sym"] is False
    out = gptq.write(checkpoint({f"{LAYER}.weight": weight}), tmp_path / "v1", zeros="v1")
    assert load_file(out / "model.safetensors")[f"{LAYER}.qzeros"].tolist() == [[0xE6543210 - 2**32]]
    assert torch.equal(gptq.read(out).tensors[f"{LAYER}.weight"].dequantize(), weight.dequantize())


def test_a_zero_of_0_is_refused_in_v1_whose_readers_carry_it_into_the_next(tmp_path: Path) -> None:
    weight = fused("w4g32-asym", 8, 32)
    weight.parts["zeros"][3, 0] = 0
    with pytest.raises(LrqatError, match=r"has zeros of 0.*leave out --zeros v1"):
        gptq.write(checkpoint({f"{LAYER}.weight": weight}), tmp_path / "out", zeros="v1")
    assert list(tmp_path.iterdir()) == []


def test_a_zero_of_0_in_v1_is_refused_in_reading_too_as_writers_disagree_about_its_neighbour(tmp_path: Path) -> None:
    weight = fused("w4g32-asym", 8, 32)
    weight.parts["zeros"][:, 0] = torch.tensor([1, 5, 6, 9, 1, 2, 3, 4])
    out = gptq.write(checkpoint({f"{LAYER}.weight": weight}), tmp_path / "v1", zeros="v1")
    tensors = load_file(out / "model.safetensors")
    tensors[f"{LAYER}.qzeros"] -= 1  # the first zero is 0 now, and GPTQModel's next one borrows
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    with pytest.raises(LrqatError, match=r"a zero of 0 in GPTQ's first format.*save it as gptq_v2"):
        gptq.read(out).tensors[f"{LAYER}.weight"]


def test_three_bits_default_to_v2_zeros_because_gptqmodel_misread_v1(tmp_path: Path) -> None:
    gptq.write(one("w3g32"), tmp_path / "out")
    assert quantization_config(tmp_path / "out")["checkpoint_format"] == "gptq_v2"


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from(gptq.BITS),
    group=st.sampled_from(["", "g32", "g64"]),
    zero=st.sampled_from(["", "-asym"]),
    blocks=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    seed=st.integers(0, 2**31),
)
def test_read_and_autogptq_give_the_trained_weights_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, bits: int, group: str, zero: str, blocks: tuple[int, int], seed: int
) -> None:
    weight = fused(f"w{bits}{group}{zero}", 32 * blocks[0], 64 * blocks[1], seed)
    whole = checkpoint({f"{LAYER}.weight": weight})
    for zeros in ["v2"] if zero else ["v1", "v2"]:
        out = gptq.write(whole, tmp_path_factory.mktemp("gptq") / "out", zeros=zeros)  # type: ignore[arg-type]
        assert same_tensors(gptq.read(out), whole)
        published = as_autogptq_reads(load_file(out / "model.safetensors"), bits, plus_one=zeros == "v1")
        assert torch.equal(published, weight.dequantize())


def test_grids_mix_by_dynamic_overrides_which_name_fused_linears_too(tmp_path: Path) -> None:
    block = "model.layers.0"
    grids = {
        **{f"{block}.self_attn.{x}_proj": "w4g32" for x in "qkvo"},
        **{f"{block}.mlp.{x}_proj": "w8g64" for x in ("gate", "up")},
        f"{block}.mlp.down_proj": "w3-asym",
    }
    whole = checkpoint({f"{name}.weight": fused(grid, 64, 64) for name, grid in grids.items()})
    out = gptq.write(whole, tmp_path / "out")
    assert same_tensors(gptq.read(out), whole)
    config = quantization_config(out)
    assert (config["bits"], config["group_size"], config["sym"]) == (4, 32, True)
    assert config["checkpoint_format"] == "gptq_v2"  # for the asymmetric one

    def as_vllm_and_gptqmodel_read(layer: str) -> dict[str, Any] | None:
        """Both take the first pattern that matches from the start; auto_gptq's `get_dynamic_override`."""
        for pattern, changes in config["dynamic"].items():
            if re.match(pattern[2:], layer):
                assert pattern.startswith("+:")
                return changes
        return {}

    assert as_vllm_and_gptqmodel_read(f"{block}.self_attn.qkv_proj") == {}
    assert as_vllm_and_gptqmodel_read(f"{block}.mlp.up_proj") == {"bits": 8, "group_size": 64}
    assert as_vllm_and_gptqmodel_read(f"{block}.mlp.gate_up_proj") == {"bits": 8, "group_size": 64}
    assert as_vllm_and_gptqmodel_read(f"{block}.mlp.down_proj") == {"bits": 3, "group_size": -1, "sym": False}
    assert as_vllm_and_gptqmodel_read("model.layers.10.mlp.down_proj") == {}


def test_a_quantized_head_is_declared_and_no_longer_tied(tmp_path: Path) -> None:
    whole = checkpoint({"lm_head.weight": fused("w4g32", 32, 64)}, tie_word_embeddings=True)
    out = gptq.write(whole, tmp_path / "out")
    assert quantization_config(out)["lm_head"] is True
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    assert same_tensors(gptq.read(out), whole)


def test_dense_tensors_and_assets_pass_through_in_their_own_dtype(tmp_path: Path) -> None:
    dense = {
        "model.embed_tokens.weight": torch.randn(8, 64),
        "model.norm.weight": torch.randn(64).bfloat16(),
        "model.layers.0.self_attn.q_proj.bias": torch.randn(32).half(),
    }
    out = gptq.write(checkpoint(dict(one().tensors), dense), tmp_path / "out")
    found = gptq.read(out).dense
    assert set(found) == {*dense}
    for name, tensor in dense.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert (out / "tokenizer.json").read_bytes() == b"{}"


def test_config_names_the_grid_and_the_linears_that_stayed_dense(tmp_path: Path) -> None:
    dense = {
        "model.layers.0.mlp.down_proj.weight": torch.zeros(64, 32),
        "model.layers.0.input_layernorm.weight": torch.zeros(64),
        "lm_head.weight": torch.zeros(8, 64),
    }
    config = quantization_config(gptq.write(checkpoint(dict(one("w4g64").tensors), dense), tmp_path / "out"))
    [(pattern, changes)] = config.pop("dynamic").items()
    assert changes == {} and pattern.startswith("-:")
    assert re.match(pattern[2:], "model.layers.0.mlp.down_proj")
    assert not re.match(pattern[2:], "model.layers.0.mlp.up_proj")
    [quantizer] = config.pop("meta")["quantizer"]
    assert quantizer.startswith("lrqat:")
    assert config == {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 64,
        "sym": True,
        "desc_act": False,
        "checkpoint_format": "gptq",
        "pack_dtype": "int32",
        "lm_head": False,
    }


@pytest.mark.parametrize(
    ("base", "grid", "served"),
    [
        ("float32", "w4g32", "float16"),  # vLLM's GPTQ kernels have no float32
        ("float16", "w4g32", "float16"),
        ("bfloat16", "w4g32", "bfloat16"),
        ("bfloat16", "w4g32-fp16", "float16"),  # bfloat16 would round such scales
    ],
)
def test_served_dtype_holds_every_scale_exactly(tmp_path: Path, base: str, grid: str, served: str) -> None:
    out = gptq.write(checkpoint(dict(one(grid).tensors), dtype=base), tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["dtype"] == served


def test_transformers_reads_the_quantization_config(tmp_path: Path) -> None:
    from transformers.utils.quantization_config import GPTQConfig

    out = gptq.write(one(), tmp_path / "out")
    config = GPTQConfig.from_dict(quantization_config(out))
    assert (config.bits, config.group_size, config.sym, config.desc_act) == (4, 32, True, False)


@pytest.mark.parametrize(
    ("grid", "shape", "says"),
    [
        ("w4g32-min", (32, 64), "use --grid w4g32"),
        ("q4_k", (32, 256), "use --grid w4g32"),
        ("mxfp4", (32, 64), "use --grid w4g32"),
        ("w5g32", (32, 64), "GPTQ stores 2, 3, 4 or 8 bits, not 5"),
        ("w4g128", (32, 64), "group_size 128 does not divide in_features 64"),
        ("w3", (32, 48), "in_features 48 is no multiple of 32"),
        ("w4", (36, 64), "out_features 36 is no multiple of 8"),
    ],
)
def test_carries_refuses_with_a_remedy(grid: str, shape: tuple[int, int], says: str) -> None:
    refusal = gptq.carries(Grid.parse(grid), shape, "x.weight")
    assert refusal is not None
    assert says in str(refusal) and "\n" not in str(refusal) and str(refusal).startswith("x.weight: ")
    assert refusal.remedy


@pytest.mark.parametrize("grid", ["w2g32", "w3g32", "w4", "w8g64", "w4g32-fp16", "w4g32-asym", "w3-asym"])
def test_carries_takes_affine_grids(grid: str) -> None:
    assert gptq.carries(Grid.parse(grid), (32, 64)) is None


def test_write_refuses_what_it_cannot_store(tmp_path: Path) -> None:
    a = fused("w4g32", 32, 64)
    for given_checkpoint, says in (
        (checkpoint({"a.weight": a, "b.weight": fused("w4g32-min", 32, 64)}), "b.weight: GPTQ stores affine grids"),
        (checkpoint({"a": a}), "a is no linear's weight"),
        (checkpoint({}), "no quantized weight"),
    ):
        with pytest.raises(LrqatError, match=re.escape(says)):
            gptq.write(given_checkpoint, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_vllm_limits_name_what_vllm_would_refuse() -> None:
    assert vllm_rules.limits("gptq", one()) is None
    for grid, says in (("w8g32", "GPUs only"), ("w3g32", "not 3"), ("w4g16", "groups of 32, 64, 128")):
        assert says in str(vllm_rules.limits("gptq", one(grid)))
    assert "symmetric GPTQ only" in str(vllm_rules.limits("gptq", one("w4g32-asym")))
    assert "multiple of 32, not 48" in str(vllm_rules.limits("gptq", one("w4", columns=48)))
    assert "multiple of 32, not 24" in str(vllm_rules.limits("gptq", one(rows=24)))
    half_dense = checkpoint(dict(one().tensors), {"model.layers.0.mlp.gate_proj.weight": torch.zeros(32, 64)})
    assert "fuses gate_proj, up_proj" in str(vllm_rules.limits("gptq", half_dense))
    pair = {f"model.layers.0.mlp.{n}_proj.weight": fused("w4g32", 16, 64) for n in ("gate", "up")}
    assert vllm_rules.limits("gptq", checkpoint(pair)) is None  # 16 + 16 rows
    pair["model.layers.0.mlp.up_proj.weight"] = fused("w4g64", 16, 64)
    assert "different grids" in str(vllm_rules.limits("gptq", checkpoint(pair)))


def test_a_gpu_takes_eight_bits_and_ranks_must_not_cut_groups() -> None:
    assert vllm_rules.limits("gptq", one("w8g32"), "gpu") is None
    down = checkpoint({"model.layers.0.mlp.down_proj.weight": fused("w4g64", 32, 192)})
    assert vllm_rules.limits("gptq", down, "gpu", tensor_parallel=3) is None
    assert "inside a group" in str(vllm_rules.limits("gptq", down, "gpu", tensor_parallel=2))


def test_each_tensor_is_made_once_and_only_one_is_held(tmp_path: Path) -> None:
    made = []

    class Live(dict):  # type: ignore[type-arg]
        def __getitem__(self, name: str) -> FusedTensor:
            made.append(name)
            return fused("w4g32", 32, 64)

    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(3)]
    whole = checkpoint({name: fused("w4g32", 32, 64) for name in names})
    gptq.write(replace(whole, tensors=Live()), tmp_path / "out")
    assert made == names


def test_a_failure_half_way_leaves_the_previous_export_untouched(tmp_path: Path) -> None:
    out = gptq.write(one(), tmp_path / "out")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    wrong = fused("w4g32", 32, 64)
    wrong.codes_OI[0, 0] = 16
    with pytest.raises(LrqatError, match=r"16 is no value of grid w4g32"):
        gptq.write(checkpoint({**one().tensors, "model.layers.1.mlp.up_proj.weight": wrong}), out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ({"qzeros": None}, "qzeros: expected torch.int32 [2, 4], got nothing"),
        ({"g_idx": None}, "has no g_idx [I]"),
        ({"scales": None}, "scales: expected a matrix, got nothing"),
        ({"scales": torch.ones(0, 32, dtype=torch.float16)}, "scales: expected a matrix, got [0, 32]"),
        ({"scales": torch.full((2, 32), 1e-9)}, "float16 does not hold"),
        ({"scales": torch.full((2, 32), torch.nan)}, "float16 does not hold"),
        ({"qweight": torch.zeros(8, 16, dtype=torch.int32)}, "qzeros: expected torch.int32 [2, 2]"),
        ({"qweight": torch.zeros(8, 32, dtype=torch.int16)}, "qweight: expected torch.int32 [8, 32]"),
        ({"qweight": torch.zeros(256, dtype=torch.int32)}, "qweight: expected a matrix, got [256]"),
        ({"scales": torch.ones(3, 32).half(), "qzeros": torch.zeros(3, 4, dtype=torch.int32)}, "in groups of 21"),
        ({"qzeros": torch.zeros(2, 4, dtype=torch.int32)}, "qzeros are not those of a symmetric grid"),
        ({"g_idx": torch.arange(64, dtype=torch.int32).flip(0) // 32}, "g_idx is not sequential"),
    ],
)
def test_read_refuses_contradicting_tensors_in_one_line(
    tmp_path: Path, parts: dict[str, Tensor | None], says: str
) -> None:
    out = mutated(gptq.write(one(), tmp_path / "out"), **parts)
    with pytest.raises(LrqatError, match=re.escape(says)) as caught:
        dict(gptq.read(out).tensors)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("grid", ["w4g32", "w3g32"])
def test_damaged_directories_are_refused_in_one_line_or_read_rightly(tmp_path: Path, grid: str) -> None:
    whole = one(grid)
    assert refused_or_right(gptq.read, gptq.write(whole, tmp_path / "out"), whole) >= 200


def test_foreign_scales_in_bfloat16_or_float32_are_read_where_float16_holds_them(tmp_path: Path) -> None:
    whole = one()
    scales = whole.tensors[f"{LAYER}.weight"].parts["scales"].T.contiguous()
    for dtype in (torch.bfloat16, torch.float32):
        out = mutated(gptq.write(whole, tmp_path / "out"), scales=scales.to(dtype))
        assert same_tensors(gptq.read(out), whole)


@pytest.mark.parametrize(
    "config", [{}, {"quantization_config": {"quant_method": "awq"}}, {"quantization_config": {"bits": 4}}]
)
def test_read_refuses_another_format(tmp_path: Path, config: dict[str, object]) -> None:
    out = gptq.write(one(), tmp_path / "out")
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(LrqatError, match="declares no GPTQ"):
        gptq.read(out)


def test_read_refuses_bits_that_no_gptq_has(tmp_path: Path) -> None:
    out = gptq.write(one(), tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["bits"] = 5
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(LrqatError, match="cannot read GPTQ with bits 5"):
        gptq.read(out)
