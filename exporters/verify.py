"""Does an exported file hold the very weights of the checkpoint? Read back with the format's own reader."""

from __future__ import annotations

import torch
from torch import Tensor

from lrqat.errors import LrqatError
from lrqat.fused import FusedCheckpoint, FusedTensor
from lrqat.ranges import row_tiles


def count_equal(checkpoint: FusedCheckpoint, exported: FusedCheckpoint) -> tuple[int, int, list[str]]:
    """(quantized weights equal in every bit, quantized weights, names of all tensors that differ).

    What is compared are weights, whatever grid the format spells them in: w4 per channel is the very w4g32 whose
    scales repeat. Dense tensors are compared as float32, into which all their dtypes go exactly.
    """
    differing = [name for name in checkpoint.tensors if not _same(checkpoint, exported, name)]
    equal = len(checkpoint.tensors) - len(differing)
    differing += [name for name in checkpoint.dense if not _same(checkpoint, exported, name)]
    differing += sorted({*exported.tensors, *exported.dense} - {*checkpoint.tensors, *checkpoint.dense})
    return equal, len(checkpoint.tensors), differing


def _same(checkpoint: FusedCheckpoint, exported: FusedCheckpoint, name: str) -> bool:
    """Row tile by row tile: beside the two stored tensors, no float32 copy of either exists."""
    if name not in exported.tensors and name not in exported.dense:
        return False
    ours, theirs = _stored(checkpoint, name), _stored(exported, name)
    shapes = [tuple(t.codes_OI.shape if isinstance(t, FusedTensor) else t.shape) for t in (ours, theirs)]
    if shapes[0] != shapes[1]:
        return False
    if len(shapes[0]) != 2:
        return torch.equal(_floats(ours, slice(None)), _floats(theirs, slice(None)))
    return all(torch.equal(_floats(ours, rows), _floats(theirs, rows)) for rows in row_tiles(*shapes[0]))


def _stored(checkpoint: FusedCheckpoint, name: str) -> FusedTensor | Tensor:
    return checkpoint.tensors[name] if name in checkpoint.tensors else checkpoint.dense[name]


def _floats(stored: FusedTensor | Tensor, rows: slice) -> Tensor:
    return stored.rows(rows).dequantize() if isinstance(stored, FusedTensor) else stored[rows].float()


def verify(checkpoint: FusedCheckpoint, exported: FusedCheckpoint, where: object) -> int:
    """Number of quantized weights, all of them bitwise equal.

    Raises:
        LrqatError: some tensor differs.
    """
    _, total, differing = count_equal(checkpoint, exported)
    if differing:
        raise LrqatError(f"{where}: {len(differing)} tensors differ from the checkpoint, the first is {differing[0]}")
    return total
