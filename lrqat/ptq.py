"""Post-training quantization into the same fused checkpoint: the baseline, and the start, of training."""

from __future__ import annotations

import platform
from pathlib import Path

import torch
from torch import Tensor

import lrqat
from lrqat.errors import LrqatError
from lrqat.fused import FusedCheckpoint, FusedSpec, FusedTensor, Lazy, Spec
from lrqat.grid import Grid, to_latent
from lrqat.layers import dense_tensors, effective_config, linear_names
from lrqat.models import Base
from lrqat.ranges import row_tiles, start


def rtn(weight_OI: Tensor, grid: Grid, p: float | None, name: str = "weight") -> FusedTensor:
    """Round to nearest with the parts that `lrqat.ranges.start` finds (min-max when p is None)."""
    parts = start(weight_OI, grid, p, name)
    affine = grid.affine(parts)
    tiles = []
    for rows in row_tiles(*weight_OI.shape):
        tiles.append(grid.encode(grid.nearest(to_latent(weight_OI[rows], affine.rows(rows)))))
    return FusedTensor.make(torch.cat(tiles), parts, grid)


def quantize(base: Base, grid: Grid, p: float | None, skip: tuple[str, ...], dtype: torch.dtype, out: Path) -> Path:
    """RTN of a whole model, written to `out`/fused; returns that path."""
    if (out / "run.json").exists():
        raise LrqatError(f"{out}: holds a training run; name another --out")
    skeleton = base.skeleton()
    for name in linear_names(skeleton, skip):
        grid.columns_per_group(skeleton.get_submodule(name).weight.shape[1], f"{name}.weight")
    model = base.model(dtype)
    names = [f"{name}.weight" for name in linear_names(model, skip)]
    specs = {name: FusedSpec(grid, tuple(model.get_parameter(name).shape)) for name in names}
    dense = {name: tensor for name, tensor in dense_tensors(model).items() if name not in specs}
    checkpoint = FusedCheckpoint(
        tensors=Lazy(specs, lambda name: rtn(model.get_parameter(name).detach(), grid, p, name)),
        dense=dense,
        specs=specs,
        dense_specs={name: Spec(tensor.dtype, tuple(tensor.shape)) for name, tensor in dense.items()},
        hf_config=effective_config(model, base.config),
        assets=base.assets,
        provenance={
            "method": "rtn",
            "settings": {"model": base.source, "grid": str(grid), "range_p": p, "skip": list(skip)},
            "base_sha256": base.sha256(),
            "versions": {"lrqat": lrqat.__version__, "torch": torch.__version__, "python": platform.python_version()},
        },
    )
    return checkpoint.save(out / "fused")
