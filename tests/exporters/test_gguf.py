"""GGUF files of a small Llama: exact values, exact types, and refusals."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf as reference
import numpy as np
import pytest
import torch

from exporters import gguf, gguf_llama
from lrqat.errors import LrqatError
from lrqat.fused import (
    FusedCheckpoint,
    FusedSpec,
    FusedTensor,
    Lazy,
    SafetensorsDirectory,
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
        grid, (rows, columns) = specs[name].grid, specs[name].shape
        source = torch.Generator().manual_seed(len(name))
        codes_OI = torch.randint(0, grid.levels, (rows, columns), generator=source, dtype=torch.uint8)
        groups = columns // grid.columns_per_group(columns)
        scales_OG = torch.randn(rows, groups, generator=source) * 0.05 / grid.midpoint
        return FusedTensor(codes_OI, grid.to_wire(scales_OG).to(torch.float16), None, grid)

    hf_config = {**read_json(directory / "config.json"), **config}
    return FusedCheckpoint(Lazy(specs, make), Lazy(dense, files.get), specs, dense, hf_config, read_assets(directory))


def w4(_: str) -> Grid:
    return Grid(4, 32)


def mixed(name: str) -> Grid | None:
    """A grid of its own for each kind of layer; the gate stays dense."""
    kinds = {"q": "w4g32", "k": "w3g64", "v": "w2", "o": "w8g32", "up": "w5g128", "down": "w6", "gate": None}
    spelling = kinds[name.split(".")[-2].removesuffix("_proj")]
    return None if spelling is None else Grid.parse(spelling)


@pytest.fixture(scope="module")
def exported(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gguf.write(fuse(tiny_model_dir, mixed), tmp_path_factory.mktemp("gguf") / "mixed.gguf")


def test_what_is_read_back_is_what_was_trained_bit_for_bit(tiny_model_dir: Path, exported: Path) -> None:
    checkpoint, back = fuse(tiny_model_dir, mixed), gguf.read(exported)
    assert back.keys() == checkpoint.specs.keys() | checkpoint.dense_specs.keys()
    for name, tensor in checkpoint.tensors.items():
        assert torch.equal(back[name], tensor.dequantize()), name
    for name, dense in checkpoint.dense.items():
        assert torch.equal(back[name], dense.to(torch.float32)), name


def test_ggufs_own_reader_and_dequantizer_find_the_same_values(tiny_model_dir: Path, exported: Path) -> None:
    theirs = {t.name: t for t in reference.GGUFReader(exported).tensors}
    names = gguf_llama.gguf_names(2)
    for name, values in gguf.read(exported).items():
        tensor = theirs[names[name]]
        heads = gguf_llama.rope_heads(name, 4, 2)
        rows = values if heads is None else gguf_llama.interleave(values, heads)
        assert np.array_equal(reference.quants.dequantize(tensor.data, tensor.tensor_type), rows.numpy()), name


def test_names_are_those_of_ggufs_tensor_map() -> None:
    theirs = reference.get_tensor_name_map(reference.MODEL_ARCH.LLAMA, 2)
    for hf, ours in gguf_llama.gguf_names(2).items():
        assert theirs.get_name(hf, try_suffixes=(".weight", ".bias")) == ours


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
        "ffn_up": "Q8_0",
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
    assert reference.GGMLQuantizationType(gguf._exact_float(values)).name == name


def test_rows_of_a_head_are_interleaved_for_llama_cpps_rope() -> None:
    rows = torch.tensor([0, 1, 10, 11, 20, 21, 30, 31])  # 2 heads: a0 a1 b0 b1
    assert gguf_llama.interleave(rows, 2).tolist() == [0, 10, 1, 11, 20, 30, 21, 31]
    assert torch.equal(gguf_llama.deinterleave(gguf_llama.interleave(rows, 2), 2), rows)


def test_llama3_rope_factors_follow_transformers(tiny_model_dir: Path) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    }
    config = {**read_json(tiny_model_dir / "config.json"), "rope_parameters": rope}
    plain = {**config, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}
    scaled, unscaled = (LlamaRotaryEmbedding(LlamaConfig(**c)).inv_freq for c in (config, plain))
    factors = gguf_llama.rope_freqs(config)
    assert factors is not None
    torch.testing.assert_close(factors, unscaled / scaled, rtol=1e-5, atol=0)  # float32 against double
    assert gguf_llama.rope_freqs(plain) is None


@pytest.mark.parametrize(
    ("grid", "shape", "line"),
    [
        ("w4g32-asym", (64, 64), "no integer zeros exactly (grid w4g32-asym); train on w4g32"),
        ("w4g16", (64, 64), "blocks of 32 columns, which groups of 16 do not fill; train on w4g32"),
        ("w4g48", (64, 96), "groups of 48 do not fill; train on w4g32"),
        ("w8", (64, 80), "groups of 80 do not fill; skip this layer"),
    ],
)
def test_grids_that_blocks_cannot_follow_are_refused_with_a_remedy(
    grid: str, shape: tuple[int, int], line: str
) -> None:
    assert line in str(gguf.carries(Grid.parse(grid), shape))


@pytest.mark.parametrize("grid", ["w2g32", "w3g64", "w4g32", "w4", "w4g128-fp16", "w5", "w8g32"])
def test_symmetric_grids_are_carried(grid: str) -> None:
    assert gguf.carries(Grid.parse(grid), (64, 256)) is None


@pytest.mark.parametrize(
    ("config", "line"),
    [
        (
            {"architectures": ["Qwen2ForCausalLM"]},
            "architecture Qwen2ForCausalLM: GGUF export knows LlamaForCausalLM only",
        ),
        ({"hidden_act": "gelu"}, "hidden_act gelu"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "GGUF export carries rope_type default"),
        ({"rope_scaling": {"type": "dynamic"}, "rope_parameters": None}, "GGUF export carries rope_type default"),
        ({"num_hidden_layers": 3}, "model.layers.2.input_layernorm.weight: missing"),
        ({"num_hidden_layers": 1}, "model.layers.1.input_layernorm.weight: llama.cpp's Llama has no such tensor"),
        ({"tie_word_embeddings": False}, "lm_head.weight: missing"),
        ({"attention_bias": True}, "model.layers.0.self_attn.k_proj.bias: missing"),
        ({"num_attention_heads": 8}, "model.layers.0.self_attn.q_proj.weight: 256 rows, but config.json says 512"),
        ({"vocab_size": 300}, "model.embed_tokens.weight: 448 rows, but config.json says 300"),
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
    out = tmp_path / "x.gguf"
    out.write_bytes(b"previous")
    checkpoint = fuse(tiny_model_dir, w4)

    def stop(name: str) -> FusedTensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gguf.write(replace(checkpoint, tensors=Lazy(checkpoint.specs, stop)), out)
    assert [p.name for p in tmp_path.iterdir()] == ["x.gguf"] and out.read_bytes() == b"previous"


def test_a_place_that_cannot_be_written_is_one_line(tiny_model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "x.gguf", tmp_path / "x.bin"):
        with pytest.raises(LrqatError, match=str(out)):
            gguf.write(fuse(tiny_model_dir, w4), out)


def test_codes_that_the_grid_does_not_have_are_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    checkpoint = fuse(tiny_model_dir, w4)
    bad = Lazy(checkpoint.specs, lambda n: replace(checkpoint.tensors[n], codes_OI=checkpoint.tensors[n].codes_OI + 1))
    with pytest.raises(LrqatError, match="16 is no code of grid w4g32"):
        gguf.write(replace(checkpoint, tensors=bad), tmp_path / "x.gguf")
    assert not any(tmp_path.iterdir())


def test_metadata_is_what_llama_cpps_converter_writes(tiny_model_dir: Path, exported: Path) -> None:
    metadata = GgufFile(exported).metadata
    config = json.loads((tiny_model_dir / "config.json").read_text())
    assert metadata["general.architecture"] == "llama" and metadata["general.file_type"] == 7  # mostly Q8_0
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


def _read_all(path: Path) -> None:
    for _ in gguf.read(path).values():
        pass


@pytest.mark.parametrize("cut", [0, 3, 4, 8, 20, 24, 100, 5000, -100_000, -1])
def test_a_truncated_file_is_one_line(exported: Path, tmp_path: Path, cut: int) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(exported.read_bytes()[:cut])
    with pytest.raises(LrqatError, match=r"^[^\n]*cut\.gguf[^\n]*$"):
        gguf.read(path)


@pytest.mark.parametrize(
    ("at", "content", "line"),
    [
        (8, 2**60, "claims 1152921504606846976 tensors"),
        (16, 2**60, "claims 1152921504606846976 metadata pairs"),
        (24, 2**60, "claims 1152921504606846976 bytes of a string"),
    ],
)
def test_absurd_counts_are_refused_before_anything_is_allocated(
    exported: Path, tmp_path: Path, at: int, content: int, line: str
) -> None:
    data = bytearray(exported.read_bytes())
    data[at : at + 8] = content.to_bytes(8, "little")
    (tmp_path / "x.gguf").write_bytes(data)
    with pytest.raises(LrqatError, match=line):
        gguf.read(tmp_path / "x.gguf")


def test_an_array_that_claims_more_than_the_file_is_refused(tmp_path: Path) -> None:
    key, array = b"k", (9).to_bytes(4, "little") + (0).to_bytes(4, "little") + (2**60).to_bytes(8, "little")
    counts = (0).to_bytes(8, "little") + (1).to_bytes(8, "little")
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF\x03\x00\x00\x00" + counts + (1).to_bytes(8, "little") + key + array)
    with pytest.raises(LrqatError, match="claims 1152921504606846976 array values where 0 bytes are left"):
        GgufFile(path)


def test_damaged_headers_give_one_line_or_a_whole_read_never_another_error(exported: Path, tmp_path: Path) -> None:
    data, path, dice = exported.read_bytes(), tmp_path / "x.gguf", random.Random(0)
    header = min(info.offset for info in GgufFile(exported).tensors.values())
    places = [dice.randrange(header) for _ in range(60)] + [dice.randrange(header - 2500, header) for _ in range(60)]
    refused = 0
    for at in places:
        broken = bytearray(data)
        broken[at] = dice.choice([0, 1, 255, 128, broken[at] ^ 1 << dice.randrange(8)])
        path.write_bytes(broken)
        try:
            _read_all(path)
        except LrqatError as error:
            refused += 1
            assert str(path) in str(error) and "\n" not in str(error)
    assert refused > 20
