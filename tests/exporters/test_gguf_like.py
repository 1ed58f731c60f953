"""`--like FILE.gguf`: a model gets the grids of a file, and its export the file's types."""

from __future__ import annotations

from pathlib import Path

import gguf as reference
import pytest
from test_gguf_arch import one

import exporters.cli
import lrqat.cli
from exporters.gguf_like import grids_like
from exporters.gguf_read import FLOATS
from lrqat.errors import LrqatError
from lrqat.gguf_file import GgufFile
from lrqat.jsonfile import read_json

SECOND_DOWN = r"re:.*layers\.1\.(mlp|block_sparse_moe)\.(experts\.\d+\.)?(down_proj|w2)$=q8_0"
FIRST_OUT = r"re:.*layers\.0\.self_attn\.o_proj$=dense"
MIXED = ["--grid", "q4_0", "--override", SECOND_DOWN, FIRST_OUT, "embed_tokens=q8_0"]


def made(model: Path, path: Path, *words: str) -> dict[str, tuple[tuple[int, ...], int]]:
    """Round a model, export it; shapes and types of the file."""
    run = path.with_suffix("")
    assert lrqat.cli.main(["ptq", str(model), *words, "--out", str(run), "--json"]) == 0
    assert exporters.cli.main([str(run), "--format", "gguf", "--out", str(path)]) == 0
    return {name: (info.shape, info.ggml_type) for name, info in GgufFile(path).tensors.items()}


@pytest.mark.parametrize("name", ["llama", "qwen2", "phi3", "mixtral", "qwen3-moe"])
def test_what_is_made_like_a_file_has_its_types(name: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    model = one(name, tiny_model_dir, tmp_path)
    theirs = made(model, tmp_path / "mixed.gguf", *MIXED)
    kinds = reference.GGMLQuantizationType
    assert {kind for _, kind in theirs.values()} >= {kinds.Q4_0, kinds.Q8_0}
    assert theirs["token_embd.weight"][1] == kinds.Q8_0
    assert theirs["blk.0.attn_output.weight"][1] in FLOATS
    assert made(model, tmp_path / "ours.gguf", "--like", str(tmp_path / "mixed.gguf")) == theirs


def test_the_overrides_name_no_more_than_they_must(tiny_model_dir: Path, tmp_path: Path) -> None:
    made(tiny_model_dir, tmp_path / "mixed.gguf", *MIXED)
    assert grids_like(tmp_path / "mixed.gguf", read_json(tiny_model_dir / "config.json")) == (
        "w4g32-fp16",
        [
            r"re:model\.embed_tokens$=w8g32-fp16",
            r"re:model\.layers\.0\.self_attn\.o_proj$=dense",
            r"re:model\.layers\.1\.mlp\.down_proj$=w8g32-fp16",
        ],
    )


def test_a_users_own_override_comes_last(tiny_model_dir: Path, tmp_path: Path) -> None:
    theirs = made(tiny_model_dir, tmp_path / "mixed.gguf", *MIXED)
    words = ["--like", str(tmp_path / "mixed.gguf"), "--override", "layers.1.mlp=q5_0"]
    ours = made(tiny_model_dir, tmp_path / "ours.gguf", *words)
    changed = {name for name in theirs if theirs[name] != ours[name]}
    assert changed == {f"blk.1.ffn_{part}.weight" for part in ("gate", "up", "down")}


def test_training_and_planning_take_it_too(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(tmp_path / "mixed.gguf")
    theirs = made(tiny_model_dir, Path(file), *MIXED)
    assert lrqat.cli.main(["plan", str(tiny_model_dir), "--like", file]) in (0, 1)
    assert "2 weights w8g32-fp16, 12 weights w4g32-fp16; 1 skipped" in capsys.readouterr().out
    size = ["--steps", "1", "--batch-size", "1", "--seq-len", "16", "--rank", "2"]
    words = ["--like", file, "--for", "gguf", *size, "--out", str(tmp_path / "run")]
    assert lrqat.cli.main(["train", str(tiny_model_dir), *words]) == 0
    ours = tmp_path / "ours.gguf"
    assert exporters.cli.main([str(tmp_path / "run"), "--format", "gguf", "--out", str(ours)]) == 0
    assert {name: (info.shape, info.ggml_type) for name, info in GgufFile(ours).tensors.items()} == theirs
    assert lrqat.cli.main(["train", str(tmp_path / "run"), "--like", file, "--out", str(tmp_path / "again")]) == 2
    assert "is on its grid already" in capsys.readouterr().err


def test_a_file_of_another_model_or_of_floats_is_refused(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mixed.gguf"
    made(tiny_model_dir, file, *MIXED)
    other = one("qwen2", tiny_model_dir, tmp_path)
    with pytest.raises(LrqatError, match=r"llama, 2 layers, 4 and 2 heads, the model has qwen2, 2 layers"):
        grids_like(file, read_json(other / "config.json"))
    run = str(tmp_path / "mixed")
    assert exporters.cli.main([run, "--format", "gguf", "--reference", "--out", str(tmp_path / "full.gguf")]) == 0
    with pytest.raises(LrqatError, match="all its layers are floats"):
        grids_like(tmp_path / "full.gguf", read_json(tiny_model_dir / "config.json"))
    capsys.readouterr()
    words = ["ptq", str(tiny_model_dir), "--like", str(file), "--grid", "w4", "--out", str(tmp_path / "run")]
    assert lrqat.cli.main(words) == 2
    assert "--like gives every weight its grid; leave one of them out" in capsys.readouterr().err


def test_a_type_without_a_grid_is_refused_by_name(tiny_model_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "mixed.gguf"
    made(tiny_model_dir, file, *MIXED)
    data = file.read_bytes()
    name = b"blk.1.ffn_up.weight"
    at = data.index(name) + len(name) + 4 + 2 * 8
    iq3_s = int(reference.GGMLQuantizationType.IQ3_S).to_bytes(4, "little")
    file.write_bytes(data[:at] + iq3_s + data[at + 4 :])
    with pytest.raises(LrqatError, match=r"blk\.1\.ffn_up\.weight has ggml type 21; lrqat trains on Q4_0, "):
        grids_like(file, read_json(tiny_model_dir / "config.json"))
