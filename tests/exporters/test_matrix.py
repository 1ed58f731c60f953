"""The matrix: its answers are what exporters do, and what was measured on the runtimes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from exporters import matrix
from exporters.formats import FORMATS, detect, read
from exporters.matrix import GRIDS, answer, one_weight, pick, require, table
from exporters.verify import verify
from lrqat.errors import LrqatError
from lrqat.fused import FusedCheckpoint, FusedSpec, Spec
from lrqat.grid import Grid
from lrqat.models import locate
from lrqat.ptq import rtn


@pytest.fixture(scope="module")
def base(tiny_model_dir: Path) -> tuple[Any, Any]:
    """A random Llama of width 256, and where it came from."""
    found = locate(str(tiny_model_dir))
    return found, found.model(torch.float16)


def on_grid(base: tuple[Any, Any], grid: Grid) -> FusedCheckpoint:
    """All linears rounded to a grid."""
    found, model = base
    weights = dict(model.named_parameters())
    names = [name for name in weights if name.endswith("_proj.weight")]
    tensors = {name: rtn(weights[name].detach(), grid, None, name) for name in names}
    dense = {name: weight.detach() for name, weight in weights.items() if name not in tensors}
    return FusedCheckpoint(
        tensors,
        dense,
        {name: FusedSpec(grid, tuple(t.codes_OI.shape)) for name, t in tensors.items()},  # type: ignore[arg-type]
        {name: Spec(weight.dtype, tuple(weight.shape)) for name, weight in dense.items()},
        {**found.config, "tie_word_embeddings": True},
        found.assets,
    )


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("spelling", GRIDS)
def test_a_format_stores_what_the_matrix_says_and_nothing_else(
    base: tuple[Any, Any], spelling: str, form: str, tmp_path: Path
) -> None:
    checkpoint = on_grid(base, Grid.parse(spelling))
    out = tmp_path / ("x.gguf" if form == "gguf" else "x")
    if answer(checkpoint, form).refusal is None:
        FORMATS[form].write(checkpoint, out)
        assert detect(out) == form
        assert verify(checkpoint, read(out), out) == 14
    else:
        with pytest.raises(LrqatError, match=r"^[^\n]+; [^\n]+$"):
            FORMATS[form].write(checkpoint, out)
        assert not out.exists()


def test_one_run_on_the_common_lattice_is_the_same_weights_in_every_format(
    base: tuple[Any, Any], tmp_path: Path
) -> None:
    checkpoint = on_grid(base, Grid.parse("w4g32"))
    for form in FORMATS:
        out = FORMATS[form].write(checkpoint, tmp_path / (f"{form}.gguf" if form == "gguf" else form))
        found = read(out)
        for name, tensor in checkpoint.tensors.items():
            assert torch.equal(found.tensors[name].dequantize(), tensor.dequantize()), (form, name)


@pytest.mark.parametrize(
    ("spelling", "target", "runs"),
    [
        ("w4g32", "gguf@llama.cpp", "Q4_0"),
        ("w4", "gguf@llama.cpp", "Q4_0"),
        ("w4g32-min", "gguf@llama.cpp", "Q4_1"),
        ("w4-asym", "gguf@llama.cpp", "Q4_K"),
        ("w3", "gguf@llama.cpp", "Q3_K"),
        ("w2g64", "gguf@llama.cpp", "Q2_0"),
        ("w8", "gguf@llama.cpp", "Q8_0"),
        ("q4_k", "gguf@llama.cpp", "Q4_K"),
        ("w4g32-asym", "gguf@llama.cpp", None),
        ("w4g32", "gptq@vllm-cpu", "CPUWNA16"),
        ("w4g32", "gptq@vllm-gpu", "Marlin"),
        ("w4g32-asym", "gptq@vllm-cpu", None),
        ("w4g32-asym", "awq@vllm-cpu", "CPUWNA16"),
        ("w4g32", "awq@vllm-cpu", "CPUWNA16"),
        ("w4g32-asym", "compressed-tensors@vllm-cpu", "CPUWNA16"),
        ("w8g32", "compressed-tensors@vllm-cpu", None),
        ("w8", "w8a8@vllm-cpu", "CPUInt8ScaledMM"),
        ("w8g32", "w8a8@vllm-cpu", None),
        ("w4g32", "w8a8@vllm-cpu", None),
        ("w3g64", "gptq@vllm-gpu", None),
        ("q4_k", "compressed-tensors@vllm-gpu", None),
    ],
)
def test_the_matrix_says_what_was_measured(spelling: str, target: str, runs: str | None) -> None:
    found = answer(one_weight(Grid.parse(spelling)), target)
    assert (found.runs or None) == runs and (found.refusal is None) == (runs is not None)
    if found.refusal:
        assert found.refusal.remedy


def test_the_table_has_a_row_for_every_grid_and_a_column_for_every_pair() -> None:
    rows = table()
    assert [row["grid"] for row in rows] == list(GRIDS)
    assert all(set(matrix.PAIRS) < set(row) for row in rows)
    assert all(any(row[pair] != "-" for row in rows) for pair in matrix.PAIRS)
    assert all(any(row[pair] != "-" for pair in matrix.PAIRS) for row in rows)


def test_a_grid_is_picked_that_all_targets_take() -> None:
    grid, found = pick(one_weight, ["gguf", "gptq", "vllm-cpu", "vllm-gpu"])
    assert str(grid) == "w4g32" and all(each.refusal is None for each in found)
    assert str(pick(one_weight, ["w8a8@vllm-cpu", "gguf"])[0]) == "w8"
    with pytest.raises(LrqatError, match=r"^no common grid for gptq@vllm-cpu: "):
        pick(lambda grid: one_weight(grid, (4096, 48)), ["gptq@vllm-cpu"])


def test_a_target_that_cannot_is_refused_with_those_that_can() -> None:
    with pytest.raises(LrqatError, match=r"^gptq@vllm-cpu: [^\n]*w4g32-asym[^\n]*this grid goes to [^\n]*awq@vllm-cpu"):
        require(one_weight(Grid.parse("w4g32-asym")), ["awq", "gptq@vllm-cpu"])
    with pytest.raises(LrqatError, match=r"^--for exl2: expected some of gguf, "):
        require(one_weight(Grid.parse("w4g32")), ["exl2"])


def test_tensor_parallel_splits_are_asked_about() -> None:
    specs = {"model.layers.0.mlp.down_proj.weight": FusedSpec(Grid.parse("w4g128"), (576, 1536))}
    checkpoint = FusedCheckpoint({}, {}, specs, {}, {}, {})
    assert answer(checkpoint, "gptq@vllm-gpu", 4).refusal is None
    refusal = answer(checkpoint, "gptq@vllm-gpu", 8).refusal
    assert refusal and "8 ranks cut in_features 1536 inside a group" in refusal.reason


def test_shards_that_vllm_fuses_must_share_a_scheme() -> None:
    grids = {"q_proj": "w4g32", "k_proj": "w4g32", "v_proj": "w4g64"}
    specs = {f"model.layers.0.self_attn.{n}.weight": FusedSpec(Grid.parse(g), (256, 256)) for n, g in grids.items()}
    refusal = answer(FusedCheckpoint({}, {}, specs, {}, {}, {}), "compressed-tensors@vllm-cpu").refusal
    assert refusal and "fuses q_proj, k_proj, v_proj" in refusal.reason
