"""GPTQ: one Hugging Face directory that vLLM, GPTQModel and transformers load.

Per quantized linear X (HF parameter X.weight, [O, I]); b bits, G groups along I:

    X.qweight   int32    [I*b/32, O]   codes, packed along I (exporters/packing.py)
    X.qzeros    int32    [G, O*b/32]   packed along O: v1 (checkpoint_format "gptq") stores (z - 1) mod 2^b,
                                       v2 ("gptq_v2") stores z
    X.scales    float16  [G, O]
    X.g_idx     int32    [I]           group of each column; sequential, i // group_size

    w[o, i] = scales[g, o] * (code[i, o] - z[g, o]),   g = g_idx[i]

All other parameters keep their HF names and dtypes. config.json gains `quantization_config`: the commonest grid, and
`dynamic`, whose patterns name the linears on other grids ("+:") and those of the decoder that stayed dense ("-:").
vLLM asks it about fused linears, so those stand beside their shards.

v1 is the default because every reader takes it. It is v2 where v1 readers go wrong: asymmetric grids (GPTQModel adds
its "+1" to whole words, so a zero of 0, stored as 2^b - 1, carries into its neighbour: "overflow ~<=13%"), and 3 bits
(before PR ModelCloud/GPTQModel#2763 that "+1" met the wrong bits of every first and third word).

Sources: AutoGPTQ/AutoGPTQ@058fd80:auto_gptq/nn_modules/qlinear/qlinear_cuda.py (`pack`); gptqmodel 7.7.0
nn_modules/qlinear/__init__.py (`dequantize_weight`), utils/model.py (`convert_gptq_v1_to_v2_format_module`);
vllm 0.32.0 model_executor/layers/quantization/auto_gptq.py, utils/gptq_utils.py.

Refuses: grids that are not affine or have a minimum, bits other than 2, 3, 4, 8, axes that do not fill whole words,
v1 with a zero of 0.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from exporters import hf_directory, vllm_rules
from exporters.hf_directory import FLOATS, HEAD, QuantizedDirectory, affine, read_grid, unpacked
from exporters.packing import WORD_BITS, codes_per_block, pack
from exporters.refusal import Refusal
from lrqat import __version__
from lrqat.errors import LrqatError
from lrqat.fused import FusedCheckpoint, FusedSpec, FusedTensor
from lrqat.grid import Grid
from lrqat.grids.affine import AffineGrid
from lrqat.safestream import Entry

BITS = (2, 3, 4, 8)
FORMAT = {"v1": "gptq", "v2": "gptq_v2"}  # checkpoint_format
PARTS = ("qweight", "qzeros", "scales", "g_idx")


def carries(grid: Grid, shape: tuple[int, int], name: str = "weight") -> Refusal | None:
    """Why GPTQ cannot store this grid in this shape exactly, or None."""
    rows, columns = shape
    if not isinstance(grid, AffineGrid) or grid.zero == "minimum":
        return Refusal(f"{name}: GPTQ stores affine grids with integer zeros, not {grid}", "use --grid w4g32")
    if grid.bits not in BITS:
        return Refusal(f"{name}: GPTQ stores 2, 3, 4 or 8 bits, not {grid.bits}", "use --grid w4g32")
    if grid.group_size != -1 and columns % grid.group_size:
        return Refusal(
            f"{name}: group_size {grid.group_size} does not divide in_features {columns}",
            f"use --grid {AffineGrid(grid.bits, -1, grid.zero, grid.scale_precision)} (per channel)",
        )
    block = codes_per_block(grid.bits)
    for axis, size in (("in_features", columns), ("out_features", rows)):
        if size % block:
            return Refusal(
                f"{name}: {axis} {size} is no multiple of {block}: {grid.bits}-bit codes do not fill the int32 words",
                "keep this linear dense (--skip), or see `lrqat formats`",
            )
    return None


def check(checkpoint: FusedCheckpoint) -> None:
    """Refuse what cannot be written, from names, shapes and grids."""
    hf_directory.check(checkpoint, "GPTQ", carries)


def write(checkpoint: FusedCheckpoint, out_dir: Path, *, zeros: Literal["v1", "v2"] | None = None) -> Path:
    """Write the directory; memory is bounded by the largest tensor, and the name appears only when complete.

    Args:
        checkpoint: what training handed over.
        out_dir: replaced if it is an earlier export.
        zeros: how zeros are stored; None is v1, but v2 for asymmetric and for 3-bit grids (see above).
    """
    check(checkpoint)
    grids = [affine(spec.grid) for spec in checkpoint.specs.values()]
    if zeros is None:
        zeros = "v1" if all(grid.symmetric and grid.bits != 3 for grid in grids) else "v2"

    def weight_entries(layer: str, spec: FusedSpec, fused: Callable[[], FusedTensor]) -> list[Entry]:
        return _weight_entries(layer, spec, fused, zeros)

    return hf_directory.write(checkpoint, out_dir, weight_entries, _quantization_config(checkpoint, zeros))


def _weight_entries(layer: str, spec: FusedSpec, fused: Callable[[], FusedTensor], zeros: str) -> list[Entry]:
    grid, (rows, columns) = affine(spec.grid), spec.shape
    group = grid.columns_per_group(columns, layer)
    groups = columns // group

    def qweight() -> Tensor:
        return pack(fused().codes_OI.T, grid.bits, axis=0)

    def qzeros() -> Tensor:
        symmetric = torch.full((rows, groups), grid.midpoint, dtype=torch.uint8)
        zeros_GO = fused().parts.get("zeros", symmetric).T
        if zeros == "v1":
            if (zeros_GO == 0).any():
                raise LrqatError(f"{layer}: has zeros of 0, which readers of GPTQ v1 get wrong; leave out --zeros v1")
            zeros_GO = zeros_GO - 1
        return pack(zeros_GO, grid.bits)

    return [
        Entry(f"{layer}.qweight", torch.int32, (columns * grid.bits // WORD_BITS, rows), qweight),
        Entry(f"{layer}.qzeros", torch.int32, (groups, rows * grid.bits // WORD_BITS), qzeros),
        Entry(f"{layer}.scales", torch.float16, (groups, rows), lambda: fused().parts["scales"].T),
        Entry(f"{layer}.g_idx", torch.int32, (columns,), lambda: torch.arange(columns, dtype=torch.int32) // group),
    ]


def _fields(grid: Grid) -> dict[str, Any]:
    """How GPTQ's config spells a grid."""
    grid = affine(grid)
    return {"bits": grid.bits, "group_size": grid.group_size, "sym": grid.symmetric}


