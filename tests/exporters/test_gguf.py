"""GGUF files of a small Llama: exact values, exact types, and refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf as reference
import numpy as np
import pytest
import torch

from exporters import gguf, gguf_arch
from exporters.verify import verify
from lrqat.errors import LrqatError
from lrqat.fused import (
    FusedCheckpoint,
    FusedSpec,
    FusedTensor,
    Lazy,
    SafetensorsDirectory,
    Spec,
    read_assets,
    read_json,
)
from lrqat.gguf_file import GgufFile
from lrqat.grid import Grid

GridOf = Callable[[str], Grid | None]


def fuse(directory: Path, grid_of: GridOf, **config: Any) -> FusedCheckpoint:
    """The model of `directory` with its linears on random codes of their grids (None: dense)."""
    files = SafetensorsDirectory(directory)
    grids = {name: grid_of(name) for name in files.specs if name.endswith("_proj.weight")}
    specs = {n: FusedSpec(g, files.specs[n].shape) for n, g in grids.items() if g is not None}
    dense = {name: spec for name, spec in files.specs.items() if name not in specs}

    def make(name: str) -> FusedTensor:
        grid, shape = specs[name].grid, specs[name].shape
        source = torch.Generator().manual_seed(len(name))
        codes_OI = torch.randint(0, grid.codes, shape, generator=source, dtype=torch.uint8)
        parts = {}
        for part, wire in grid.parts(*shape).items():
            if wire.low is None or wire.high is None:
                parts[part] = (torch.randn(wire.shape, generator=source) * 0.05 / grid.codes).to(torch.bfloat16)
            else:
                parts[part] = torch.randint(wire.low, wire.high + 1, wire.shape, generator=source)
        return FusedTensor.make(codes_OI, parts, grid)

    hf_config = {**read_json(directory / "config.json"), **config}
    return FusedCheckpoint(Lazy(specs, make), Lazy(dense, files.get), specs, dense, hf_config, read_assets(directory))


def w4(_: str) -> Grid:
    return Grid.parse("w4g32")


def by_layer(**kinds: str | None) -> GridOf:
    """A grid of its own for each kind of layer; None stays dense."""

    def grid_of(name: str) -> Grid | None:
        spelling = kinds[name.split(".")[-2].removesuffix("_proj")]
        return None if spelling is None else Grid.parse(spelling)

    return grid_of


mixed = by_layer(q="w4g32", k="w3g64", v="w2g32", o="w8g32", up="w5g128", down="w6", gate=None)
lattices = by_layer(q="q4_k", k="iq4_nl", v="q6_k", o="mxfp4", up="q2_k", down="q3_k", gate="tq2_0")
restated = by_layer(q="w4-asym", k="w3", v="w2", o="w5-asym", up="w4g64-min", down="q5_k", gate="w5g32-min")


@pytest.fixture(scope="module")
def exported(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gguf.write(fuse(tiny_model_dir, mixed), tmp_path_factory.mktemp("gguf") / "mixed.gguf")


@pytest.mark.parametrize("grid_of", [mixed, lattices, restated])
def test_what_is_read_back_is_what_was_trained_bit_for_bit(
    tiny_model_dir: Path, tmp_path: Path, grid_of: GridOf
) -> None:
    checkpoint = fuse(tiny_model_dir, grid_of)
    path = gguf.write(checkpoint, tmp_path / "x.gguf")
    back = gguf.read(path)
    assert back.specs.keys() == back.tensors.keys() == checkpoint.specs.keys()
    assert {name: spec.shape for name, spec in back.dense_specs.items()} == {
        name: spec.shape for name, spec in checkpoint.dense_specs.items()
    }
    for name, spec in back.specs.items():
        kind = gguf.block_type(checkpoint.specs[name].grid, spec.shape)
        assert spec == FusedSpec(kind.grid, checkpoint.specs[name].shape)
        assert back.tensors[name].grid == kind.grid
    for name, dense in back.dense.items():
        assert back.dense_specs[name] == Spec(dense.dtype, tuple(dense.shape))
    assert verify(checkpoint, back, path) == len(checkpoint.specs)
    assert (back.hf_config, back.assets) == ({}, {})


@pytest.mark.parametrize("grid_of", [mixed, lattices, restated])
def test_what_was_read_is_written_again_to_the_same_bytes(
    tiny_model_dir: Path, tmp_path: Path, grid_of: GridOf
) -> None:
    checkpoint = fuse(tiny_model_dir, grid_of)
    first = gguf.write(checkpoint, tmp_path / "x.gguf")
    back = replace(gguf.read(first), hf_config=checkpoint.hf_config, assets=checkpoint.assets)
    (tmp_path / "again").mkdir()
    assert gguf.write(back, tmp_path / "again" / "x.gguf").read_bytes() == first.read_bytes()


def test_ggufs_own_reader_and_dequantizer_find_the_same_values(tiny_model_dir: Path, exported: Path) -> None:
    theirs = {t.name: t for t in reference.GGUFReader(exported).tensors}
    architecture = gguf_arch.architecture(read_json(tiny_model_dir / "config.json"))
    names = {hf: gguf for gguf, (hf,) in architecture.names().items()}
    back = gguf.read(exported)
    values = {name: tensor.dequantize() for name, tensor in back.tensors.items()}
    for name, ours in {**values, **back.dense}.items():
        tensor = theirs[names[name]]
        rows = architecture.to_gguf(name, ours)
        assert np.array_equal(reference.quants.dequantize(tensor.data, tensor.tensor_type), rows.numpy()), name


def test_each_tensor_has_the_type_of_its_own_grid(exported: Path) -> None:
    types = {t.name: t.tensor_type.name for t in reference.GGUFReader(exported).tensors}
    block = {name.split(".")[2]: kind for name, kind in types.items() if name.startswith("blk.0.")}
    assert block == {
        "attn_norm": "F32",
        "attn_q": "Q4_0",
        "attn_k": "Q4_0",
        "attn_v": "Q4_0",
        "attn_output": "Q8_0",
        "ffn_norm": "F32",
        "ffn_gate": "F32",
        "ffn_up": "Q5_0",
        "ffn_down": "Q8_0",
    }
    assert "output.weight" not in types  # tied


@pytest.mark.parametrize(
    ("values", "name"),
    [
        (torch.tensor([[1.0, 2.0**-24]]), "F16"),
        (torch.tensor([[1.0, 2.0**-30]]), "BF16"),
        (torch.tensor([[1 + 2.0**-20, 2.0**-30]]), "F32"),
        (torch.tensor([[1.0, 2.0**-30]], dtype=torch.bfloat16), "BF16"),
    ],
)
def test_dense_matrices_take_the_first_exact_float_type(values: torch.Tensor, name: str) -> None:
    assert reference.GGMLQuantizationType(gguf._exact_float([values])).name == name


@pytest.mark.parametrize(
    ("grid_of", "file_type"), [(w4, "Q4_0"), (lattices, "Q3_K_M"), (restated, "Q5_K_M"), (lambda _: None, "ALL_F32")]
)
def test_the_file_type_is_that_of_most_bytes(
    tiny_model_dir: Path, tmp_path: Path, grid_of: GridOf, file_type: str
) -> None:
    metadata = GgufFile(gguf.write(fuse(tiny_model_dir, grid_of), tmp_path / "x.gguf")).metadata
    expected = file_type if file_type == "ALL_F32" else f"MOSTLY_{file_type}"
    assert reference.LlamaFileType(metadata["general.file_type"]).name == expected


@pytest.mark.parametrize("spelling", ["w4g32-asym", "w4g16"])
def test_grids_that_no_block_type_holds_are_refused_before_anything_is_written(
    tiny_model_dir: Path, tmp_path: Path, spelling: str
) -> None:
    with pytest.raises(LrqatError, match=r"^model\.layers\.0\.[^\n]*; train on w4g32[^\n]*$"):
        gguf.write(fuse(tiny_model_dir, lambda _: Grid.parse(spelling)), tmp_path / "new" / "x.gguf")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("config", "line"),
    [
        (
            {"architectures": ["GPT2LMHeadModel"]},
            "architecture GPT2LMHeadModel: GGUF export knows LlamaForCausalLM, MistralForCausalLM",
        ),
        ({"hidden_act": "gelu"}, "hidden_act gelu"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "GGUF export carries rope_type default"),
        ({"rope_scaling": {"type": "dynamic"}, "rope_parameters": None}, "GGUF export carries rope_type default"),
        ({"num_hidden_layers": 3}, "model.layers.2.input_layernorm.weight: missing"),
        ({"num_hidden_layers": 1}, "model.layers.1.input_layernorm.weight: llama.cpp's llama has no such tensor"),
        ({"tie_word_embeddings": False}, "lm_head.weight: missing"),
        ({"attention_bias": True}, "model.layers.0.self_attn.k_proj.bias: missing"),
        ({"num_attention_heads": 8}, "o_proj.weight: shape [256, 256], but config.json says [256, 512]"),
        ({"vocab_size": 300}, "model.embed_tokens.weight: shape [448, 256], but config.json says [300, 256]"),
    ],
)
def test_models_that_llama_cpp_would_run_otherwise_are_refused_before_anything_is_written(
    tiny_model_dir: Path, tmp_path: Path, config: dict[str, Any], line: str
) -> None:
    with pytest.raises(LrqatError, match=r"^[^\n]*$") as refused:
        gguf.write(fuse(tiny_model_dir, w4, **config), tmp_path / "new" / "x.gguf")
    assert line in str(refused.value)
    assert not any(tmp_path.iterdir())


def test_an_export_that_fails_leaves_the_previous_file_and_nothing_else(tiny_model_dir: Path, tmp_path: Path) -> None:
    checkpoint = fuse(tiny_model_dir, w4)
    out = gguf.write(checkpoint, tmp_path / "x.gguf")
    previous = out.read_bytes()

    def stop(name: str) -> FusedTensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gguf.write(replace(checkpoint, tensors=Lazy(checkpoint.specs, stop)), out)
    assert [p.name for p in tmp_path.iterdir()] == ["x.gguf"] and out.read_bytes() == previous


def test_a_file_that_is_not_ours_is_not_replaced(tiny_model_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "download.gguf"
    out.write_bytes(b"precious")
    with pytest.raises(LrqatError, match=r"download\.gguf: exists, and is not an export of lrqat"):
        gguf.write(fuse(tiny_model_dir, w4), out)
    assert out.read_bytes() == b"precious"


def test_a_certificate_goes_with_the_file_it_was_for(tiny_model_dir: Path, tmp_path: Path) -> None:
    checkpoint = fuse(tiny_model_dir, w4)
    out = gguf.write(checkpoint, tmp_path / "x.gguf")
    out.with_suffix(".certificate.json").write_text("{}")
    gguf.write(checkpoint, out)
    assert [p.name for p in tmp_path.iterdir()] == ["x.gguf"]


def test_a_place_that_cannot_be_written_is_one_line(tiny_model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "x.gguf", tmp_path / "x.bin"):
        with pytest.raises(LrqatError, match=str(out)):
            gguf.write(fuse(tiny_model_dir, w4), out)


def test_codes_that_the_grid_does_not_have_are_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    checkpoint = fuse(tiny_model_dir, w4)
    bad = Lazy(checkpoint.specs, lambda n: replace(checkpoint.tensors[n], codes_OI=checkpoint.tensors[n].codes_OI + 1))
    with pytest.raises(LrqatError, match="16 is no value of grid w4g32"):
        gguf.write(replace(checkpoint, tensors=bad), tmp_path / "x.gguf")
    assert not any(tmp_path.iterdir())


def test_metadata_is_what_llama_cpps_converter_writes(tiny_model_dir: Path, exported: Path) -> None:
    metadata = GgufFile(exported).metadata
    config = json.loads((tiny_model_dir / "config.json").read_text())
    assert metadata["general.architecture"] == "llama" and metadata["general.file_type"] == 7  # mostly Q8_0, in bytes
    assert metadata["general.quantization_version"] == 2
    expected = {
        "vocab_size": 448,
        "context_length": 512,
        "embedding_length": 256,
        "block_count": 2,
        "feed_forward_length": 512,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": 64,
        "attention.value_length": 64,
        "rope.dimension_count": 64,
        "rope.freq_base": 10000.0,
        "attention.layer_norm_rms_epsilon": float(np.float32(config["rms_norm_eps"])),
    }
    assert {key: metadata[f"llama.{key}"] for key in expected} == expected


def test_the_f32_reference_holds_f32_only(tiny_model_dir: Path, tmp_path: Path) -> None:
    path = gguf.write(fuse(tiny_model_dir, mixed), tmp_path / "x.gguf", dequantized=True)
    file = GgufFile(path)
    assert {info.ggml_type for info in file.tensors.values()} == {gguf.F32}
    assert file.metadata["general.file_type"] == 0


def test_our_container_reader_agrees_with_ggufs(exported: Path) -> None:
    ours, theirs = GgufFile(exported), reference.GGUFReader(exported)
    assert {name: (info.shape, info.ggml_type, info.offset) for name, info in ours.tensors.items()} == {
        t.name: (tuple(reversed(t.shape.tolist())), t.tensor_type.value, t.data_offset) for t in theirs.tensors
    }
    fields = {name: field.contents() for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert ours.metadata == fields
