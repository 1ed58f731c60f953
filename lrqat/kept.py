"""Work that a run has finished, in one safetensors file under a key, so that `--resume` does not do it again.

    NAME            a tensor
    NAME#PART       parts of the grid that were found for a weight

The key identifies model, data and settings; it stands in the file's metadata.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from lrqat.errors import LrqatError
from lrqat.fused import open_safetensors
from lrqat.safestream import Entry, write_file


def layer_path(folder: Path, number: int) -> Path:
    """Of a decoder layer's file."""
    return folder / f"layer_{number:04d}.safetensors"


def write(path: Path, tensors: Mapping[str, Tensor], key: str, **more: str) -> None:
    """Write tensors under a key, with more metadata; the file appears when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = [Entry(n, t.dtype, tuple(t.shape), partial(tensors.__getitem__, n)) for n, t in tensors.items()]
    write_file(path, entries, {"format": "pt", "key": key, **more})


@contextmanager
def opened(path: Path, key: str) -> Iterator[Any]:
    """The file; refuses one that was written under another key."""
    with open_safetensors(path) as file:
        if (file.metadata() or {}).get("key") != key:
            raise LrqatError(f"{path}: was written by a run with other settings; remove it, or start a new run")
        yield file


def named_parts(parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Parts by weight, as NAME#PART."""
    return {f"{name}#{part}": values for name, found in parts.items() for part, values in found.items()}


def content(file: Any) -> Iterator[tuple[str, str, Tensor]]:
    """(name, part or "", tensor) of all that a file holds."""
    for name in list(file.keys()):
        weight, _, part = name.partition("#")
        yield weight, part, file.get_tensor(name)
