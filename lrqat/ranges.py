"""The start of a weight: parts of its grid with little rounding error, found row tile by row tile."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lrqat.errors import LrqatError
from lrqat.grid import Grid
from lrqat.settings import MAX_RANGE_P

TILE_WEIGHTS = 1 << 18  # elements that stay in a core's L2 cache with their temporaries
# A GPU's kernel reads and writes 32 MB of them, which takes 16 to 32 us at 2 to 1 TB/s; to launch it takes 5 to 10
GPU_TILE_WEIGHTS = 1 << 22
COMPILED_WEIGHTS = 1 << 20  # of one call of a compiled function, whose temporaries stay in registers


def row_tiles(rows: int, columns: int, elements: int | None = None) -> list[slice]:
    """Slices of rows, each of about so many elements (TILE_WEIGHTS)."""
    step = max(1, (elements or TILE_WEIGHTS) // columns)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def tile_weights(device: torch.device, compiled: bool = False) -> int:
    """How many elements are worked on at once there, by a compiled function or a plain one."""
    if device.type != "cpu":
        return GPU_TILE_WEIGHTS
    return COMPILED_WEIGHTS if compiled else TILE_WEIGHTS


def weight_tiles(weight_OI: Tensor) -> list[slice]:
    """Slices of rows as they suit the device that the weight lies on."""
    rows, columns = weight_OI.shape
    return row_tiles(rows, columns, tile_weights(weight_OI.device))


def fill(weight_OI: Tensor, make: Callable[[slice], Tensor]) -> Tensor:
    """What `make` gives for each row tile of a weight, put together without a second copy."""
    filled: Tensor | None = None
    for tile in weight_tiles(weight_OI):
        values_KX = make(tile)
        if filled is None:
            filled = values_KX.new_empty(len(weight_OI), *values_KX.shape[1:])
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
    grid.columns_per_group(weight_OI.shape[1], name)
    if p is not None and not 0 < p <= MAX_RANGE_P:
        raise LrqatError(f"range_p: expected above 0 and at most {MAX_RANGE_P}, or min-max, got {p}")
    found: dict[str, list[Tensor]] = {}
    for tile in weight_tiles(weight_OI):
        weight_KI = weight_OI[tile].float()
        if not torch.isfinite(weight_KI).all():
            raise LrqatError(f"{name}: holds NaN or infinite weights; the model file is damaged")
        for part, values in grid.fit(weight_KI, p).items():
            found.setdefault(part, []).append(values)
    return {part: torch.cat(values) for part, values in found.items()}
