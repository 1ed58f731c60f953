"""Dense: the dequantized weights as an ordinary Hugging Face directory, in float32.

    X.weight   float32 [O, I]   s * (q - z), exact

What transformers, and vLLM without quantization, load: the reference of parity checks, and a way into every
tool that knows no integer format. It is as large as the float32 model.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lrqat.fused import FusedCheckpoint, Lazy, SafetensorsDirectory, fresh_directory, read_json
from lrqat.safestream import Entry, write_model


def write(checkpoint: FusedCheckpoint, out_dir: Path) -> Path:
    """Write the directory `out_dir`, tensor by tensor."""

    def quantized(name: str) -> Tensor:
        return checkpoint.tensors[name].dequantize()

    def dense(name: str) -> Tensor:
        return checkpoint.dense[name].float()

    shapes: dict[str, tuple[tuple[int, ...], Callable[[str], Tensor]]] = {
        **{name: (spec.shape, quantized) for name, spec in checkpoint.specs.items()},
        **{name: (spec.shape, dense) for name, spec in checkpoint.dense_specs.items()},
    }
    entries = [Entry(name, torch.float32, shape, partial(make, name)) for name, (shape, make) in shapes.items()]
    with fresh_directory(Path(out_dir)) as fresh:
        write_model(fresh, entries, {"format": "pt"})
        checkpoint.write_assets(fresh, dtype="float32")
    return Path(out_dir)


def read(path: Path) -> FusedCheckpoint:
    """The tensors by HF name; none of them is quantized."""
    files = SafetensorsDirectory(Path(path))
    return FusedCheckpoint({}, Lazy(files.specs, files.get), {}, files.specs, read_json(Path(path) / "config.json"), {})
