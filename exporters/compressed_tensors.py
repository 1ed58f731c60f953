"""compressed-tensors: one Hugging Face directory that vLLM, transformers and llm-compressor's tools load.

Per quantized linear X (HF parameter X.weight, [O, I]); b bits, G groups along I:

    format "pack-quantized"
    X.weight_packed       int32    [O, ceil(I*b/32)]   codes, packed along I (exporters/packing.py), densely
    X.weight_scale        float16  [O, G]
    X.weight_zero_point   int32    [ceil(O*b/32), G]   asymmetric grids only: z, packed along O
    X.weight_shape        int64    [2]                 O, I
        w[o, i] = weight_scale[o, g] * (code[o, i] - z[o, g]),   symmetric: z = 2^(b-1)

    format "int-quantized" (W8A8: activations are rounded to int8 per token as they come)
    X.weight              int8     [O, I]              code - 128
    X.weight_scale        float32  [O, 1]

All other parameters keep their names and dtypes. config.json gains `quantization_config`: one group of `config_groups`
per grid. A single grid targets the class "Linear" and lists what stayed dense under `ignore`; several grids name their
linears one by one.

At 3, 5, 6 and 7 bits codes cross words, as vLLM 0.32.0 and the library from 0.18 on have it; the library up to 0.17
put 32 // b codes in a word. The reader knows both by their shapes.

Sources: vllm-project/compressed-tensors 0.20.0 compressors/pack_quantized/helpers.py (`pack_to_int32`), 0.17.0
likewise, quantization/quant_args.py, quant_config.py; vllm 0.32.0 model_executor/layers/quantization/
compressed_tensors/compressed_tensors.py, schemes/compressed_tensors_wNa16.py, compressed_tensors_w8a8_int8.py.

Refuses: grids that are not affine or have a minimum; int8 activations on 8-bit weights that are not symmetric and per
channel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from exporters import hf_directory
from exporters.hf_directory import FLOATS, HEAD, QuantizedDirectory, affine, read_grid, unpacked
from exporters.packing import WORD_BITS, codes_per_block, pack
from exporters.refusal import Refusal
from lrqat.errors import LrqatError
from lrqat.fused import FusedCheckpoint, FusedSpec, FusedTensor
from lrqat.grid import Grid
from lrqat.grids.affine import AffineGrid
from lrqat.safestream import Entry

PACKED, INT8, MIXED = "pack-quantized", "int-quantized", "mixed-precision"
INT8_GRID = (8, -1, "midpoint")  # bits, group_size and zero of weights that meet int8 activations
TOKENS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}  # activations
SIGN = 0x80  # code - 128 as a byte

Activations = Literal["int8"] | None


def carries(
    grid: Grid, shape: tuple[int, int], name: str = "weight", activations: Activations = None
) -> Refusal | None:
    """Why compressed-tensors cannot store this grid in this shape exactly, or None."""
    if not isinstance(grid, AffineGrid) or grid.zero == "minimum":
        return Refusal(f"{name}: compressed-tensors stores integer zeros, not grid {grid}", "use --grid w4g32-asym")
    if grid.group_size != -1 and shape[1] % grid.group_size:
        return Refusal(
            f"{name}: group_size {grid.group_size} does not divide in_features {shape[1]}",
            f"use --grid {AffineGrid(grid.bits, -1, grid.zero, grid.scale_precision)} (per channel)",
        )
    if activations == "int8" and grid.bits == 8 and not meets_int8(grid):
        return Refusal(
            f"{name}: int8 activations need symmetric 8-bit weights per channel, not {grid}", "use --grid w8"
        )
    return None


def check(checkpoint: FusedCheckpoint, *, activations: Activations = None) -> None:
    """Refuse what cannot be written, from names, shapes and grids."""
    if activations not in (None, "int8"):
        raise LrqatError(f"activations: expected int8 or nothing, got {activations!r}")
    hf_directory.check(
        checkpoint, "compressed-tensors", lambda grid, shape, name: carries(grid, shape, name, activations)
    )
    if activations and not any(meets_int8(spec.grid) for spec in checkpoint.specs.values()):
        raise LrqatError("compressed-tensors export: int8 activations, but no weight is on grid w8; use --grid w8")


def write(checkpoint: FusedCheckpoint, out_dir: Path, *, activations: Activations = None) -> Path:
    """Write the directory; memory is bounded by the largest tensor, and the name appears only when complete.

    Args:
        checkpoint: what training handed over.
        out_dir: replaced if it is an earlier export.
        activations: "int8" serves symmetric 8-bit weights per channel with int8 activations; weights of fewer
            bits stay weight-only.
    """
    check(checkpoint, activations=activations)

    def weight_entries(layer: str, spec: FusedSpec, fused: Callable[[], FusedTensor]) -> list[Entry]:
        int8 = activations and meets_int8(spec.grid)
        return (_int8_entries if int8 else _packed_entries)(layer, spec, fused)

    # On CPUs with AMX vLLM's int8 kernel takes bfloat16 alone (float16 aborts it); weight_scale stays float32.
    others = [affine(spec.grid) for spec in checkpoint.specs.values() if not meets_int8(spec.grid)]
    exact = all(grid.scale_precision == "portable" for grid in others)
    dtype = "bfloat16" if activations and exact else None
    config = _quantization_config(checkpoint, activations)
    return hf_directory.write(checkpoint, out_dir, weight_entries, config, dtype)


def meets_int8(grid: Grid) -> bool:
    """Weights on this grid meet int8 activations."""
    grid = affine(grid)
    return (grid.bits, grid.group_size, grid.zero) == INT8_GRID


def _packed_entries(layer: str, spec: FusedSpec, fused: Callable[[], FusedTensor]) -> list[Entry]:
    grid, (rows, columns) = affine(spec.grid), spec.shape
    groups = columns // grid.columns_per_group(columns, layer)

    def weight() -> Tensor:
        return _dense_words(fused().codes_OI, grid.bits)

    def zeros() -> Tensor:
        return _dense_words(fused().parts["zeros"].T, grid.bits).T

    entries = [
        Entry(f"{layer}.weight_packed", torch.int32, (rows, _words(columns, grid.bits)), weight),
        Entry(f"{layer}.weight_scale", torch.float16, (rows, groups), lambda: fused().parts["scales"]),
        Entry(f"{layer}.weight_shape", torch.int64, (2,), lambda: torch.tensor([rows, columns])),
    ]
    if not grid.symmetric:
        entries.append(Entry(f"{layer}.weight_zero_point", torch.int32, (_words(rows, grid.bits), groups), zeros))
    return entries


def _int8_entries(layer: str, spec: FusedSpec, fused: Callable[[], FusedTensor]) -> list[Entry]:
    rows = spec.shape[0]
    return [
        Entry(f"{layer}.weight", torch.int8, spec.shape, lambda: (fused().codes_OI ^ SIGN).view(torch.int8)),
        Entry(f"{layer}.weight_scale", torch.float32, (rows, 1), lambda: fused().parts["scales"].float()),
    ]


def _words(codes: int, bits: int) -> int:
    return math.ceil(codes * bits / WORD_BITS)


def _dense_words(codes: Tensor, bits: int) -> Tensor:
    """uint8 [rows, n] -> int32 [rows, ceil(n*b/32)]; what the codes do not fill is 0."""
    count = codes.shape[1]
    if missing := -count % codes_per_block(bits):
        codes = pad(codes, (0, missing))
    words = pack(codes, bits)
    return words[:, : _words(count, bits)].clone(memory_format=torch.contiguous_format) if missing else words


def _quantization_config(checkpoint: FusedCheckpoint, activations: Activations) -> dict[str, Any]:
    schemes: dict[str, dict[str, Any]] = {}
    layers: dict[str, list[str]] = {}
    for name, spec in checkpoint.specs.items():
        scheme = _scheme(affine(spec.grid), activations)
        schemes[str(scheme)] = scheme
        layers.setdefault(str(scheme), []).append(name.removesuffix(".weight"))
    quantized_head = f"{HEAD}.weight" in checkpoint.specs
    ignore = [*hf_directory.dense_linears(checkpoint), *([] if quantized_head else [HEAD])]
    if len(schemes) == 1:
        targets = [["Linear", f"re:.*{HEAD}"] if quantized_head else ["Linear"]]  # vLLM's head is no Linear
    else:
        targets = list(layers.values())
    formats = {scheme["format"] for scheme in schemes.values()}
    groups = [{"targets": t, **scheme} for t, scheme in zip(targets, schemes.values(), strict=True)]
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else MIXED,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "config_groups": {f"group_{number}": group for number, group in enumerate(groups)},
        "ignore": ignore,
    }


def _scheme(grid: AffineGrid, activations: Activations) -> dict[str, Any]:
    int8 = activations is not None and meets_int8(grid)
    weights = {
        "num_bits": grid.bits,
        "type": "int",
        "symmetric": grid.symmetric,
        "strategy": "channel" if grid.group_size == -1 else "group",
        "group_size": None if grid.group_size == -1 else grid.group_size,
        "dynamic": False,
        "actorder": None,
    }
    return {
        "weights": weights,
        "input_activations": {**TOKENS, "group_size": None} if int8 else None,
        "output_activations": None,
        "format": INT8 if int8 else PACKED,
    }


def read(path: Path) -> FusedCheckpoint:
    """Decode a compressed-tensors directory to codes, scales and zeros, each when asked for; also what others wrote.

    Bits, groups and zeros are those of the tensors' shapes; the config must know them. `provenance` says
    {"activations": "int8"} where the config rounds them.
    """
    directory = QuantizedDirectory(path, "compressed-tensors", ("compressed-tensors",))
    known = {(*weights, form) for *weights, form, _ in _declared(directory)}
    int8 = any(inputs for *_, inputs in _declared(directory))
    specs: dict[str, FusedSpec] = {}
    parts: list[str] = []
    dense: dict[str, bool] = {}  # how the codes of a layer are packed
    for layer in directory.layers("weight_scale"):
        packed = f"{layer}.weight_packed" in directory.specs
        grid, shape, dense[layer] = (_packed_grid if packed else _int8_grid)(directory, layer, known)
        specs[f"{layer}.weight"] = FusedSpec(grid, shape)
        stored = ("weight_packed", "weight_shape", "weight_zero_point") if packed else ("weight",)
        parts += [f"{layer}.{part}" for part in (*stored, "weight_scale")]

    def make(layer: str, spec: FusedSpec) -> FusedTensor:
        grid, (rows, columns) = affine(spec.grid), spec.shape
        found = {"scales": directory.half(f"{layer}.weight_scale")}
        if f"{layer}.weight_packed" not in directory.specs:
            codes_OI = directory.get(f"{layer}.weight").view(torch.uint8) ^ SIGN
            return FusedTensor(codes_OI, found, grid)
        take = unpacked if dense[layer] else _by_word
        if not grid.symmetric:
            words = directory.get(f"{layer}.weight_zero_point").T
            found["zeros"] = take(words, grid.bits)[:, :rows].T.contiguous()
        codes_OI = take(directory.get(f"{layer}.weight_packed"), grid.bits)[:, :columns].contiguous()
        return FusedTensor(codes_OI, found, grid)

    return directory.checkpoint(specs, parts, make, {"activations": "int8"} if int8 else {})


def _packed_grid(
    directory: QuantizedDirectory, layer: str, known: set[tuple[Any, ...]]
) -> tuple[AffineGrid, tuple[int, int], bool]:
    """Grid, shape, and whether words are dense."""
    (rows, words), (_, groups) = (directory.matrix(f"{layer}.{part}") for part in ("weight_packed", "weight_scale"))
    directory.expect(f"{layer}.weight_shape", (2,), torch.int64, torch.int32)
    stored_rows, columns = directory.get(f"{layer}.weight_shape").tolist()
    symmetric = f"{layer}.weight_zero_point" not in directory.specs
    group = columns // groups
    if stored_rows != rows or columns < 1 or columns % groups or f"{layer}.weight_g_idx" in directory.specs:
        raise directory.error(
            f"{layer} has {groups} groups in {columns} columns, {stored_rows} rows of {rows}, or g_idx"
        )
    fitting = [
        (bits, dense)
        for dense in (True, False)
        for bits in range(2, 9)
        if words == (_words(columns, bits) if dense else math.ceil(columns / (WORD_BITS // bits)))
        and any((bits, g, symmetric, PACKED) in known for g in ([-1, group] if groups == 1 else [group]))
        and (dense or WORD_BITS % bits)
    ]
    fitting = [fit for fit in fitting if fit[1]] or fitting  # below 160 columns both may fit
    if len(fitting) != 1:
        raise directory.error(
            f"{layer}: {words} words for {columns} columns in groups of {group} fit {len(fitting)} of the grids in "
            "quantization_config; export it again"
        )
    [(bits, dense)] = fitting
    directory.expect(f"{layer}.weight_packed", (rows, words), torch.int32)
    directory.expect(f"{layer}.weight_scale", (rows, groups), *FLOATS)
    if not symmetric:
        zero_words = _words(rows, bits) if dense else math.ceil(rows / (WORD_BITS // bits))
        directory.expect(f"{layer}.weight_zero_point", (zero_words, groups), torch.int32)
    return read_grid(bits, columns, groups, symmetric), (rows, columns), dense


def _int8_grid(
    directory: QuantizedDirectory, layer: str, known: set[tuple[Any, ...]]
) -> tuple[AffineGrid, tuple[int, int], bool]:
    rows, columns = directory.matrix(f"{layer}.weight")
    directory.expect(f"{layer}.weight", (rows, columns), torch.int8)
    directory.expect(f"{layer}.weight_scale", (rows, 1), *FLOATS)
    if (8, -1, True, INT8) not in known or f"{layer}.weight_zero_point" in directory.specs:
        raise directory.error(f"{layer} is int8, but quantization_config names no symmetric int8 channels")
    return read_grid(8, columns, 1, True), (rows, columns), True


def _by_word(words: Tensor, bits: int) -> Tensor:
    """32 // b codes a word, the rest unused: as the library packed up to 0.17."""
    places = range(0, WORD_BITS // bits * bits, bits)
    return torch.stack([(words >> place & ((1 << bits) - 1)).to(torch.uint8) for place in places], 2).flatten(1)


def _declared(directory: QuantizedDirectory) -> Iterator[tuple[int, int, bool, str, bool]]:
    """(bits, group_size, symmetric, format, int8 activations) of every group of the config."""
    for key in ("transform_config", "kv_cache_scheme", "sparsity_config"):
        found = directory.config.get(key)
        if found and not (key == "sparsity_config" and isinstance(found, dict) and found.get("format") == "dense"):
            raise directory.error(f"quantization_config has a {key}, which changes what the model computes")
    groups = directory.config.get("config_groups")
    for name, group in groups.items() if isinstance(groups, dict) else [("config_groups", groups)]:
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(group, dict) or not isinstance(weights, dict):
            raise directory.error(f"quantization_config: {name} is no group with weights; export it again")
        form = group.get("format") or directory.config.get("format")
        bits, size, symmetric = weights.get("num_bits"), weights.get("group_size"), weights.get("symmetric", True)
        size = -1 if size is None and weights.get("strategy") == "channel" else size
        plain = isinstance(bits, int) and 2 <= bits <= 8 and isinstance(size, int) and (size == -1 or size > 0)
        if (
            not plain
            or not isinstance(symmetric, bool)
            or weights.get("type", "int") != "int"
            or form not in (PACKED, INT8)
        ):
            raise directory.error(
                f"cannot read {form!r} with num_bits {bits!r}, group_size {size!r}, symmetric {symmetric!r} "
                f"and type {weights.get('type')!r}"
            )
        inputs = group.get("input_activations")
        tokens = inputs is None or (form == INT8 and isinstance(inputs, dict) and TOKENS.items() <= inputs.items())
        if not tokens or group.get("output_activations"):
            raise directory.error(
                f"cannot read activations other than int8 per token, symmetric and dynamic, in {name}"
            )
        assert isinstance(bits, int) and isinstance(size, int) and isinstance(form, str)
        yield bits, size, symmetric, form, inputs is not None