def _quantization_config(checkpoint: FusedCheckpoint, zeros: str) -> dict[str, Any]:
    layers: dict[str, list[str]] = {}
    for name, spec in checkpoint.specs.items():
        layers.setdefault(str(_fields(spec.grid)), []).append(name.removesuffix(".weight"))
    fields = {str(_fields(spec.grid)): _fields(spec.grid) for spec in checkpoint.specs.values()}
    base = fields[Counter({key: len(names) for key, names in layers.items()}).most_common(1)[0][0]]
    dynamic: dict[str, dict[str, Any]] = {}
    for key, names in layers.items():
        if changes := {field: value for field, value in fields[key].items() if value != base[field]}:
            dynamic |= {f"+:^{re.escape(layer)}$": changes for layer in vllm_rules.with_fused(names)}
    dense = vllm_rules.with_fused(hf_directory.dense_linears(checkpoint))
    dynamic |= {f"-:^{re.escape(layer)}$": {} for layer in dense}
    return {
        "quant_method": "gptq",
        **base,
        "desc_act": False,
        "checkpoint_format": FORMAT[zeros],
        "pack_dtype": "int32",
        "lm_head": f"{HEAD}.weight" in checkpoint.specs,
        **({"dynamic": dynamic} if dynamic else {}),
        "meta": {"quantizer": [f"lrqat:{__version__}"]},
    }


