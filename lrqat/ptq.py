"""Post-training quantization into the same fused checkpoint: the baseline, and the start, of training.

Round to nearest works weight by weight, when the checkpoint is written. AWQ, GPTQ and rotations change the whole model
before (`lrqat.begin`); then its weights are rounded in the same way, with GPTQ's parts where it found some.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrqat.assign import Assignment
from lrqat.begin import check_layers, prepare, tell_uncalibrated, untie
from lrqat.console import device, log
from lrqat.data import blocks, draw
from lrqat.errors import LrqatError
from lrqat.fused import FusedCheckpoint, FusedSpec, FusedTensor, Lazy
from lrqat.grid import Grid
from lrqat.layers import effective_config, stored_dense, stored_dtype
from lrqat.models import Base
from lrqat.plan import plan
from lrqat.provenance import provenance
from lrqat.ranges import start
from lrqat.safestream import tensor_bytes
from lrqat.settings import Beginning
from lrqat.sites import checkpoint_tensors
from lrqat.starts.codes import rounded

RTN = Beginning()
CALIBRATION_SEED = 0  # of which blocks are drawn from the text


def rtn(weight_OI: Tensor, grid: Grid, p: float | None, name: str = "weight") -> FusedTensor:
    """Round to nearest with the parts that `lrqat.ranges.start` finds (min-max when p is None)."""
    return rounded(weight_OI, start(weight_OI, grid, p, name), grid)


def quantize(
    base: Base,
    grid: Grid,
    p: float | None,
    skip: Sequence[str],
    dtype: torch.dtype,
    out: Path,
    override: Sequence[str] = (),
    beginning: Beginning = RTN,
) -> Path:
    """Quantize a whole model into `out`/fused; returns that path.

    Args:
        base: the model.
        grid: of all that no override names.
        p: exponent of the range search; None: min-max.
        skip: regular expressions of what stays as it is.
        dtype: that weights are read in, changed and rounded from.
        out: the run's directory.
        override: PATTERN=GRID (`lrqat.assign`).
        beginning: what is done before weights are rounded; by default, nothing.
    """
    if (out / "run.json").exists():
        raise LrqatError(f"{out}: holds a training run; name another --out")
    skeleton = base.skeleton()
    untie(skeleton, beginning)
    decided = plan(skeleton, Assignment.make(grid, override, skip))
    log(f"{base.source}: {decided}")
    settings = {"model": base.source, "grid": str(grid), "range_p": p, "override": list(override), "skip": list(skip)}
    calibration_NT = torch.empty(0, beginning.seq_len, dtype=torch.int64)
    more: dict[str, Any] = dict(tell_uncalibrated(decided, beginning))
    if beginning.calibrated:
        text_NT = blocks(beginning.data, base.tokenizer, beginning.seq_len, enough=beginning.blocks)
        calibration_NT = draw(text_NT, beginning.blocks or 0, CALIBRATION_SEED)
        more["data_sha256"] = hashlib.sha256(tensor_bytes(calibration_NT)).hexdigest()
        log(f"{base.source}: {len(calibration_NT)} calibration blocks of {beginning.seq_len} tokens")
    model = base.model(dtype)
    parts = {}
    if beginning.changes:
        settings |= dataclasses.asdict(beginning)
        check_layers(model, beginning)
        stored = stored_dtype(model, base.config)
        parts = prepare(model.to(device()), decided, beginning, calibration_NT, p, stored)
    weights = checkpoint_tensors(model)
    specs = {name: FusedSpec(g, tuple(weights[name].shape)) for name, g in decided.grids.items()}  # type: ignore[arg-type]
    dense = stored_dense(model, base.config, specs)

    def fuse(name: str) -> FusedTensor:
        weight_OI, own = weights[name], specs[name].grid
        return rounded(weight_OI, parts[name], own) if name in parts else rtn(weight_OI, own, p, name)

    checkpoint = FusedCheckpoint(
        tensors=Lazy(specs, fuse),
        dense=dense,
        specs=specs,
        dense_specs=dense.specs,
        hf_config=effective_config(model, base.config),
        assets=base.assets,
        provenance=provenance(beginning.method, settings, base.sha256(), decided.skipped, **more),
    )
    return checkpoint.save(out / "fused")
