"""The start of a weight: parts of its grid with little rounding error, found row tile by row tile."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lrqat.errors import LrqatError
from lrqat.grid import Grid
from lrqat.settings import MAX_RANGE_P

TILE_WEIGHTS = 1 << 18  # elements that stay in a core's L2 cache with their temporaries
COMPILED_WEIGHTS = 1 << 20  # of one call of a compiled function, whose temporaries stay in registers


def row_tiles(rows: int, columns: int, elements: int | None = None) -> list[slice]:
    """Slices of rows, each of about so many elements (TILE_WEIGHTS)."""
    step = max(1, (elements or TILE_WEIGHTS) // columns)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def fill(rows: int, columns: int, make: Callable[[slice], Tensor]) -> Tensor:
    """What `make` gives for each row tile of a weight [rows, columns], put together without a second copy."""
    filled: Tensor | None = None
    for tile in row_tiles(rows, columns):
        values_KX = make(tile)
        if filled is None:
            filled = values_KX.new_empty(rows, *values_KX.shape[1:])
        filled[tile] = values_KX
    assert filled is not None
    return filled


def start(weight_OI: Tensor, grid: Grid, p: float | None, name: str = "weight") -> dict[str, Tensor]:
    """The grid's parts for a weight, float32 in wire values.

    Args:
        weight_OI: float weights [O, I].
        grid: any grid.
        p: exponent of the search (`lrqat.grids.search`); None for min-max.
        name: named in errors.
    """
    rows, columns = weight_OI.shape
    grid.columns_per_group(columns, name)
    if p is not None and not 0 < p <= MAX_RANGE_P:
        raise LrqatError(f"range_p: expected above 0 and at most {MAX_RANGE_P}, or min-max, got {p}")
    found: dict[str, list[Tensor]] = {}
    for tile in row_tiles(rows, columns):
        weight_KI = weight_OI[tile].float()
        if not torch.isfinite(weight_KI).all():
            raise LrqatError(f"{name}: holds NaN or infinite weights; the model file is damaged")
        for part, values in grid.fit(weight_KI, p).items():
            found.setdefault(part, []).append(values)
    return {part: torch.cat(values) for part, values in found.items()}
