"""AWQ ("gemm"): one Hugging Face directory that vLLM, GPTQModel and transformers load; 4 bits.

Per quantized linear X (HF parameter X.weight, [O, I]), G groups along I:

    X.qweight   int32    [I, O/8]    eight codes of neighbouring outputs a word
    X.qzeros    int32    [G, O/8]    zeros likewise, as they are
    X.scales    float16  [G, O]

    w[o, i] = scales[g, o] * (code[i, o] - z[g, o]),   g = i // group_size

Bits 4j..4j+3 of a word hold output 8n + AWQ_ORDER[j]:

    outputs 0 1 2 3 4 5 6 7 with codes 0 1 2 3 4 5 6 7   ->   0x75316420

A symmetric grid is the asymmetric one whose zeros are all 8. All other parameters keep their names and dtypes.
config.json gains `quantization_config`. Its `modules_to_not_convert` is matched as a *substring* (by vLLM against
fused names too, so that "mlp.gate" would skip "mlp.gate_up_proj"); such a name is refused. It is never empty, because
vLLM would then fill it with every module that holds an unquantized parameter of its own, "self_attn" for example.

Sources: casper-hansen/AutoAWQ@f0321ee:awq/modules/linear/gemm.py (`from_linear`: order_map); vllm 0.32.0
model_executor/layers/quantization/auto_awq.py (_REVERSE_AWQ_PACK_ORDER, maybe_update_config), utils/quant_utils.py
(is_layer_skipped).

Refuses: grids that are not affine or have a minimum, widths other than 4, out_features that do not fill whole words,
more than one group size.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from exporters import hf_directory, vllm_rules
from exporters.hf_directory import FLOATS, HEAD, QuantizedDirectory, affine, read_grid, unpacked
from exporters.packing import WORD_BITS
from exporters.refusal import Refusal
from lrqat.errors import LrqatError
from lrqat.fused import FusedCheckpoint, FusedSpec, FusedTensor
from lrqat.grid import Grid
from lrqat.grids.affine import AffineGrid
from lrqat.safestream import Entry

BITS = 4
PER_WORD = WORD_BITS // BITS
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
PARTS = ("qweight", "qzeros", "scales")
TILE = 16  # rows of words that are packed at once


def carries(grid: Grid, shape: tuple[int, int], name: str = "weight") -> Refusal | None:
    """Why AWQ cannot store this grid in this shape exactly, or None."""
    rows, columns = shape
    if not isinstance(grid, AffineGrid) or grid.zero == "minimum" or grid.bits != BITS:
        return Refusal(f"{name}: AWQ stores 4-bit grids with integer zeros, not {grid}", "use --grid w4g32-asym")
    if grid.group_size != -1 and columns % grid.group_size:
        return Refusal(
            f"{name}: group_size {grid.group_size} does not divide in_features {columns}",
            f"use --grid {AffineGrid(BITS, -1, grid.zero, grid.scale_precision)} (per channel)",
        )
    if rows % PER_WORD:
        return Refusal(f"{name}: out_features {rows} is no multiple of {PER_WORD}", "keep this linear dense (--skip)")
    return None


def check(checkpoint: FusedCheckpoint) -> None:
    """Refuse what cannot be written, from names, shapes and grids."""
    hf_directory.check(checkpoint, "AWQ", carries)
    sizes = {name: affine(spec.grid).group_size for name, spec in checkpoint.specs.items()}
    first, group_size = next(iter(sizes.items()))
    for name, size in sizes.items():
        if size != group_size:
            raise LrqatError(
                f"AWQ export: {name} has group_size {size} but {first} {group_size}; use one, or compressed-tensors"
            )
    _not_converted(checkpoint)


def write(checkpoint: FusedCheckpoint, out_dir: Path) -> Path:
    """Write the directory; memory is bounded by the largest tensor, and the name appears only when complete."""
    check(checkpoint)
    group_size = next(affine(spec.grid).group_size for spec in checkpoint.specs.values())
    config = {
        "quant_method": "awq",
        "bits": BITS,
        "group_size": group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": _not_converted(checkpoint),
    }
    if f"{HEAD}.weight" in checkpoint.specs:
        config["lm_head"] = True
    return hf_directory.write(checkpoint, out_dir, _weight_entries, config)


def _not_converted(checkpoint: FusedCheckpoint) -> list[str] | None:
    dense = hf_directory.dense_linears(checkpoint)
    if f"{HEAD}.weight" not in checkpoint.specs:
        dense.append(HEAD)
    layers = [name.removesuffix(".weight") for name in checkpoint.specs]
    for layer in vllm_rules.with_fused(layers):
        if wrong := next((name for name in dense if name in layer), None):
            raise LrqatError(
                f"AWQ export: {wrong} stayed dense, but AWQ would then skip {layer} too, which contains its name; "
                "--skip that as well, or export to compressed-tensors"
            )
    return dense or None


def _weight_entries(layer: str, spec: FusedSpec, fused: Callable[[], FusedTensor]) -> list[Entry]:
    grid, (rows, columns) = affine(spec.grid), spec.shape
    groups = columns // grid.columns_per_group(columns, layer)

    def qzeros() -> Tensor:
        symmetric = torch.full((rows, groups), grid.midpoint, dtype=torch.uint8)
        return pack(fused().parts.get("zeros", symmetric))

    return [
        Entry(f"{layer}.qweight", torch.int32, (columns, rows // PER_WORD), lambda: pack(fused().codes_OI)),
        Entry(f"{layer}.qzeros", torch.int32, (groups, rows // PER_WORD), qzeros),
        Entry(f"{layer}.scales", torch.float16, (groups, rows), lambda: fused().parts["scales"].T),
    ]


def pack(codes_OI: Tensor) -> Tensor:
    """uint8 [O, I] -> int32 [I, O/8]; some rows at a time, which are turned as words while they are in the cache."""
    rows, columns = codes_OI.shape
    packed_IW = torch.empty(columns, rows // PER_WORD, dtype=torch.int32)
    for place_IT, codes in zip(packed_IW.split(TILE, 1), codes_OI.split(TILE * PER_WORD), strict=True):
        outputs_T8I = codes.contiguous().numpy().reshape(-1, PER_WORD, columns)
        octets_TI4 = np.empty((len(outputs_T8I), columns, PER_WORD // 2), np.uint8)
        for byte in range(PER_WORD // 2):
            low, high = AWQ_ORDER[2 * byte], AWQ_ORDER[2 * byte + 1]
            octets_TI4[:, :, byte] = outputs_T8I[:, low] + outputs_T8I[:, high] * np.uint8(1 << BITS)
        place_IT.copy_(torch.from_numpy(octets_TI4.view(np.int32)[:, :, 0]).T)
    return packed_IW


def unpack(words: Tensor) -> Tensor:
    """int32 [I, O/8] -> uint8 [O, I]."""
    stored_OI = unpacked(words, BITS).T.contiguous()
    codes_OI = torch.empty_like(stored_OI)
    for place, index in enumerate(AWQ_ORDER):
        codes_OI[index::PER_WORD] = stored_OI[place::PER_WORD]
    return codes_OI


def read(path: Path) -> FusedCheckpoint:
    """Decode an AWQ directory to codes, scales and zeros, each when asked for; also what others wrote."""
    directory = QuantizedDirectory(path, "AWQ", ("awq",))
    group = _group_size(directory)
    specs = {}
    for layer in directory.layers("qweight"):
        (columns, words), (groups, rows) = (directory.matrix(f"{layer}.{part}") for part in ("qweight", "scales"))
        directory.expect(f"{layer}.qweight", (columns, rows // PER_WORD), torch.int32)
        directory.expect(f"{layer}.qzeros", (groups, words), torch.int32)
        directory.expect(f"{layer}.scales", (groups, words * PER_WORD), *FLOATS)
        if columns != groups * (columns if group == -1 else group):
            raise directory.error(f"{layer} has {groups} groups in {columns} columns, which are not groups of {group}")
        specs[f"{layer}.weight"] = FusedSpec(read_grid(BITS, columns, groups, False), (rows, columns))

    def make(layer: str, spec: FusedSpec) -> FusedTensor:
        parts = {
            "scales": directory.half(f"{layer}.scales").T.contiguous(),
            "zeros": unpack(directory.get(f"{layer}.qzeros")),
        }
        return FusedTensor(unpack(directory.get(f"{layer}.qweight")), parts, spec.grid)

    return directory.checkpoint(specs, [f"{name.removesuffix('.weight')}.{p}" for name in specs for p in PARTS], make)


def _group_size(directory: QuantizedDirectory) -> int:
    config: dict[str, Any] = directory.config
    bits = config.get("bits", config.get("w_bit"))
    group = config.get("group_size", config.get("q_group_size"))
    version, zeros = config.get("version", "gemm"), config.get("zero_point", True)
    plain = isinstance(group, int) and bits == BITS and (group == -1 or group > 0)
    if not plain or not isinstance(group, int) or str(version).lower() != "gemm" or zeros is not True:
        raise directory.error(
            f"cannot read AWQ with bits {bits!r}, group_size {group!r}, version {version!r} and zero_point {zeros!r}"
        )
    return group
