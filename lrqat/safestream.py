"""Write safetensors tensor by tensor: memory is bounded by the largest tensor, never by the model.

`safetensors.torch.save_file` wants every tensor at once; the format does not:

    u64 little endian   N, bytes of the header
    N bytes             JSON: name -> {dtype, shape, data_offsets [begin, end)}, "__metadata__"; padded with
                        spaces so that the data starts at a multiple of 8
    the data            tensors, contiguous, row-major, little endian, in the order of their offsets

Source: huggingface/safetensors README. Files appear under their final name only when complete.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

DTYPE_NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

ENTRY_BYTES = 200  # of a header for one tensor, beside its name: three numbers of 20 digits, a shape, punctuation


@dataclass(frozen=True)
class Entry:
    """One tensor to be written: its name, dtype and shape now, its values when their turn comes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor on disk."""
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize


def write_model(
    directory: Path, entries: Sequence[Entry], metadata: dict[str, str], max_shard_bytes: int = 5 * 10**9
) -> list[Path]:
    """Write `model.safetensors`, or numbered shards with `model.safetensors.index.json`, as transformers does."""
    shards: list[list[Entry]] = [[]]
    used = 0
    for entry in entries:
        if shards[-1] and used + entry.nbytes > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(entry)
        used += entry.nbytes
    if len(shards) == 1:
        path = directory / "model.safetensors"
        write_file(path, shards[0], metadata)
        return [path]
    paths = [directory / f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for path, shard in zip(paths, shards, strict=True):
        write_file(path, shard, metadata)
    index = {
        "metadata": {"total_size": sum(entry.nbytes for entry in entries)},
        "weight_map": {entry.name: path.name for path, shard in zip(paths, shards, strict=True) for entry in shard},
    }
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return paths


def write_file(path: Path, entries: Sequence[Entry], metadata: dict[str, str]) -> None:
    """Write one safetensors file; `path` exists only if every tensor was written."""
    header: dict[str, object] = {"__metadata__": metadata}
    offset = 0
    for entry in entries:
        if entry.name in header:
            raise ValueError(f"{path}: tensor {entry.name} occurs twice")
        header[entry.name] = {
            "dtype": DTYPE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.nbytes],
        }
        offset += entry.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            file.write(len(text).to_bytes(8, "little"))
            file.write(text)
            for entry in entries:
                tensor = entry.make()
                if tensor.dtype != entry.dtype or tuple(tensor.shape) != entry.shape:
                    raise ValueError(
                        f"{path}: {entry.name} was announced as {entry.dtype} {entry.shape}, "
                        f"got {tensor.dtype} {tuple(tensor.shape)}"
                    )
                file.write(tensor_bytes(tensor))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise


class GrowingFile:
    """A safetensors file for tensors that become known one by one; use it in a `with`, and `finish` it.

    The header's place is left free and filled in last, padded with spaces as the format allows.

    Args:
        path: exists once `finish` has returned; what leaves the `with` before leaves nothing.
        names: as many tensors as there may be, with names at least as long.
    """

    def __init__(self, path: Path, names: Iterable[str]) -> None:
        self.path = path
        self.partial = path.with_name(path.name + ".partial")
        self.room = sum(len(json.dumps(name)) + ENTRY_BYTES for name in names) + ENTRY_BYTES
        self.room += -self.room % 8
        self.tensors: dict[str, tuple[torch.dtype, tuple[int, ...], int]] = {}  # and where each begins
        self.offset = 0
        self.file: Any = None

    def __enter__(self) -> GrowingFile:
        self.file = open(self.partial, "wb")
        self.file.seek(8 + self.room)
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        with suppress(OSError):
            self.partial.unlink()

    def add(self, name: str, tensor: Tensor) -> None:
        """Write a tensor now."""
        if name in self.tensors:
            raise ValueError(f"{self.path}: tensor {name} occurs twice")
        self.tensors[name] = (tensor.dtype, tuple(tensor.shape), self.offset)
        self.file.write(tensor_bytes(tensor))
        self.offset += tensor.nbytes

    def finish(self) -> None:
        """Write the header; the file gets its name."""
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        for name, (dtype, shape, begin) in self.tensors.items():
            end = begin + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        if len(text) > self.room:
            raise ValueError(f"{self.path}: {len(self.tensors)} tensors, more than were announced")
        self.file.seek(0)
        self.file.write(self.room.to_bytes(8, "little") + text + b" " * (self.room - len(text)))
        self.file.flush()
        os.fsync(self.file.fileno())
        self.partial.replace(self.path)

    def mapped(self) -> dict[str, Tensor]:
        """The tensors of the finished file, not to be written to.

        They lie in one shared map. A private one, as safetensors makes, Linux counts as memory to be had: it refuses
        files larger than all of it.
        """
        if not self.offset:
            return {name: self._view(torch.empty(0, dtype=torch.uint8), name) for name in self.tensors}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            bytes_N = torch.from_numpy(np.memmap(self.path, np.uint8, "r", 8 + self.room, (self.offset,)))
        return {name: self._view(bytes_N, name) for name in self.tensors}

    def _view(self, bytes_N: Tensor, name: str) -> Tensor:
        """A tensor in the map; a copy of one that does not begin at a multiple of its numbers' size."""
        dtype, shape, begin = self.tensors[name]
        part_N = bytes_N[begin : begin + math.prod(shape) * dtype.itemsize]
        return (part_N.clone() if begin % dtype.itemsize else part_N).view(dtype).view(shape)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The tensor's values as bytes, row-major, without a copy when it is contiguous on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if flat.stride() != (1,):  # one value may count as contiguous whatever its stride
        flat = flat.clone(memory_format=torch.contiguous_format)
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]
