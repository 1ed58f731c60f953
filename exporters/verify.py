"""Does an exported file hold the very weights of the checkpoint? Read back with the format's own reader."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lrqat.errors import LrqatError
from lrqat.fused import FusedCheckpoint


def count_equal(checkpoint: FusedCheckpoint, exported: Mapping[str, Tensor]) -> tuple[int, int, list[str]]:
    """(quantized weights equal in every bit, quantized weights, names of all tensors that differ).

    Dense tensors are compared as float32, into which all their dtypes go exactly.
    """
    differing = [name for name in checkpoint.tensors if not _same(exported, name, checkpoint.tensors[name].dequantize)]
    equal = len(checkpoint.tensors) - len(differing)
    for name in checkpoint.dense:
        if not _same(exported, name, checkpoint.dense[name].float):
            differing.append(name)
    differing += sorted(set(exported) - {*checkpoint.tensors, *checkpoint.dense})
    return equal, len(checkpoint.tensors), differing


def _same(exported: Mapping[str, Tensor], name: str, make: object) -> bool:
    assert callable(make)
    return name in exported and torch.equal(exported[name].float(), make())


def verify(checkpoint: FusedCheckpoint, exported: Mapping[str, Tensor], where: object) -> int:
    """Number of quantized weights, all of them bitwise equal.

    Raises:
        LrqatError: some tensor differs.
    """
    _, total, differing = count_equal(checkpoint, exported)
    if differing:
        raise LrqatError(f"{where}: {len(differing)} tensors differ from the checkpoint, the first is {differing[0]}")
    return total
