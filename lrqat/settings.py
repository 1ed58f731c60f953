"""What a run is told: frozen dataclasses, validated once. Their fields are the flags and recipe keys."""

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
OFFLOADS = ("disk", "cpu")
OPTIMIZERS = ("adamw", "adamw8bit")  # `lrqat.optimizer`
DOWNCASTS = ("fixed", "eq7", "int", "bf16")
STARTS = ("rtn", "gptq", "awq", "awq+gptq")
ACTIVATIONS = {"8": (8, False), "4": (4, False), "int8": (8, True)}  # (bits, symmetric) of `lrqat.activations`
KV = {"8": 8, "4": 4}  # bits of `lrqat.kv`
NONE = "none"  # of both: not at all, whatever the run that is continued or judged has
MAX_RANGE_P = 16.0  # beyond, |error|^p leaves float32
CALIBRATION_BLOCKS = 64
BLOCK_LR_SCALES = 3e-3

# What only some methods take, with their defaults; the others refuse it.
BLOCKS: dict[str, Any] = {"block_epochs": None, "block_lr": None, "block_lr_scales": None}
METHODS: dict[str, dict[str, Any]] = {
    "lrqat": {"rank": 32, "alpha": None, "downcast": "fixed", "loftq": False, "lr": 1e-2, **BLOCKS},
    "lsq": {"lr": 1e-4, **BLOCKS},
    "l4q": {"rank": 4, "alpha": None, "lr": 3e-3, **BLOCKS},
    "scales": {"block_epochs": None, "block_lr_scales": None},
    "efficientqat": {"lr": 1e-4, **BLOCKS, "block_epochs": 2},
}
CHOSEN = ("rank", "alpha", "downcast", "loftq", "lr", "block_epochs", "block_lr", "block_lr_scales")


@dataclass(frozen=True)
class Beginning:
    """What is done to the weights before they are rounded, and the text for it; of `lrqat train` and `lrqat ptq`.

    Attributes:
        method: one of STARTS.
        rotate: seed of a rotation that folds into the weights; None: none.
        untie_head: a tied head may become a parameter of its own, which a rotation needs.
        data: sources of calibration text.
        seq_len: tokens of a calibration block.
        blocks: how many there are; None where nothing is calibrated.
    """

    method: str = "rtn"
    rotate: int | None = None
    untie_head: bool = False
    data: tuple[str, ...] = ()
    seq_len: int = 512
    blocks: int | None = None

    def __post_init__(self) -> None:
        one_of("start", self.method, STARTS)
        if self.untie_head and self.rotate is None:
            raise LrqatError("untie_head: only a rotation unties the head; leave it out, or give --rotate SEED")
        if self.calibrated and (self.blocks or 0) < 2:
            raise LrqatError(f"calibration_blocks: expected at least 2, got {self.blocks}")

    @property
    def steps(self) -> list[str]:
        """The start's parts: ["awq", "gptq"] of awq+gptq."""
        return self.method.split("+")

    @property
    def calibrated(self) -> bool:
        """It needs text."""
        return self.method != "rtn"

    @property
    def changes(self) -> bool:
        """The model's weights are changed before they are rounded."""
        return self.calibrated or self.rotate is not None


