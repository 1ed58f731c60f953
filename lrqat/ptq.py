"""Post-training quantization into the same fused checkpoint: the baseline, and the start, of training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lrqat.assign import Assignment
from lrqat.console import log
from lrqat.errors import LrqatError
from lrqat.fused import FusedCheckpoint, FusedSpec, FusedTensor, Lazy, Spec
from lrqat.grid import Grid, to_latent
from lrqat.layers import dense_tensors, effective_config
from lrqat.models import Base
from lrqat.plan import plan
from lrqat.provenance import provenance
from lrqat.ranges import row_tiles, start
from lrqat.sites import checkpoint_tensors


def rtn(weight_OI: Tensor, grid: Grid, p: float | None, name: str = "weight") -> FusedTensor:
    """Round to nearest with the parts that `lrqat.ranges.start` finds (min-max when p is None)."""
    parts = start(weight_OI, grid, p, name)
    affine = grid.affine(parts)
    tiles = []
    for rows in row_tiles(*weight_OI.shape):
        tiles.append(grid.encode(grid.nearest(to_latent(weight_OI[rows], affine.rows(rows)))))
    return FusedTensor.make(torch.cat(tiles), parts, grid)


def quantize(
    base: Base,
    grid: Grid,
    p: float | None,
    skip: Sequence[str],
    dtype: torch.dtype,
    out: Path,
    override: Sequence[str] = (),
) -> Path:
    """RTN of a whole model, written to `out`/fused; returns that path.

    Args:
        base: the model.
        grid: of all that no override names.
        p: exponent of the range search; None: min-max.
        skip: regular expressions of what stays as it is.
        dtype: of the dense weights.
        out: the run's directory.
        override: PATTERN=GRID (`lrqat.assign`).
    """
    if (out / "run.json").exists():
        raise LrqatError(f"{out}: holds a training run; name another --out")
    decided = plan(base.skeleton(), Assignment.make(grid, override, skip))
    log(f"{base.source}: {decided}")
    model = base.model(dtype)
    weights = checkpoint_tensors(model)
    specs = {name: FusedSpec(g, tuple(weights[name].shape)) for name, g in decided.grids.items()}  # type: ignore[arg-type]
    dense = {name: tensor for name, tensor in dense_tensors(model).items() if name not in specs}
    checkpoint = FusedCheckpoint(
        tensors=Lazy(specs, lambda name: rtn(weights[name], specs[name].grid, p, name)),
        dense=dense,
        specs=specs,
        dense_specs={name: Spec(tensor.dtype, tuple(tensor.shape)) for name, tensor in dense.items()},
        hf_config=effective_config(model, base.config),
        assets=base.assets,
        provenance=provenance(
            "rtn",
            {"model": base.source, "grid": str(grid), "range_p": p, "override": list(override), "skip": list(skip)},
            base.sha256(),
            decided.skipped,
        ),
    )
    return checkpoint.save(out / "fused")