def read(path: Path) -> FusedCheckpoint:
    """Decode a GPTQ directory to codes, scales and zeros, each when asked for.

    Reads what others wrote too, as long as their g_idx is sequential and, in v1, no zero is 0: GPTQModel takes the 1
    from whole words, so that such a zero borrows from its neighbour, and others do not. Bits and groups are those of
    the tensors' shapes; the config must know them.
    """
    directory = QuantizedDirectory(path, "GPTQ", ("gptq",))
    known, symmetric = _declared(directory)
    specs = {}
    for layer in directory.layers("qweight"):
        (words, rows), (groups, _) = (directory.matrix(f"{layer}.{part}") for part in ("qweight", "scales"))
        g_idx = directory.specs.get(f"{layer}.g_idx")
        if g_idx is None or len(g_idx.shape) != 1 or not g_idx.shape[0]:
            raise directory.error(f"{layer} has no g_idx [I]; export it again")
        columns = g_idx.shape[0]
        bits = words * WORD_BITS // columns
        group = -1 if groups == 1 else columns // groups
        if (bits, group) not in known and (bits, columns) not in known:
            raise directory.error(
                f"{layer} has {bits} bits in groups of {group}, which quantization_config does not name"
            )
        directory.expect(f"{layer}.qweight", (columns * bits // WORD_BITS, rows), torch.int32)
        directory.expect(f"{layer}.qzeros", (groups, rows * bits // WORD_BITS), torch.int32)
        directory.expect(f"{layer}.scales", (groups, rows), *FLOATS)
        directory.expect(f"{layer}.g_idx", (columns,), torch.int32)
        if columns % groups:
            raise directory.error(f"{layer} has {groups} groups in {columns} columns; export it again")
        specs[f"{layer}.weight"] = FusedSpec(read_grid(bits, columns, groups, symmetric), (rows, columns))
    minus_one = directory.config.get("checkpoint_format", "gptq") == "gptq"

    def make(layer: str, spec: FusedSpec) -> FusedTensor:
        grid, columns = affine(spec.grid), spec.shape[1]
        sequential = torch.arange(columns, dtype=torch.int32) // grid.columns_per_group(columns, layer)
        if not torch.equal(directory.get(f"{layer}.g_idx"), sequential):
            raise directory.error(f"{layer}.g_idx is not sequential; export again without activation order")
        zeros_GO = unpacked(directory.get(f"{layer}.qzeros"), grid.bits)
        if minus_one and not grid.symmetric and (zeros_GO == grid.codes - 1).any():
            raise directory.error(
                f"{layer}.qzeros hold a zero of 0 in GPTQ's first format, where writers disagree about its neighbours; "
                "save it as gptq_v2"
            )
        zeros_OG = ((zeros_GO + minus_one) & grid.codes - 1).T.contiguous()
        codes_OI = unpacked(directory.get(f"{layer}.qweight").T, grid.bits)
        parts = {"scales": directory.half(f"{layer}.scales").T.contiguous()}
        if not grid.symmetric:
            parts["zeros"] = zeros_OG
        elif (zeros_OG != grid.midpoint).any():
            raise directory.error(f"{layer}.qzeros are not those of a symmetric grid, which config.json says it is")
        return FusedTensor(codes_OI, parts, grid)

    return directory.checkpoint(specs, [f"{name.removesuffix('.weight')}.{p}" for name in specs for p in PARTS], make)


def _declared(directory: QuantizedDirectory) -> tuple[set[tuple[int, int]], bool]:
    """The (bits, group_size) that the config names, and whether every grid is symmetric."""
    config = directory.config
    form, dynamic = config.get("checkpoint_format", "gptq"), config.get("dynamic") or {}
    if not isinstance(dynamic, dict) or not all(isinstance(changes, dict) for changes in dynamic.values()):
        raise directory.error("quantization_config.dynamic is no table of overrides; export it again")
    overrides = [changes for pattern, changes in dynamic.items() if not pattern.startswith("-:")]
    known, symmetric = set(), True
    for changes in [{}, *overrides]:
        bits, group, sym = (changes.get(key, config.get(key)) for key in ("bits", "group_size", "sym"))
        plain = isinstance(bits, int) and isinstance(group, int) and bits in BITS and (group == -1 or group > 0)
        if not plain or not isinstance(sym, bool) or form not in FORMAT.values():
            raise directory.error(
                f"cannot read GPTQ with bits {bits!r}, group_size {group!r}, sym {sym!r} "
                f"and checkpoint_format {form!r}; export it again"
            )
        known.add((bits, group))
        symmetric &= sym
    return known, symmetric