@dataclass(frozen=True)
class TrainSettings:
    """Settings of `lrqat train`; see `lrqat train --help` for what each means. None: the method's default."""

    model: str
    out: str
    grid: str = "w4g32"
    method: str = "lrqat"
    start: str = "rtn"
    rotate: int | None = None
    untie_head: bool = False
    calibration_blocks: int | None = None
    data: tuple[str, ...] = ()
    steps: int = 200
    batch_size: int = 2
    gradient_accumulation: int = 1
    seq_len: int = 512
    answers_only: bool = False
    loss: str = "kd"
    teacher: str | None = None
    rank: int | None = None
    alpha: float | None = None
    downcast: str | None = None
    loftq: bool = False
    lr: float | None = None
    lr_scales: float = 4e-3
    block_epochs: int | None = None
    block_lr: float | None = None
    block_lr_scales: float | None = None
    activations: str | None = None
    kv: str | None = None
    optimizer: str = "adamw"
    warmup: float = 0.1
    range_p: float | None = 3.5
    override: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    dtype: str = "bfloat16"
    gradient_checkpointing: bool = False
    compile: bool = False
    shard: bool = False
    offload: str | None = None
    seed: int = 0
    save_every: int = 50

    def __post_init__(self) -> None:
        _ = self.assignment  # refuses grids and patterns that are none
        one_of("method", self.method, METHODS)
        one_of("loss", self.loss, LOSSES)
        one_of("dtype", self.dtype, TRAIN_DTYPES)
        one_of("optimizer", self.optimizer, OPTIMIZERS)
        self._choose()
        if self.activations is not None:
            one_of("activations", self.activations, (NONE, *ACTIVATIONS))
        if self.kv is not None:
            one_of("kv", self.kv, (NONE, *KV))
        if self.offload is not None:
            one_of("offload", self.offload, OFFLOADS)
        if self.downcast is not None:
            one_of("downcast", self.downcast, DOWNCASTS)
        for name in ("steps", "batch_size", "gradient_accumulation", "rank", "save_every", "block_epochs"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise LrqatError(f"{name}: expected at least 1, got {value}")
        if self.seq_len < 2:
            raise LrqatError(f"seq_len: expected at least 2, got {self.seq_len}")
        for name in ("lr", "lr_scales", "block_lr", "block_lr_scales"):
            if (value := getattr(self, name)) is not None and not 0 <= value < math.inf:
                raise LrqatError(f"{name}: expected a finite number of at least 0, got {value}")
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise LrqatError(f"alpha: expected a finite number above 0, got {self.alpha}")
        if self.range_p is not None and not 0 < self.range_p <= MAX_RANGE_P:
            raise LrqatError(f"range_p: expected above 0 and at most {MAX_RANGE_P}, or min-max, got {self.range_p}")
        if not 0 <= self.warmup < 1:
            raise LrqatError(f"warmup: expected a share of the steps in [0, 1), got {self.warmup}")
        self._combine()

    def _choose(self) -> None:
        """Put the method's defaults where nothing was given; refuse what the method does not take."""
        defaults = METHODS[self.method]
        for name in CHOSEN:
            given = getattr(self, name)
            if name not in defaults and given not in (None, False):
                takers = " and ".join(method for method, taken in METHODS.items() if name in taken)
                raise LrqatError(f"{name}: method {self.method} has none, only {takers}; leave it out")
            if name in defaults and given is None:
                object.__setattr__(self, name, defaults[name])
        if self.block_epochs is None:
            for name in ("block_lr", "block_lr_scales"):
                if getattr(self, name) is not None:
                    raise LrqatError(f"{name}: is of Block-AP; give --block-epochs too, or leave it out")
        elif self.lr_scales == 0 and self.block_lr_scales is not None:
            raise LrqatError("block_lr_scales: lr_scales 0 freezes the scales in both stages; leave one of them out")
        elif self.lr_scales > 0 and self.block_lr_scales is None:
            object.__setattr__(self, "block_lr_scales", BLOCK_LR_SCALES)
        calibrated = self.start != "rtn" or self.block_epochs is not None
        if calibrated and self.calibration_blocks is None:
            object.__setattr__(self, "calibration_blocks", CALIBRATION_BLOCKS)
        if not calibrated and self.calibration_blocks is not None:
            raise LrqatError(
                "calibration_blocks: start rtn needs none, without block_epochs; leave it out, or use --start gptq"
            )

    def _combine(self) -> None:
        """Refuse settings that are sound alone but not together."""
        _ = self.beginning
        if self.shard and self.offload is not None:
            raise LrqatError("shard: the frozen weights lie elsewhere already; leave it or --offload out")
        if self.answers_only and not self.data:
            raise LrqatError("answers_only: the default text is no conversation; name conversations with --data")
        if self.teacher is not None and self.loss != "kd":
            raise LrqatError(f"teacher: loss {self.loss} has none; use --loss kd, or leave it out")
        if self.block_epochs and (self.calibration_blocks or 0) < 2:
            raise LrqatError(f"calibration_blocks: expected at least 2, got {self.calibration_blocks}")
        if self.lr_scales == 0 and self.method in ("scales", "efficientqat"):
            raise LrqatError(f"lr_scales: at 0, method {self.method} has nothing to train; give --lr-scales")
        if self.block_lr_scales == 0 and self.method == "scales":
            raise LrqatError("block_lr_scales: at 0, method scales has nothing to train by blocks; give another")
        if self.loftq and self.downcast != "int":
            raise LrqatError(f"loftq: downcast {self.downcast} loses nothing to make up for; use --downcast int")

    @property
    def assignment(self) -> Assignment:
        """Which grid each weight gets."""
        return Assignment.make(Grid.parse(self.grid), self.override, self.skip)

    @property
    def beginning(self) -> Beginning:
        """What is done before the weights are rounded."""
        return Beginning(self.start, self.rotate, self.untie_head, self.data, self.seq_len, self.calibration_blocks)

    @property
    def blocks_trained(self) -> int:
        """Blocks that the steps see, if there is enough text."""
        return self.steps * self.batch_size * self.gradient_accumulation

    @property
    def blocks_needed(self) -> int:
        """Blocks that the run sees, calibration's and then the steps', if there is enough text."""
        return (self.calibration_blocks or 0) + self.blocks_trained

    def to_dict(self) -> dict[str, Any]:
        """For JSON and for the run's fingerprint."""
        return dataclasses.asdict(self)


def one_of(name: str, value: Any, allowed: Any) -> None:
    """Refuse what is no choice."""
    if value not in allowed:
        raise LrqatError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")
