"""GGUF: one file that llama.cpp and everything built on it runs.

Each quantized weight becomes the block type that holds its own grid exactly; its codes are copied and its scales are
already fp16 (`exporters/gguf_blocks.py` has the bytes):

    symmetric 2 to 4 bits -> Q4_0        groups of 32 columns or a multiple of it, or per channel
    symmetric 5 to 8 bits -> Q8_0        likewise

Dense matrices keep their values in the first of F16, BF16, F32 that is exact: llama.cpp rounds activations to the type
of the weight they meet, so F16 (11 significant bits) comes before BF16 (8). Vectors are F32. Nothing is rounded.

`write(..., dequantized=True)` writes every tensor in F32: the reference for parity checks of everything but the blocks.

Source: ggml-org/ggml docs/gguf.md; exporters/gguf_llama.py for the architecture, gguf_tokenizer.py for the tokenizer.

Refuses: asymmetric grids, groups that blocks of 32 cannot follow, architectures and tokenizers that are not in those
two modules: all of it before anything is written.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from exporters import gguf_llama as llama
from exporters.gguf_blocks import COLUMNS, Q4_0, Q8_0, block_type, pack, unpack
from exporters.gguf_tokenizer import TokenizerFields, tokenizer_fields
from exporters.refusal import Refusal
from lrqat.errors import LrqatError
from lrqat.fused import FusedCheckpoint, Lazy, Spec
from lrqat.gguf_file import GgufFile
from lrqat.grid import Grid

F32, F16, BF16 = 0, 1, 30  # ggml types
FILE_TYPES = {F32: 0, F16: 1, BF16: 32, Q4_0.ggml_type: Q4_0.file_type, Q8_0.ggml_type: Q8_0.file_type}
FLOATS = {F32: torch.float32, F16: torch.float16, BF16: torch.bfloat16}
BLOCKS = {kind.ggml_type: kind for kind in (Q4_0, Q8_0)}
QUANTIZATION_VERSION = 2
ROWS_AT_ONCE = 1024  # of a dense matrix, when its type is chosen


@dataclass(frozen=True)
class _Entry:
    """One tensor to be written: GGUF name, shape, ggml type, and its bytes ([rows, bytes] or values) when asked."""

    name: str
    shape: tuple[int, ...]
    ggml_type: int
    nbytes: int
    make: Callable[[], Tensor]


def carries(grid: Grid, shape: tuple[int, int], name: str = "weight") -> Refusal | None:
    """Why GGUF cannot hold this weight exactly, or None."""
    columns = shape[1]
    if not grid.symmetric:
        return Refusal(
            f"{name}: GGUF carries no integer zeros exactly (grid {grid})",
            f"train on {Grid(grid.bits, grid.group_size, True, grid.scale_precision)}",
        )
    group = grid.columns_per_group(columns, name)
    if group % COLUMNS:
        fitting = [g for g in (32, 64, 128) if columns % g == 0]
        remedy = f"train on {Grid(grid.bits, fitting[0], True, grid.scale_precision)}" if fitting else "skip this layer"
        return Refusal(f"{name}: GGUF stores blocks of {COLUMNS} columns, which groups of {group} do not fill", remedy)
    return None


def write(checkpoint: FusedCheckpoint, out: Path, *, dequantized: bool = False) -> Path:
    """Write `out`, tensor by tensor; it appears under its name only when complete.

    Args:
        checkpoint: what training handed over.
        out: path of the file, ending in .gguf.
        dequantized: write the F32 reference instead.

    Raises:
        LrqatError: GGUF cannot hold this model exactly, or the file cannot be written.
    """
    out = Path(out)
    if out.suffix != ".gguf":
        raise LrqatError(f"{out}: expected a file name that ends in .gguf")
    if out.is_dir():
        raise LrqatError(f"{out}: is a directory; name a file that ends in .gguf")
    shapes = _shapes(checkpoint)
    llama.check(checkpoint.hf_config, shapes, checkpoint.tied_head)
    if not dequantized:
        for name, spec in checkpoint.specs.items():
            if refusal := carries(spec.grid, spec.shape, name):
                raise LrqatError(str(refusal))
    tokenizer = tokenizer_fields(checkpoint.assets, checkpoint.hf_config)
    entries = _entries(checkpoint, dequantized)
    unfinished = out.with_name(out.name + ".partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _stream(unfinished, checkpoint, entries, tokenizer)
        os.replace(unfinished, out)
    except OSError as error:
        raise LrqatError(f"{out}: cannot be written ({error}); free some space or choose another --out") from None
    finally:
        with suppress(OSError):
            unfinished.unlink()
    return out


def read(path: Path) -> Mapping[str, Tensor]:
    """Decode a GGUF file: HF names and row order, float32, each tensor made when asked for."""
    file = GgufFile(path)
    if (architecture := file.metadata.get("general.architecture")) != "llama":
        raise LrqatError(f"{path}: architecture {architecture!r}; lrqat reads back llama only")
    heads = file.field("llama.attention.head_count", int)
    kv_heads = file.field("llama.attention.head_count_kv", int)
    blocks = file.field("llama.block_count", int)
    if not 0 < blocks <= len(file.tensors) or heads < 1 or kv_heads < 1:
        raise LrqatError(f"{path}: {blocks} blocks of {heads} and {kv_heads} heads; export it again")
    gguf_names = {hf: gguf for hf, gguf in llama.gguf_names(blocks).items() if gguf in file.tensors}
    if strange := sorted(file.tensors.keys() - {*gguf_names.values(), llama.ROPE_FREQS}):
        raise LrqatError(f"{path}: tensor {strange[0]!r} is none of llama's; export it again")
    for gguf in gguf_names.values():
        _check_tensor(file, gguf)

    def make(name: str) -> Tensor:
        values = _decode(file, gguf_names[name])
        split = llama.rope_heads(name, heads, kv_heads)
        if split is None:
            return values
        if values.shape[0] % (2 * split):
            raise LrqatError(f"{path}: {name} has {values.shape[0]} rows for {split} heads; export it again")
        return llama.deinterleave(values, split)

    specs = {hf: Spec(torch.float32, file.tensors[gguf].shape) for hf, gguf in gguf_names.items()}
    return Lazy(specs, make)


def _shapes(checkpoint: FusedCheckpoint) -> dict[str, tuple[int, ...]]:
    dense = {name: spec.shape for name, spec in checkpoint.dense_specs.items()}
    return {**dense, **{name: spec.shape for name, spec in checkpoint.specs.items()}}


def _entries(checkpoint: FusedCheckpoint, dequantized: bool) -> list[_Entry]:
    """What the file will hold, in the order of the model."""
    config = checkpoint.hf_config
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads

    def reordered(name: str, rows: Tensor) -> Tensor:
        split = llama.rope_heads(name, heads, kv_heads)
        return rows if split is None else llama.interleave(rows, split)

    def packed(name: str) -> Tensor:
        fused = checkpoint.tensors[name]
        fused.check(name)
        return pack(reordered(name, fused.codes_OI), reordered(name, fused.scales_OG), fused.grid.bits)

    def values(name: str, dtype: torch.dtype) -> Tensor:
        quantized = name in checkpoint.specs
        tensor = checkpoint.tensors[name].dequantize() if quantized else checkpoint.dense[name]
        return reordered(name, tensor).to(dtype)

    entries, shapes = [], _shapes(checkpoint)
    for name, gguf in llama.gguf_names(config["num_hidden_layers"]).items():
        if name in checkpoint.specs and not dequantized:
            spec = checkpoint.specs[name]
            kind = block_type(spec.grid.bits)
            nbytes = spec.shape[0] * kind.row_bytes(spec.shape[1])
            entries.append(_Entry(gguf, spec.shape, kind.ggml_type, nbytes, partial(packed, name)))
        elif name in shapes:
            exact = F32 if dequantized or len(shapes[name]) == 1 else _exact_float(checkpoint.dense[name])
            entries.append(_float_entry(gguf, shapes[name], exact, partial(values, name, FLOATS[exact])))
    factors = llama.rope_freqs(config)
    if factors is not None:
        entries.append(_float_entry(llama.ROPE_FREQS, tuple(factors.shape), F32, lambda: factors))
    return entries


def _float_entry(name: str, shape: tuple[int, ...], ggml_type: int, make: Callable[[], Tensor]) -> _Entry:
    return _Entry(name, shape, ggml_type, torch.Size(shape).numel() * FLOATS[ggml_type].itemsize, make)


def _exact_float(matrix: Tensor) -> int:
    """The first of F16, BF16, F32 that holds every value."""
    for ggml_type in (F16, BF16):
        dtype = FLOATS[ggml_type]
        if all(torch.equal(rows.to(dtype).to(rows.dtype), rows) for rows in matrix.split(ROWS_AT_ONCE)):
            return ggml_type
    return F32


def _stream(path: Path, checkpoint: FusedCheckpoint, entries: list[_Entry], tokenizer: TokenizerFields) -> None:
    """Header, metadata and tensor table first, then one tensor after the other."""
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFWriter

    weights: dict[int, int] = {}
    for entry in entries:
        weights[entry.ggml_type] = weights.get(entry.ggml_type, 0) + entry.nbytes * (entry.ggml_type in BLOCKS)
    mostly = max(weights, key=lambda ggml_type: (weights[ggml_type], ggml_type != F32))
    writer = GGUFWriter(path, "llama")
    try:
        writer.add_type("model")
        writer.add_name(Path(path.stem).stem)  # of NAME.gguf.partial
        writer.add_file_type(FILE_TYPES[mostly])
        writer.add_quantization_version(QUANTIZATION_VERSION)
        llama.add_metadata(writer, checkpoint.hf_config)
        tokenizer.add_to(writer)
        for entry in entries:
            kind = GGMLQuantizationType(entry.ggml_type)
            writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), entry.nbytes, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in entries:
            data = entry.make().detach().cpu().contiguous()
            writer.write_tensor_data(data.view(torch.uint8).numpy())
        assert writer.fout is not None
        writer.flush()
        os.fsync(writer.fout[0].fileno())
    finally:
        writer.close()


def _row_bytes(file: GgufFile, name: str) -> int:
    """Bytes of a row; refuses types that lrqat does not write, and rows that blocks do not fill."""
    info = file.tensors[name]
    if not 1 <= len(info.shape) <= 2 or 0 in info.shape:
        raise LrqatError(f"{file.path}: {name} has shape {list(info.shape)}; export it again")
    columns = info.shape[-1]
    if info.ggml_type in FLOATS:
        return columns * FLOATS[info.ggml_type].itemsize
    if info.ggml_type not in BLOCKS or columns % COLUMNS:
        raise LrqatError(
            f"{file.path}: {name} has ggml type {info.ggml_type} and {columns} columns; lrqat reads back F32, F16, "
            f"BF16, Q4_0 and Q8_0 in blocks of {COLUMNS}"
        )
    return BLOCKS[info.ggml_type].row_bytes(columns)


def _check_tensor(file: GgufFile, name: str) -> int:
    """Bytes of a tensor, all of which are in the file."""
    shape = file.tensors[name].shape
    return file.check(name, _row_bytes(file, name) * (shape[0] if len(shape) == 2 else 1))


def _decode(file: GgufFile, name: str) -> Tensor:
    """One tensor as float32, in GGUF's row order."""
    info = file.tensors[name]
    data = torch.frombuffer(file.read(name, _check_tensor(file, name)), dtype=torch.uint8)
    if info.ggml_type in FLOATS:
        return data.view(FLOATS[info.ggml_type]).to(torch.float32).view(info.shape)
    q_OI, d_OB = unpack(data.view(-1, _row_bytes(file, name)), BLOCKS[info.ggml_type])
    return (q_OI.to(torch.float32).unflatten(1, (-1, COLUMNS)) * d_OB.to(torch.float32)[:, :, None]).view(info.shape)
