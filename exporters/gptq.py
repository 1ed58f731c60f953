"""GPTQ: one Hugging Face directory that vLLM, GPTQModel and transformers load.

Per quantized linear X (HF parameter X.weight, [O, I]); b bits, G groups along I:

    X.qweight   int32    [I*b/32, O]   codes, packed along I (exporters/packing.py)
    X.qzeros    int32    [G, O*b/32]   packed along O: v1 (checkpoint_format "gptq") stores (z - 1) mod 2^b,
                                       v2 ("gptq_v2") stores z
    X.scales    float16  [G, O]
    X.g_idx     int32    [I]           group of each column; sequential, i // group_size

    w[o, i] = scales[g, o] * (code[i, o] - z[g, o]),   g = g_idx[i]

All other parameters keep their HF names and dtypes. config.json gains `quantization_config`; `dynamic`
names the linears of the decoder that stayed dense.

v1 is the default because every reader takes it. At 3 bits it is v2: before PR ModelCloud/GPTQModel#2763 the v1
reader of GPTQModel added its "+1" at the wrong bits of every first and third word (7.7.0 reads both rightly).

Sources: AutoGPTQ/AutoGPTQ@058fd80:auto_gptq/nn_modules/qlinear/qlinear_cuda.py (`pack`); gptqmodel 7.7.0
nn_modules/qlinear/__init__.py (`dequantize_weight`), utils/model.py (`convert_gptq_v1_to_v2_format_module`);
vllm 0.32.0 model_executor/layers/quantization/auto_gptq.py, utils/gptq_utils.py, kernels/linear/mixed_precision/cpu.py.

Refuses: asymmetric grids, bits other than 2, 3, 4, 8, axes that do not fill whole words, models that mix grids.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from exporters.packing import WORD_BITS, codes_per_block, pack
from exporters.refusal import Refusal
from lrqat import __version__
from lrqat.errors import LrqatError
from lrqat.fused import (
    FusedCheckpoint,
    FusedSpec,
    FusedTensor,
    Lazy,
    SafetensorsDirectory,
    Spec,
    fresh_directory,
    read_assets,
    read_json,
)
from lrqat.grid import Grid
from lrqat.grids.affine import AffineGrid
from lrqat.safestream import Entry, write_model

BITS = (2, 3, 4, 8)
FORMAT = {"v1": "gptq", "v2": "gptq_v2"}  # checkpoint_format
VLLM_GROUPS = (-1, 32, 64, 128)  # MARLIN_SUPPORTED_GROUP_SIZES, asked on every platform
VLLM_TILE = 32  # K and N of a (fused) linear are multiples of it for CPUWNA16
VLLM_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # loaded as one linear

_BLOCK = re.compile(r"\.\d+\.")  # a parameter inside a numbered decoder block


def carries(grid: Grid, shape: tuple[int, int], name: str = "weight") -> Refusal | None:
    """Why GPTQ cannot store this grid in this shape exactly, or None."""
    rows, columns = shape
    if not isinstance(grid, AffineGrid) or not grid.symmetric:
        return Refusal(f"{name}: GPTQ export is for symmetric affine grids, not {grid}", "use --grid w4g32")
    if grid.bits not in BITS:
        return Refusal(f"{name}: GPTQ stores 2, 3, 4 or 8 bits, not {grid.bits}", "use --grid w4g32")
    if grid.group_size != -1 and columns % grid.group_size:
        return Refusal(
            f"{name}: group_size {grid.group_size} does not divide in_features {columns}",
            f"use --grid {replace(grid, group_size=-1)} (per channel)",
        )
    block = codes_per_block(grid.bits)
    for axis, size in (("in_features", columns), ("out_features", rows)):
        if size % block:
            return Refusal(
                f"{name}: {axis} {size} is no multiple of {block}: {grid.bits}-bit codes do not fill the int32 words",
                "keep this linear dense (--skip) or export to GGUF",
            )
    return None


def vllm_limits(checkpoint: FusedCheckpoint) -> Refusal | None:
    """Why vLLM would not serve this checkpoint from GPTQ on a CPU, or None. Export goes on: other readers may."""
    for name, spec in checkpoint.specs.items():
        grid, columns = spec.grid, spec.shape[1]
        assert isinstance(grid, AffineGrid)  # asked after `carries`
        if grid.bits == 8:
            return Refusal(f"{name}: vLLM runs 8-bit GPTQ on GPUs only", "serve it there, or use --grid w4g32")
        if grid.bits != 4:
            return Refusal(f"{name}: vLLM loads GPTQ with 4 or 8 bits, not {grid.bits}", "use --grid w4g32")
        if grid.group_size not in VLLM_GROUPS:
            return Refusal(f"{name}: vLLM's GPTQ takes groups of 32, 64, 128 or a whole row", "use --grid w4g32")
        if columns % VLLM_TILE:
            return Refusal(f"{name}: in_features {columns} is no multiple of {VLLM_TILE}", "keep it dense (--skip)")
        shards = _shards(name)
        if any(shard in checkpoint.dense_specs for shard in shards):
            return Refusal(
                f"{name}: vLLM fuses {', '.join(s.split('.')[-2] for s in shards)}, but some of them are dense",
                "quantize or --skip them together",
            )
        fused_rows = sum(checkpoint.specs[shard].shape[0] for shard in shards if shard in checkpoint.specs)
        if fused_rows % VLLM_TILE:
            return Refusal(f"{name}: fused out_features {fused_rows} is no multiple of {VLLM_TILE}", "--skip it")
    return None


def write(checkpoint: FusedCheckpoint, out_dir: Path, *, zeros: Literal["v1", "v2"] | None = None) -> Path:
    """Write the directory; memory is bounded by the largest tensor, and the name appears only when complete.

    Args:
        checkpoint: every quantized weight on one grid.
        out_dir: replaced if it exists.
        zeros: how zeros are stored; None is v1, but v2 at 3 bits (see above).
    """
    grid = _one_grid(checkpoint)
    zeros = zeros or ("v2" if grid.bits == 3 else "v1")

    @lru_cache(maxsize=1)  # a weight's parts follow each other: it is made once, then let go
    def fused(name: str) -> FusedTensor:
        tensor = checkpoint.tensors[name]
        tensor.check(name)
        return tensor

    entries: list[Entry] = []
    for name, spec in checkpoint.specs.items():
        entries += _weight_entries(name.removesuffix(".weight"), spec.shape, grid, zeros, partial(fused, name))
    for name, dense in checkpoint.dense_specs.items():
        entries.append(Entry(name, dense.dtype, dense.shape, partial(checkpoint.dense.__getitem__, name)))
    dtype = _served_dtype(checkpoint)
    with fresh_directory(Path(out_dir), _ours) as fresh:
        write_model(fresh, entries, {"format": "pt"})
        checkpoint.write_assets(
            fresh,
            dtype=dtype,
            torch_dtype=dtype,  # the key's name before transformers 5
            quantization_config=_quantization_config(checkpoint, grid, zeros),
        )
    return Path(out_dir)


def _ours(directory: Path) -> bool:
    """An earlier export of ours, which may be replaced."""
    path = directory / "config.json"
    config = read_json(path).get("quantization_config") if path.is_file() else None
    return isinstance(config, dict) and any("lrqat" in str(q) for q in (config.get("meta") or {}).get("quantizer", []))


def _weight_entries(
    layer: str, shape: tuple[int, int], grid: AffineGrid, zeros: str, fused: Callable[[], FusedTensor]
) -> list[Entry]:
    rows, columns = shape
    group = grid.columns_per_group(columns, layer)
    groups = columns // group
    stored_zero = (grid.midpoint - (zeros == "v1")) % grid.codes

    def qweight() -> Tensor:
        return pack(fused().codes_OI.T, grid.bits, axis=0)

    def qzeros() -> Tensor:
        return pack(torch.full((groups, rows), stored_zero, dtype=torch.uint8), grid.bits)

    def scales() -> Tensor:
        return fused().parts["scales"].T

    def g_idx() -> Tensor:
        return torch.arange(columns, dtype=torch.int32) // group

    return [
        Entry(f"{layer}.qweight", torch.int32, (columns * grid.bits // WORD_BITS, rows), qweight),
        Entry(f"{layer}.qzeros", torch.int32, (groups, rows * grid.bits // WORD_BITS), qzeros),
        Entry(f"{layer}.scales", torch.float16, (groups, rows), scales),
        Entry(f"{layer}.g_idx", torch.int32, (columns,), g_idx),
    ]


def _one_grid(checkpoint: FusedCheckpoint) -> AffineGrid:
    """The grid of all quantized weights; refuses what GPTQ does not carry."""
    if not checkpoint.specs:
        raise LrqatError("GPTQ export: the checkpoint holds no quantized weight; use the Hugging Face model itself")
    first, grid = next((name, spec.grid) for name, spec in checkpoint.specs.items())
    for name, spec in checkpoint.specs.items():
        if not name.endswith(".weight"):
            raise LrqatError(f"GPTQ export: {name} is no linear's weight; keep it dense (--skip)")
        if spec.grid != grid:
            raise LrqatError(
                f"GPTQ export: {name} is on grid {spec.grid} but {first} on {grid}; use one grid for all weights"
            )
        refusal = carries(spec.grid, spec.shape, name)
        if refusal is not None:
            raise LrqatError(f"GPTQ export: {refusal}")
    assert isinstance(grid, AffineGrid)  # `carries` has seen to it
    return grid


def _quantization_config(checkpoint: FusedCheckpoint, grid: AffineGrid, zeros: str) -> dict[str, Any]:
    dense = [n for n, s in checkpoint.dense_specs.items() if n.endswith(".weight") and len(s.shape) == 2]
    dense = [name.removesuffix(".weight") for name in dense if _BLOCK.search(name)]
    return {
        "quant_method": "gptq",
        "bits": grid.bits,
        "group_size": grid.group_size,
        "sym": True,
        "desc_act": False,
        "checkpoint_format": FORMAT[zeros],
        "pack_dtype": "int32",
        "lm_head": "lm_head.weight" in checkpoint.specs,
        **({"dynamic": {f"-:^{re.escape(name)}$": {} for name in dense}} if dense else {}),
        "meta": {"quantizer": [f"lrqat:{__version__}"]},
    }


def _served_dtype(checkpoint: FusedCheckpoint) -> str:
    """The dtype that runtimes serve in: the model's own if it is half precision and exact for the scales.

    vLLM's GPTQ kernels take float16 and bfloat16 only, and cast scales to it: fp16 scales need float16.
    """
    base = checkpoint.hf_config.get("dtype") or checkpoint.hf_config.get("torch_dtype")
    portable = all(getattr(spec.grid, "scale_precision", "") == "portable" for spec in checkpoint.specs.values())
    return "bfloat16" if base == "bfloat16" and portable else "float16"


def _shards(name: str) -> list[str]:
    """The weights that vLLM loads as one linear together with `name`, itself among them."""
    parent, _, leaf = name.removesuffix(".weight").rpartition(".")
    for family in VLLM_FUSED:
        if leaf in family:
            return [f"{parent}.{member}.weight" for member in family]
    return [name]


def read(path: Path) -> FusedCheckpoint:
    """Decode a GPTQ directory to codes and scales, each when asked for.

    Shares nothing with the writer but the equation: bits are taken apart by numpy. So it is the oracle of the
    tests, and of what others wrote as long as their g_idx is sequential.
    """
    path = Path(path)
    hf_config = read_json(path / "config.json")
    config = hf_config.pop("quantization_config", None)
    if not isinstance(config, dict) or config.get("quant_method") != "gptq":
        raise LrqatError(f"{path}: config.json declares no GPTQ quantization_config; expected an exported directory")
    bits, form = config.get("bits"), config.get("checkpoint_format", "gptq")
    if not isinstance(bits, int) or bits not in BITS or form not in FORMAT.values():
        raise LrqatError(f"{path}: cannot read GPTQ with bits {bits!r} and checkpoint_format {form!r}; export it again")
    files = SafetensorsDirectory(path)
    layers = _layers(path, files.specs, bits)
    parts = {f"{layer}.{part}" for layer in layers for part in ("qweight", "qzeros", "scales", "g_idx")}
    dense = {name: spec for name, spec in files.specs.items() if name not in parts}
    specs = {}
    for layer, (rows, columns, groups) in layers.items():
        grid = AffineGrid(bits, -1 if groups == 1 else columns // groups, "midpoint", "fp16")
        specs[f"{layer}.weight"] = FusedSpec(grid, (rows, columns))

    def make(name: str) -> FusedTensor:
        layer, grid = name.removesuffix(".weight"), specs[name].grid
        _, columns, groups = layers[layer]
        sequential = torch.arange(columns, dtype=torch.int32) // (columns // groups)
        if not torch.equal(files.get(f"{layer}.g_idx"), sequential):
            raise LrqatError(f"{path}: {layer}.g_idx is not sequential; export again without activation order")
        zeros_GO = _bit_by_bit(files.get(f"{layer}.qzeros"), bits).int() + (form == "gptq") & (1 << bits) - 1
        if (zeros_GO != 1 << (bits - 1)).any():
            raise LrqatError(f"{path}: {layer}.qzeros are not those of a symmetric grid; lrqat reads no others")
        codes_OI = _bit_by_bit(files.get(f"{layer}.qweight").T, bits)
        return FusedTensor(codes_OI, {"scales": files.get(f"{layer}.scales").T.contiguous()}, grid)

    return FusedCheckpoint(Lazy(specs, make), Lazy(dense, files.get), specs, dense, hf_config, read_assets(path))


def _layers(path: Path, specs: Mapping[str, Spec], bits: int) -> dict[str, tuple[int, int, int]]:
    """(O, I, G) of every quantized linear, from the headers alone; refuses what contradicts itself."""
    layers: dict[str, tuple[int, int, int]] = {}
    for name in [n for n in specs if n.endswith(".qweight")]:
        layer = name.removesuffix(".qweight")
        shape, scales = specs[name].shape, specs.get(f"{layer}.scales", Spec(torch.float16, ())).shape
        if len(shape) != 2 or len(scales) != 2 or not all((*shape, *scales)):
            raise LrqatError(f"{path}: {layer} has no [words, O] qweight with [G, O] scales; export it again")
        rows, columns, groups = shape[1], shape[0] * WORD_BITS // bits, scales[0]
        expected = {
            "qweight": Spec(torch.int32, (columns * bits // WORD_BITS, rows)),
            "qzeros": Spec(torch.int32, (groups, rows * bits // WORD_BITS)),
            "scales": Spec(torch.float16, (groups, rows)),
            "g_idx": Spec(torch.int32, (columns,)),
        }
        for part, spec in expected.items():
            found = specs.get(f"{layer}.{part}")
            if found != spec:
                got = "nothing" if found is None else f"{found.dtype} {list(found.shape)}"
                raise LrqatError(
                    f"{path}: {layer}.{part}: expected {spec.dtype} {list(spec.shape)}, got {got}; export it again"
                )
        if columns % groups or f"{layer}.weight" in specs:
            raise LrqatError(f"{path}: {layer} has {groups} groups in {columns} columns, or a dense weight besides")
        layers[layer] = (rows, columns, groups)
    return layers


def _bit_by_bit(words: Tensor, bits: int) -> Tensor:
    """[rows, words] int32 -> [rows, words*32/bits] uint8, through single bits."""
    octets = np.ascontiguousarray(words.numpy()).astype("<i4").view(np.uint8)
    stream = np.unpackbits(octets, axis=1, bitorder="little").reshape(len(octets), -1, bits)
    codes = np.zeros(stream.shape[:2], dtype=np.uint8)
    for place in range(bits):
        codes |= stream[:, :, place] << place
    return torch.from_numpy(codes)
