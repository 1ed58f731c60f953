"""What a training run is told: one frozen dataclass, validated once. Its fields are the flags and recipe keys."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from lrqat.assign import Assignment
from lrqat.errors import LrqatError
from lrqat.grid import Grid

LOSSES = ("kd", "ce")
DTYPES = ("bfloat16", "float16", "float32")
TRAIN_DTYPES = ("bfloat16", "float32")  # float16 gradients underflow without loss scaling
METHODS = ("lrqat",)
DOWNCASTS = ("fixed", "int", "bf16")
MAX_RANGE_P = 16.0  # beyond, |error|^p leaves float32


@dataclass(frozen=True)
class TrainSettings:
    """Settings of `lrqat train`; see `lrqat train --help` for what each means."""

    model: str
    out: str
    grid: str = "w4g32"
    method: str = "lrqat"
    data: tuple[str, ...] = ()
    steps: int = 200
    batch_size: int = 2
    gradient_accumulation: int = 1
    seq_len: int = 512
    loss: str = "kd"
    rank: int = 32
    alpha: float | None = None
    downcast: str = "fixed"
    lr: float = 1e-2
    lr_scales: float = 4e-3
    warmup: float = 0.1
    range_p: float | None = 3.5
    override: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    dtype: str = "bfloat16"
    gradient_checkpointing: bool = False
    seed: int = 0
    save_every: int = 50

    def __post_init__(self) -> None:
        _ = self.assignment  # refuses grids and patterns that are none
        choices = {"loss": LOSSES, "dtype": TRAIN_DTYPES, "method": METHODS, "downcast": DOWNCASTS}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise LrqatError(f"{name}: expected one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name in ("steps", "batch_size", "gradient_accumulation", "rank", "save_every"):
            if getattr(self, name) < 1:
                raise LrqatError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.seq_len < 2:
            raise LrqatError(f"seq_len: expected at least 2, got {self.seq_len}")
        for name in ("lr", "lr_scales"):
            if not 0 <= getattr(self, name) < math.inf:
                raise LrqatError(f"{name}: expected a finite number of at least 0, got {getattr(self, name)}")
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise LrqatError(f"alpha: expected a finite number above 0, got {self.alpha}")
        if self.range_p is not None and not 0 < self.range_p <= MAX_RANGE_P:
            raise LrqatError(f"range_p: expected above 0 and at most {MAX_RANGE_P}, or min-max, got {self.range_p}")
        if not 0 <= self.warmup < 1:
            raise LrqatError(f"warmup: expected a share of the steps in [0, 1), got {self.warmup}")

    @property
    def assignment(self) -> Assignment:
        """Which grid each weight gets."""
        return Assignment.make(Grid.parse(self.grid), self.override, self.skip)

    @property
    def blocks_needed(self) -> int:
        """Blocks that the run sees, if there is enough text."""
        return self.steps * self.batch_size * self.gradient_accumulation

    def to_dict(self) -> dict[str, Any]:
        """For JSON and for the run's fingerprint."""
        return dataclasses.asdict(self)
