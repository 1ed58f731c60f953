"""GGUF: one file that llama.cpp and everything built on it runs.

Each quantized weight becomes the block type that holds its own grid exactly: `exporters/gguf_carry.py` says which,
`exporters/gguf_blocks.py` has the bytes. Codes are copied; scales are already what the wire stores.

Dense matrices keep their values in the first of F16, BF16, F32 that is exact: llama.cpp rounds activations to the type
of the weight they meet, so F16 (11 significant bits) comes before BF16 (8). Vectors are F32. Nothing is rounded.

`write(..., dequantized=True)` writes every tensor in F32: the reference for parity checks of everything but the blocks.

Source: ggml-org/ggml docs/gguf.md; exporters/gguf_arch.py for the architecture, gguf_tokenizer.py for the tokenizer.

Refuses: grids that no type holds, architectures and tokenizers that are not in those modules: all of it before
anything is written.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exporters import gguf_arch
from exporters.gguf_arch import Architecture
from exporters.gguf_blocks import BLOCK_TYPES, BlockType, pack
from exporters.gguf_carry import block_type, carries, restate
from exporters.gguf_read import BF16, F16, F32, FLOATS, read
from exporters.gguf_tokenizer import TokenizerFields, tokenizer_fields
from lrqat.errors import LrqatError
from lrqat.fused import FusedCheckpoint, FusedTensor
from lrqat.gguf_file import GgufFile
from lrqat.ranges import row_tiles

__all__ = ["block_type", "carries", "read", "write"]

FILE_TYPES = {F32: 0, F16: 1, BF16: 32, **{number: kind.file_type for number, kind in BLOCK_TYPES.items()}}
QUANTIZATION_VERSION = 2
QUANTIZED_BY = "general.quantized_by"
CERTIFICATES = (".certificate.json", ".http.certificate.json")  # in place of .gguf: what serve/ says of a file
ROWS_AT_ONCE = 1024  # of a dense matrix
CODES_AT_ONCE = 1 << 20  # bytes that a core's cache holds; the fewer calls, the better


@dataclass(frozen=True)
class _Entry:
    """One tensor to be written: GGUF name, shape, ggml type, bytes; its pieces (one, or one an expert) in tiles."""

    name: str
    shape: tuple[int, ...]
    ggml_type: int
    nbytes: int
    pieces: Sequence[Callable[[], Iterator[Tensor]]]


def write(checkpoint: FusedCheckpoint, out: Path, *, dequantized: bool = False) -> Path:
    """Write `out`, tensor by tensor; it appears under its name only when complete.

    Args:
        checkpoint: what training handed over.
        out: path of the file, ending in .gguf.
        dequantized: write the F32 reference instead.

    Raises:
        LrqatError: GGUF cannot hold this model exactly, or the file cannot be written.
    """
    out = checked_name(out)
    tokenizer = check(checkpoint, dequantized=dequantized)
    entries = _entries(checkpoint, dequantized)
    unfinished = out.with_name(out.name + ".partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _stream(unfinished, checkpoint, entries, tokenizer)
        put(unfinished, out)
    except OSError as error:
        raise LrqatError(f"{out}: cannot be written ({error}); free some space or choose another --out") from None
    finally:
        with suppress(OSError):
            unfinished.unlink()
    return out


def checked_name(out: Path) -> Path:
    """`out`, unless it is no .gguf file, or one that is not ours to replace."""
    out = Path(out)
    if out.suffix != ".gguf":
        raise LrqatError(f"{out}: expected a file name that ends in .gguf")
    if out.is_dir():
        raise LrqatError(f"{out}: is a directory; name a file that ends in .gguf")
    if out.exists() and not _ours(out):
        raise LrqatError(f"{out}: exists, and is not an export of lrqat; name another --out")
    return out


def put(unfinished: Path, out: Path) -> None:
    """Give a complete file its name, and take away the certificates of the file that had it."""
    for kind in CERTIFICATES:
        out.with_suffix(kind).unlink(missing_ok=True)
    os.replace(unfinished, out)


def check(checkpoint: FusedCheckpoint, *, dequantized: bool = False) -> TokenizerFields:
    """Refuse what cannot be written, from names, shapes, grids, config and tokenizer; returns the last."""
    gguf_arch.check(checkpoint.hf_config, _shapes(checkpoint), checkpoint.tied_head)
    if not dequantized:
        for name, spec in checkpoint.specs.items():
            block_type(spec.grid, spec.shape, name)
        for gguf, names in gguf_arch.architecture(checkpoint.hf_config).names().items():
            if gguf_arch.is_stack(gguf) and any(name in checkpoint.specs for name in names):
                _common_type(checkpoint, names)
    return tokenizer_fields(checkpoint.assets, checkpoint.hf_config)


def _ours(path: Path) -> bool:
    """An earlier export of ours, which may be replaced."""
    try:
        return GgufFile(path).metadata.get(QUANTIZED_BY) == "lrqat"
    except LrqatError:
        return False


def _shapes(checkpoint: FusedCheckpoint) -> dict[str, tuple[int, ...]]:
    dense = {name: spec.shape for name, spec in checkpoint.dense_specs.items()}
    return {**dense, **{name: spec.shape for name, spec in checkpoint.specs.items()}}


def _entries(checkpoint: FusedCheckpoint, dequantized: bool) -> list[_Entry]:
    """What the file will hold, in the order of the model."""
    architecture, shapes = gguf_arch.architecture(checkpoint.hf_config), _shapes(checkpoint)
    entries = []
    for gguf, names in architecture.names().items():
        if names[0] not in shapes:
            continue
        shape = (len(names), *shapes[names[0]]) if gguf_arch.is_stack(gguf) else shapes[names[0]]
        if not dequantized and any(name in checkpoint.specs for name in names):
            kind = _common_type(checkpoint, names)
            nbytes = math.prod(shape[:-1]) * kind.row_bytes(shape[-1])
            packed = [partial(_packed, checkpoint, architecture, kind, name) for name in names]
            entries.append(_Entry(gguf, shape, kind.ggml_type, nbytes, packed))
        else:
            vector = len(shape) == 1
            exact = F32 if dequantized or vector else _exact_float(checkpoint.dense[name] for name in names)
            values = [partial(_values, checkpoint, architecture, FLOATS[exact], name) for name in names]
            entries.append(_float_entry(gguf, shape, exact, values))
    for name, factors in gguf_arch.extra_tensors(checkpoint.hf_config).items():
        entries.append(_float_entry(name, tuple(factors.shape), F32, [partial(iter, [factors.to(torch.float32)])]))
    return entries


def _common_type(checkpoint: FusedCheckpoint, names: Sequence[str]) -> BlockType:
    """The block type of a weight, or of all experts of a stack."""
    specs = [checkpoint.specs.get(name) for name in names]
    found = [block_type(spec.grid, spec.shape, name) if spec else None for name, spec in zip(names, specs, strict=True)]
    if found[0] is None or any(kind is not found[0] for kind in found):
        raise LrqatError(f"{names[0]}: GGUF stores its {len(names)} experts in one type; use one grid for all of them")
    return found[0]


def _ordered(checkpoint: FusedCheckpoint, architecture: Architecture, name: str) -> FusedTensor:
    """One quantized weight in GGUF's row order."""
    fused = checkpoint.tensors[name]
    fused.check(name)
    parts = {part: architecture.to_gguf(name, values) for part, values in fused.parts.items()}
    return FusedTensor(architecture.to_gguf(name, fused.codes_OI), parts, fused.grid)


