"""Import: a model that is quantized already, as a fused checkpoint, so that it can be exported, checked or trained on.

Integers and scales are taken as they are; the grid follows from the format.

Refuses: formats without a reader, and what the reader refuses.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from exporters.formats import detect, read
from lrqat.errors import LrqatError
from lrqat.fused import FusedCheckpoint, FusedTensor, Lazy
from lrqat.grids.affine import AffineGrid
from lrqat.grids.wire import to_wire
from lrqat.hashing import sha256
from lrqat.models import locate

HEAD = "lm_head.weight"


def import_checkpoint(path: Path) -> FusedCheckpoint:
    """The fused checkpoint of a quantized model; its tensors stay lazy.

    Of a GGUF file, configuration and tokenizer are what transformers makes of the metadata.
    """
    path = Path(path)
    form, found = detect(path), read(path)
    if not found.specs:
        raise LrqatError(f"{path}: holds no quantized weight; it is a model to train")
    if form == "gguf":
        base = locate(str(path))
        tied = HEAD not in found.specs and HEAD not in found.dense_specs
        found = replace(found, hf_config={**base.config, "tie_word_embeddings": tied}, assets=base.assets)
    found = replace(found, **simplest(found))
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    provenance = {"method": "import", "source": str(path), "format": form, "sha256": sha256(files)}
    return replace(found, provenance={**found.provenance, **provenance})


def simplest(checkpoint: FusedCheckpoint) -> dict[str, Any]:
    """`specs` and `tensors` on the simplest grids that hold them; reads every weight of an affine grid once.

    Zeros that are all the midpoint are left out (AWQ spells symmetric grids so), and scales that bfloat16 holds
    too are portable.
    """
    specs = dict(checkpoint.specs)
    for name, spec in checkpoint.specs.items():
        grid = spec.grid
        if not isinstance(grid, AffineGrid) or grid.zero == "minimum":
            continue
        parts = checkpoint.tensors[name].parts
        if grid.zero == "integer" and bool((parts["zeros"] == grid.midpoint).all()):
            grid = replace(grid, zero="midpoint")
        if torch.equal(to_wire(parts["scales"].float(), "portable"), parts["scales"].float()):
            grid = replace(grid, scale_precision="portable")
        specs[name] = replace(spec, grid=grid)

    def make(name: str) -> FusedTensor:
        tensor, grid = checkpoint.tensors[name], specs[name].grid
        wanted = grid.parts(*specs[name].shape)
        return FusedTensor(tensor.codes_OI, {part: tensor.parts[part] for part in wanted}, grid)

    return {"specs": specs, "tensors": Lazy(specs, make)}
