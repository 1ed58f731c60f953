"""What the safetensors formats have in common: a Hugging Face directory with a `quantization_config`.

    model.safetensors    or shards with the usual index; per quantized linear the layout's own tensors, every other
                         parameter under its HF name in its own dtype. Their metadata say "lrqat": such a directory
                         may be written over
    config.json          the model's own, with `quantization_config` and the dtype to serve in
    tokenizer, chat template, generation config, as they came

Tensors are written one by one, and read when asked for: memory is bounded by the largest. Readers share nothing with
the writers but the equation: `unpacked` follows the definition. Whatever contradicts itself is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from exporters.packing import WORD_BITS
from exporters.refusal import Refusal
from lrqat import __version__
from lrqat.errors import LrqatError
from lrqat.fused import (
    FusedCheckpoint,
    FusedSpec,
    FusedTensor,
    Lazy,
    SafetensorsDirectory,
    config_dtype,
    fresh_directory,
    open_safetensors,
    read_assets,
    read_json,
)
from lrqat.grid import Grid
from lrqat.grids.affine import AffineGrid
from lrqat.safestream import Entry, write_model

HEAD = "lm_head"
EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings")
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
ROWS_AT_ONCE = 32  # of packed words, when they are taken apart: they stay in a core's cache

_BLOCK = re.compile(r"\.\d+\.")  # a parameter inside a numbered decoder block

WeightEntries = Callable[[str, FusedSpec, Callable[[], FusedTensor]], list[Entry]]


def check(checkpoint: FusedCheckpoint, form: str, carries: Callable[..., Refusal | None]) -> None:
    """Refuse a checkpoint of which some weight cannot be stored in `form`."""
    if not checkpoint.specs:
        raise LrqatError(f"{form} export: the checkpoint holds no quantized weight; use the Hugging Face model itself")
    for name, spec in checkpoint.specs.items():
        if not name.endswith(".weight"):
            raise LrqatError(f"{form} export: {name} is no linear's weight; keep it dense (--skip)")
        if refusal := embedding(name) or carries(spec.grid, spec.shape, name):
            raise LrqatError(f"{form} export: {refusal}")


def embedding(name: str) -> Refusal | None:
    """These formats hold linear layers; vLLM's Llama, among others, fails to load a quantized embedding."""
    if name.removesuffix(".weight").rpartition(".")[2] not in EMBEDDINGS:
        return None
    return Refusal(f"{name}: an embedding, which safetensors formats keep dense", "leave its override out, or use gguf")


def write(
    checkpoint: FusedCheckpoint,
    out_dir: Path,
    weight_entries: WeightEntries,
    quantization_config: dict[str, Any],
    dtype: str | None = None,
) -> Path:
    """Write the directory; its name appears only when complete.

    Args:
        checkpoint: has passed `check`.
        out_dir: replaced if it is an earlier export.
        weight_entries: (layer, spec, the weight when called) -> the tensors of one quantized linear.
        quantization_config: goes into config.json.
        dtype: to serve in; None is `served_dtype`.
    """

    @lru_cache(maxsize=1)  # a weight's tensors follow each other: it is made once, then let go
    def fused(name: str) -> FusedTensor:
        tensor = checkpoint.tensors[name]
        tensor.check(name)
        return tensor

    entries: list[Entry] = []
    for name, spec in checkpoint.specs.items():
        entries += weight_entries(name.removesuffix(".weight"), spec, partial(fused, name))
    for name, dense in checkpoint.dense_specs.items():
        entries.append(Entry(name, dense.dtype, dense.shape, partial(checkpoint.dense.__getitem__, name)))
    dtype = dtype or served_dtype(checkpoint)
    changes: dict[str, Any] = {"dtype": dtype, "torch_dtype": dtype}  # the key's name before transformers 5
    if f"{HEAD}.weight" in checkpoint.specs:
        changes["tie_word_embeddings"] = False
    with fresh_directory(Path(out_dir), _ours) as fresh:
        write_model(fresh, entries, {"format": "pt", "lrqat": __version__})
        checkpoint.write_assets(fresh, **changes, quantization_config=quantization_config)
    return Path(out_dir)


def _ours(directory: Path) -> bool:
    """An earlier export of ours, which may be replaced."""
    try:
        files = [path for path in directory.glob("*.safetensors") if path.is_file()]
        for path in files[:1]:
            with open_safetensors(path) as file:
                if "lrqat" in (file.metadata() or {}):
                    return True
        config = read_json(directory / "config.json").get("quantization_config")  # of lrqat 0.1
        return isinstance(config, dict) and "lrqat" in str(config.get("meta"))
    except LrqatError:
        return False


def served_dtype(checkpoint: FusedCheckpoint) -> str:
    """The dtype that runtimes serve in: the model's own if it is half precision and exact for the scales.

    vLLM's 4-bit kernels take float16 and bfloat16 only, and cast scales to it: fp16 scales need float16.
    """
    base = config_dtype(checkpoint.hf_config)
    portable = all(getattr(spec.grid, "scale_precision", "") == "portable" for spec in checkpoint.specs.values())
    return "bfloat16" if base == "bfloat16" and portable else "float16"


def dense_linears(checkpoint: FusedCheckpoint) -> list[str]:
    """The matrices of decoder blocks that stayed dense, without ".weight"."""
    dense = [n for n, s in checkpoint.dense_specs.items() if n.endswith(".weight") and len(s.shape) == 2]
    return [name.removesuffix(".weight") for name in dense if _BLOCK.search(name)]