def _packed(checkpoint: FusedCheckpoint, architecture: Architecture, kind: BlockType, name: str) -> Iterator[Tensor]:
    """Bytes of one quantized weight: uint8 [rows, bytes of a row]."""
    fused = _ordered(checkpoint, architecture, name)
    rows, columns = fused.codes_OI.shape
    for some in row_tiles(rows, columns, CODES_AT_ONCE):
        yield pack(restate(fused.rows(some), kind), kind)


def _values(checkpoint: FusedCheckpoint, architecture: Architecture, dtype: torch.dtype, name: str) -> Iterator[Tensor]:
    """Values of one weight, quantized or dense, in GGUF's row order."""
    if name in checkpoint.specs:
        fused = _ordered(checkpoint, architecture, name)
        for rows in row_tiles(*fused.codes_OI.shape):
            yield fused.rows(rows).dequantize().to(dtype)
    else:
        shift = architecture.shift(name)
        for values in torch.split(architecture.to_gguf(name, checkpoint.dense[name]), ROWS_AT_ONCE):
            yield (values.to(torch.float32) + shift if shift else values).to(dtype)


def _float_entry(
    name: str, shape: tuple[int, ...], ggml_type: int, pieces: Sequence[Callable[[], Iterator[Tensor]]]
) -> _Entry:
    return _Entry(name, shape, ggml_type, math.prod(shape) * FLOATS[ggml_type].itemsize, pieces)


def _exact_float(matrices: Iterable[Tensor]) -> int:
    """The first of F16, BF16, F32 that holds every value."""
    fitting = [F16, BF16]
    for matrix in matrices:
        for rows in torch.split(matrix, ROWS_AT_ONCE):
            fitting = [kind for kind in fitting if torch.equal(rows.to(FLOATS[kind]).to(rows.dtype), rows)]
    return [*fitting, F32][0]


def _stream(path: Path, checkpoint: FusedCheckpoint, entries: list[_Entry], tokenizer: TokenizerFields) -> None:
    """Header, metadata and tensor table first, then one tensor after the other."""
    import numpy as np
    from gguf import GGUFWriter

    weights: dict[int, int] = {}
    for entry in entries:
        weights[entry.ggml_type] = weights.get(entry.ggml_type, 0) + entry.nbytes * (entry.ggml_type in BLOCK_TYPES)
    mostly = max(weights, key=lambda ggml_type: (weights[ggml_type], ggml_type != F32))
    architecture = gguf_arch.architecture(checkpoint.hf_config)
    writer = GGUFWriter(path, architecture.family.name)
    try:
        writer.add_type("model")
        writer.add_string(QUANTIZED_BY, "lrqat")
        writer.add_name(tokenizer.model_name(Path(path.stem).stem))  # of NAME.gguf.partial
        writer.add_file_type(FILE_TYPES[mostly])
        writer.add_quantization_version(QUANTIZATION_VERSION)
        gguf_arch.add_metadata(writer, checkpoint.hf_config)
        tokenizer.add_to(writer)
        for entry in entries:
            number: Any = entry.ggml_type  # of the enum `gguf.GGMLQuantizationType`, which has no Q2_0 yet
            writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), entry.nbytes, raw_dtype=number)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout is not None
        file = writer.fout[0]
        writer.write_padding(file, file.tell())
        for entry in entries:
            for piece in entry.pieces:
                for tile in piece():
                    tile.detach().cpu().contiguous().view(torch.uint8).numpy().tofile(file)
            writer.write_padding(file, entry.nbytes)
        writer.flush()
        os.fsync(file.fileno())
    finally:
        writer.close()
