"""The wire formats by name, and which one a path holds."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from exporters import awq, compressed_tensors, gguf, gguf_arch, gptq
from lrqat.errors import LrqatError
from lrqat.fused import FusedCheckpoint, read_json

FORMATS: dict[str, ModuleType] = {
    "gguf": gguf,
    "gptq": gptq,
    "awq": awq,
    "compressed-tensors": compressed_tensors,
}


def detect(path: Path) -> str:
    """The format of an exported model: a .gguf file, or what config.json's quantization_config says."""
    path = Path(path)
    if not path.exists():
        raise LrqatError(f"{path}: no such file or directory; write it with lrqat-export")
    if path.is_file():
        return "gguf"
    if not (path / "config.json").is_file():
        raise LrqatError(f"{path}: no config.json; expected a .gguf file or a directory that lrqat-export wrote")
    config = read_json(path / "config.json").get("quantization_config")
    method = config.get("quant_method") if isinstance(config, dict) else None
    if method not in FORMATS:
        raise LrqatError(
            f"{path}: config.json declares {'no quantization' if method is None else repr(method)}; "
            f"expected {', '.join(FORMATS)} as lrqat-export writes them"
        )
    return str(method)


def read(path: Path) -> FusedCheckpoint:
    """Codes and parts of an exported model, lazily, by its format's own reader."""
    checkpoint: FusedCheckpoint = FORMATS[detect(path)].read(Path(path))
    return checkpoint


def as_stored(checkpoint: FusedCheckpoint, form: str) -> FusedCheckpoint:
    """What an export in this format is compared with: GGUF adds 1 to Gemma's norm weights before it stores them."""
    return gguf_arch.as_stored(checkpoint) if form == "gguf" else checkpoint