def affine(grid: Grid) -> AffineGrid:
    """The grid of a weight that `carries` has let through."""
    assert isinstance(grid, AffineGrid)
    return grid


class QuantizedDirectory:
    """An exported directory that is being read.

    Attributes:
        path: where it is.
        config: its quantization_config.
        hf_config: the rest of config.json.
        specs: dtype and shape of every stored tensor.
    """

    def __init__(self, path: Path, form: str, methods: Iterable[str]) -> None:
        self.path = Path(path)
        self.hf_config = read_json(self.path / "config.json")
        config = self.hf_config.pop("quantization_config", None)
        if not isinstance(config, dict) or config.get("quant_method") not in tuple(methods):
            raise LrqatError(f"{path}: config.json declares no {form} quantization_config; expected such an export")
        self.config: dict[str, Any] = config
        self._files = SafetensorsDirectory(self.path)
        self.specs = self._files.specs

    def get(self, name: str) -> Tensor:
        """One stored tensor."""
        return self._files.get(name)

    def error(self, text: str) -> LrqatError:
        """Names the directory."""
        return LrqatError(f"{self.path}: {text}")

    def layers(self, tensor: str) -> list[str]:
        """Linears that have this tensor."""
        return [name.removesuffix(f".{tensor}") for name in self.specs if name.endswith(f".{tensor}")]

    def matrix(self, name: str) -> tuple[int, int]:
        """Shape of a stored matrix, neither side 0."""
        shape = self.specs[name].shape if name in self.specs else ()
        if len(shape) != 2 or not all(shape):
            raise self.error(f"{name}: expected a matrix, got {list(shape) or 'nothing'}; export it again")
        return shape[0], shape[1]

    def expect(self, name: str, shape: tuple[int, ...], *dtypes: torch.dtype) -> None:
        """Refuse a tensor that is missing or not as the others say."""
        found = self.specs.get(name)
        if found is None or found.shape != shape or found.dtype not in dtypes:
            got = "nothing" if found is None else f"{found.dtype} {list(found.shape)}"
            raise self.error(f"{name}: expected {dtypes[0]} {list(shape)}, got {got}; export it again")

    def half(self, name: str) -> Tensor:
        """Scales as float16, in which they must be exact."""
        stored = self.get(name)
        half = stored.to(torch.float16)
        if not torch.equal(half.to(stored.dtype), stored):
            raise self.error(
                f"{name}: {stored.dtype} scales that float16 does not hold; lrqat's grids have fp16 scales"
            )
        return half

    def checkpoint(
        self,
        specs: Mapping[str, FusedSpec],
        parts: Iterable[str],
        make: Callable[[str, FusedSpec], FusedTensor],
        provenance: dict[str, Any] | None = None,
    ) -> FusedCheckpoint:
        """All of it, lazily.

        Args:
            specs: grid and shape of the quantized weights, by HF parameter name.
            parts: the stored tensors that belong to them; all others are dense.
            make: (layer, spec) -> the weight.
            provenance: what the config says beside.
        """
        if not specs:
            raise self.error("holds no quantized linear; export it again")
        used = {*parts}
        dense = {name: spec for name, spec in self.specs.items() if name not in used}
        if twice := sorted(dense.keys() & specs.keys()):
            raise self.error(f"{twice[0]} is there twice, dense and quantized; export it again")
        leaves = {name.rpartition(".")[2] for name in used} - {"weight"}
        for name, spec in dense.items():
            leaf = name.rpartition(".")[2]
            if leaf in leaves or (leaf in ("weight", "bias") and spec.dtype not in FLOATS):
                raise self.error(f"{name} belongs to no quantized linear; export it again")

        def fused(name: str) -> FusedTensor:
            found = make(name.removesuffix(".weight"), specs[name])
            found.check(name)
            return found

        return FusedCheckpoint(
            Lazy(specs, fused),
            Lazy(dense, self.get),
            specs,
            dense,
            self.hf_config,
            read_assets(self.path),
            provenance or {},
        )


def read_grid(bits: int, columns: int, groups: int, symmetric: bool) -> AffineGrid:
    """The grid of a stored weight: [O, I] in G groups a row."""
    return AffineGrid(bits, -1 if groups == 1 else columns // groups, "midpoint" if symmetric else "integer", "fp16")


def unpacked(words: Tensor, bits: int) -> Tensor:
    """[rows, words] int32 -> [rows, words * 32 // bits] uint8, by the definition: bits k*b .. k*b + b of the stream."""
    stored = np.ascontiguousarray(words.numpy()).view(np.uint32)
    rows, width = stored.shape
    block = math.lcm(bits, WORD_BITS) // WORD_BITS  # words that hold whole codes
    blocks = np.pad(stored, ((0, 0), (0, -width % block))).reshape(rows, -1, block)
    codes = np.empty((*blocks.shape[:2], block * WORD_BITS // bits), dtype=np.uint8)
    for start in range(0, rows, ROWS_AT_ONCE):
        tile, codes_of_tile = blocks[start : start + ROWS_AT_ONCE], codes[start : start + ROWS_AT_ONCE]
        for index in range(codes.shape[2]):
            word, shift = divmod(index * bits, WORD_BITS)
            code = tile[:, :, word] >> np.uint32(shift)
            if shift + bits > WORD_BITS:
                code |= tile[:, :, word + 1] << np.uint32(WORD_BITS - shift)
            codes_of_tile[:, :, index] = code & np.uint32((1 << bits) - 1)
    return torch.from_numpy(codes.reshape(rows, -1)[:, : width * WORD_BITS // bits])
