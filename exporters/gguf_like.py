"""The grids of another GGUF file, tensor by tensor: `lrqat train --like model-Q4_K_M.gguf`.

llama-quantize and those who publish files give some tensors more bits than others, by rules that change from one
release to the next. Here the file itself says which. What comes of it is a grid and overrides as `--grid` and
`--override` take them, so that a run holds all that it was trained on, and its export has the file's types and size:

    blk.0.ffn_down Q6_K, blk.1.ffn_down Q4_K    ->    re:model\\.layers\\.0\\.mlp\\.down_proj$=q6_k    (q4_k: default)

Linear layers that the file holds as floats stay dense.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path

from exporters import gguf_arch
from exporters.gguf_blocks import BLOCK_TYPES
from exporters.gguf_read import FLOATS, TIED
from lrqat.errors import LrqatError
from lrqat.gguf_file import GgufFile

DENSE = "dense"  # as --override has it


def grids_like(path: Path, config: Mapping[str, object]) -> tuple[str, list[str]]:
    """(the grid of most weights, overrides for the others).

    Args:
        path: the file; of its tensors only the headers are read.
        config: config.json of the model that is to be quantized so.

    Raises:
        LrqatError: a type that lrqat has no grid for; a file of another architecture, or of other sizes.
    """
    file = GgufFile(path)
    ours = gguf_arch.architecture(config)
    theirs, own = _said(gguf_arch.architecture_of(file)), _said(ours)
    if theirs != own:
        raise LrqatError(f"--like {path}: a file of {theirs}, the model has {own}; name a file of this very model")
    names = ours.names()
    outside = [
        f"re:{re.escape(names[gguf][0].removesuffix('.weight'))}$={grid}"
        for gguf in ("token_embd.weight", TIED)
        if gguf in file.tensors and (grid := _grid(file, gguf)) != DENSE
    ]
    weights: Counter[str] = Counter()
    holders: dict[tuple[str, str], list[int]] = defaultdict(list)  # module and grid -> blocks
    for module, gguf in ours.family.modules.items():
        for block in range(ours.blocks):
            name = f"blk.{block}.{gguf}.weight"
            if name in file.tensors and len(file.tensors[name].shape) > 1:
                grid = _grid(file, name)
                holders[module, grid].append(block)
                weights[grid] += math.prod(file.tensors[name].shape)
    del weights[DENSE]
    if not weights:
        raise LrqatError(f"--like {path}: all its layers are floats; name a quantized file")
    default = weights.most_common(1)[0][0]
    overrides = [
        f"re:model\\.layers\\.{_layers(blocks, ours.blocks)}\\.{_escaped(module)}$={grid}"
        for (module, grid), blocks in holders.items()
        if grid != default
    ]
    return default, outside + overrides


def _said(found: gguf_arch.Architecture) -> str:
    """What two files of one model have in common."""
    experts = f", {found.experts} experts" if found.experts else ""
    return f"{found.family.name}, {found.blocks} layers, {found.heads} and {found.kv_heads} heads{experts}"


def _grid(file: GgufFile, name: str) -> str:
    """A tensor's grid as `--override` spells it."""
    kind = file.tensors[name].ggml_type
    if kind in FLOATS:
        return DENSE
    if kind not in BLOCK_TYPES:
        known = ", ".join(block.name for block in BLOCK_TYPES.values())
        raise LrqatError(f"--like {file.path}: {name} has ggml type {kind}; lrqat trains on {known}")
    return str(BLOCK_TYPES[kind].grid)


def _layers(blocks: list[int], count: int) -> str:
    """A regular expression for the numbers of these blocks."""
    if len(blocks) == count:
        return r"\d+"
    return str(blocks[0]) if len(blocks) == 1 else f"({'|'.join(map(str, blocks))})"


def _escaped(module: str) -> str:
    """A regular expression for a module of a block; all experts alike."""
    return r"\d+".join(map(re.escape, module.split("{}")))
