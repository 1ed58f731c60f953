"""GGUF, read back: codes and parts of every block, HF names and row order, each tensor when asked for.

What lrqat wrote is read, and what others wrote in the types of `exporters/gguf_blocks.py` on the architectures of
`exporters/gguf_arch.py`. As in llama.cpp, each tensor begins where the one before it ends, padded to the alignment: a
type or shape that is not the writer's own contradicts that. (Some files call blocks of 128 columns Q2_0, with the
same number as ggml's blocks of 64: they are refused here.)

Refuses: other types, architectures and tensor names, missing weights, tensors that overlap or leave holes, codes and
scales that their grid does not have.
"""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from exporters import gguf_arch
from exporters.gguf_blocks import BLOCK_TYPES, unpack
from lrqat.errors import LrqatError
from lrqat.fused import FusedCheckpoint, FusedSpec, FusedTensor, Lazy, Spec
from lrqat.gguf_file import ALIGNMENT, GgufFile
from lrqat.ranges import row_tiles

F32, F16, BF16 = 0, 1, 30  # ggml types
FLOATS = {F32: torch.float32, F16: torch.float16, BF16: torch.bfloat16}
TIED = "output.weight"  # absent when the embedding is the head too


def read(path: Path) -> FusedCheckpoint:
    """Decode a GGUF file; without config.json and tokenizer files, which it does not hold as such."""
    file = GgufFile(path)
    architecture = gguf_arch.architecture_of(file)
    names = architecture.names()
    if strange := sorted(file.tensors.keys() - {*names, *gguf_arch.EXTRA_TENSORS}):
        raise LrqatError(f"{path}: tensor {strange[0]!r} is none of {architecture.family.name}'s; export it again")
    needed = {name for name in names if name.endswith(".weight")} - {TIED}
    if missing := sorted(needed - file.tensors.keys()):
        raise LrqatError(f"{path}: tensor {missing[0]!r} is missing; copy or export it again")
    _check_places(file)
    places: dict[str, tuple[str, int]] = {}
    specs: dict[str, FusedSpec] = {}
    dense: dict[str, Spec] = {}
    for gguf, experts in names.items():
        if gguf not in file.tensors:
            continue
        info, stacked = file.tensors[gguf], gguf_arch.is_stack(gguf)
        quantized = info.ggml_type in BLOCK_TYPES
        if len(info.shape) - stacked not in ((2,) if quantized or stacked else (1, 2)) or (
            stacked and info.shape[0] != len(experts)
        ):
            raise LrqatError(f"{path}: {gguf} has shape {list(info.shape)}; export it again")
        for index, hf in enumerate(experts):
            places[hf], shape = (gguf, index), info.shape[stacked:]
            if quantized:
                specs[hf] = FusedSpec(BLOCK_TYPES[info.ggml_type].grid, (shape[0], shape[1]))
            else:
                dtype = torch.float32 if architecture.shift(hf) else FLOATS[info.ggml_type]
                dense[hf] = Spec(dtype, shape)

    def fused(name: str) -> FusedTensor:
        found = _blocks(file, *places[name], specs[name].shape)
        parts = {part: architecture.to_hf(name, values) for part, values in found.parts.items()}
        found = FusedTensor(architecture.to_hf(name, found.codes_OI), parts, found.grid)
        try:
            found.check(name)
        except LrqatError as error:
            raise LrqatError(f"{path}: {error}; copy or export it again") from None
        return found

    def values(name: str) -> Tensor:
        gguf, index = places[name]
        shape, stored = dense[name].shape, FLOATS[file.tensors[gguf].ggml_type]
        nbytes = math.prod(shape) * stored.itemsize
        data = torch.frombuffer(file.read(gguf, nbytes, index * nbytes), dtype=stored).view(shape)
        shift = architecture.shift(name)
        return architecture.to_hf(name, data.float() - shift if shift else data)

    return FusedCheckpoint(Lazy(specs, fused), Lazy(dense, values), specs, dense, {}, {})


def _blocks(file: GgufFile, name: str, index: int, shape: tuple[int, int]) -> FusedTensor:
    """The `index`-th matrix of a tensor (0, or the expert in a stack), in GGUF's row order."""
    kind, (rows, columns) = BLOCK_TYPES[file.tensors[name].ggml_type], shape
    width = kind.row_bytes(columns)
    codes_OI = torch.empty(shape, dtype=torch.uint8)
    parts = {part: torch.empty(wire.shape, dtype=wire.dtype) for part, wire in kind.grid.parts(*shape).items()}
    for tile in row_tiles(*shape):
        count = tile.stop - tile.start
        data = file.read(name, count * width, (index * rows + tile.start) * width)
        found = unpack(torch.frombuffer(data, dtype=torch.uint8).view(count, width), kind)
        codes_OI[tile] = found.codes_OI
        for part, values in found.parts.items():
            parts[part][tile] = values
    return FusedTensor(codes_OI, parts, kind.grid)


def _check_places(file: GgufFile) -> None:
    """Refuse tensors that are not whole, or do not lie one after the other."""
    alignment = file.metadata.get("general.alignment", ALIGNMENT)
    sizes = {name: file.check(name, _nbytes(file, name)) for name in file.tensors}
    for (name, info), (following, after) in pairwise(file.tensors.items()):
        end = info.offset + sizes[name]
        if after.offset != end + -end % alignment:
            raise LrqatError(f"{file.path}: {following} does not begin where {name} ends; copy or export it again")


def _nbytes(file: GgufFile, name: str) -> int:
    """Bytes of a tensor; refuses types that lrqat does not know, and rows that blocks do not fill."""
    info = file.tensors[name]
    if not info.shape or 0 in info.shape:
        raise LrqatError(f"{file.path}: {name} has shape {list(info.shape)}; export it again")
    columns = info.shape[-1]
    if info.ggml_type in FLOATS:
        return math.prod(info.shape) * FLOATS[info.ggml_type].itemsize
    kind = BLOCK_TYPES.get(info.ggml_type)
    if kind is None or columns % kind.columns:
        known = ", ".join(["F32, F16, BF16", *(k.name for k in BLOCK_TYPES.values())])
        raise LrqatError(
            f"{file.path}: {name} has ggml type {info.ggml_type} and {columns} columns; lrqat reads {known} in whole "
            "blocks"
        )
    return math.prod(info.shape[:-1]) * kind.row_bytes(columns)
