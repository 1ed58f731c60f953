"""Which ggml type holds a grid exactly, and a weight restated on that type's own lattice.

The first row that fits, the smallest, is taken; "groups" are whole rows too.

    grid                       groups divisible by   type     what becomes of the parts
    symmetric 2 bits           64                    Q2_0     s repeated in every block
    symmetric 2, 3 bits        256                   Q3_K     d = s, sc = 1
    symmetric 2 to 4 bits      32                    Q4_0     s repeated
    symmetric 5 bits           32                    Q5_0     s repeated
    symmetric 6 to 8 bits      32                    Q8_0     s repeated
    minimum, 2 to 4 bits       32                    Q4_1     s and m repeated
    minimum, 5 bits            32                    Q5_1     s and m repeated
    integer zero, 2 bits       256                   Q2_K     d = dmin = s, sc = 1, mn = z
    integer zero, 3, 4 bits    256                   Q4_K     likewise
    integer zero, 5 bits       256                   Q5_K     likewise
    q2_k .. q6_k, iq4_nl, mxfp4, tq2_0               themselves

Codes move by the difference of the two zeros: w3 code q is Q4_0's q + 4. Nothing is rounded.

Refuses: integer zeros of smaller groups (Q4_1 stores -s * z in fp16, which holds less than half of them), more than
5 bits with a minimum or an integer zero, groups that blocks of 32 cannot follow.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from exporters.gguf_blocks import (
    BLOCK_TYPES,
    Q2_0,
    Q2_K,
    Q3_K,
    Q4_0,
    Q4_1,
    Q4_K,
    Q5_0,
    Q5_1,
    Q5_K,
    Q8_0,
    BlockType,
)
from exporters.refusal import Refusal
from lrqat.errors import LrqatError
from lrqat.fused import FusedTensor
from lrqat.grid import Grid
from lrqat.grids.affine import AffineGrid
from lrqat.grids.kquant import KGrid

SMALLEST_BLOCK = 32
# Zero of an affine grid -> (most bits, groups must be a multiple of, type), smallest first.
CARRIERS = {
    "midpoint": ((2, 64, Q2_0), (3, 256, Q3_K), (4, 32, Q4_0), (5, 32, Q5_0), (8, 32, Q8_0)),
    "minimum": ((4, 32, Q4_1), (5, 32, Q5_1)),
    "integer": ((2, 256, Q2_K), (4, 256, Q4_K), (5, 256, Q5_K)),
}


def block_type(grid: Grid, shape: tuple[int, int], name: str = "weight") -> BlockType:
    """The type that a weight is written as.

    Raises:
        LrqatError: none holds it, or the groups do not divide its columns.
    """
    found = _choose(grid, shape[1], name)
    if isinstance(found, Refusal):
        raise LrqatError(str(found))
    return found


def carries(grid: Grid, shape: tuple[int, int], name: str = "weight") -> Refusal | None:
    """Why GGUF cannot hold this weight exactly, or None."""
    found = _choose(grid, shape[1], name)
    return found if isinstance(found, Refusal) else None


def restate(tensor: FusedTensor, kind: BlockType) -> FusedTensor:
    """Some rows of a weight on the type's own grid: the same numbers."""
    grid, target = tensor.grid, kind.grid
    if grid == target:
        return tensor
    assert isinstance(grid, AffineGrid)
    rows, columns = tensor.codes_OI.shape
    wire, blocks = target.parts(rows, columns), columns // kind.columns
    if isinstance(target, AffineGrid):
        shift = target.midpoint - grid.midpoint if grid.symmetric else 0
        parts = {name: _spread(tensor.parts[name], blocks) for name in wire}
    else:
        assert isinstance(target, KGrid)
        shift = -target.first - grid.midpoint if grid.symmetric else 0
        super_scales = _spread(tensor.parts["scales"], blocks)
        sub_scales = torch.ones(wire["sub_scales"].shape, dtype=wire["sub_scales"].dtype)
        parts = {"super_scales": super_scales, "sub_scales": sub_scales}
        if target.minimums:
            parts["super_minimums"] = super_scales
            parts["sub_minimums"] = _spread(tensor.parts["zeros"], sub_scales.shape[1])
    return FusedTensor(tensor.codes_OI + shift if shift else tensor.codes_OI, parts, target)


def _choose(grid: Grid, columns: int, name: str) -> BlockType | Refusal:
    group = grid.columns_per_group(columns, name)
    if not isinstance(grid, AffineGrid):
        return next(kind for kind in BLOCK_TYPES.values() if kind.grid == grid)
    for most, multiple, kind in CARRIERS[grid.zero]:
        if grid.bits <= most and group % multiple == 0:
            return kind
    if grid.zero == "integer":
        reason = f"{name}: GGUF carries no integer zeros of this width in groups of {group} exactly (grid {grid})"
    elif group % SMALLEST_BLOCK:
        reason = f"{name}: GGUF stores blocks of {SMALLEST_BLOCK} columns, which groups of {group} do not fill"
    else:
        reason = f"{name}: GGUF carries minimums with up to 5 bits (grid {grid})"
    blocks = replace(grid, group_size=SMALLEST_BLOCK)
    for other in (blocks, replace(blocks, zero="minimum", scale_precision="fp16"), replace(blocks, zero="midpoint")):
        if columns % SMALLEST_BLOCK == 0 and _fitting(other):
            return Refusal(reason, f"train on {other}")
    return Refusal(reason, "skip this layer (--skip)")


def _fitting(grid: AffineGrid) -> bool:
    """Some type holds this grid, whose groups are blocks of 32."""
    return any(grid.bits <= most and multiple == SMALLEST_BLOCK for most, multiple, _ in CARRIERS[grid.zero])


def _spread(part_OG: Tensor, groups: int) -> Tensor:
    """Each value repeated, [O, groups]."""
    return part_OG.repeat_interleave(groups // part_OG.shape[1], dim=1)
