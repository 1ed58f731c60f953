"""A long training looked at while it runs: RUN/tensorboard, for `tensorboard --logdir RUN`.

    train/loss, train/grad_norm, train/lr, train/tokens_per_second, train/peak_memory_gb     every step
    codes/moved     share of the weights whose code differs from the start's, whenever a checkpoint is saved

The same figures as in metrics.jsonl. Needs the package tensorboard (`pip install 'lrqat[tensorboard]'`); without it
there is no log and no error.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lrqat.shards import is_sharded
from lrqat.statistics import moved_codes
from lrqat.trainer import Metrics

SHOWN = ("loss", "grad_norm", "lr", "tokens_per_second", "peak_memory_gb")


def board_is_there() -> bool:
    """Whether tensorboard is installed."""
    return importlib.util.find_spec("tensorboard") is not None


class Board(TrainerCallback):
    """Writes what `metrics` has recorded last; add it after `metrics`."""

    def __init__(self, folder: Path, metrics: Metrics) -> None:
        self.folder = folder
        self.metrics = metrics
        self.writer: Any = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Open the log; on a resumed run, what a killed one wrote after its last checkpoint is hidden."""
        if state.is_world_process_zero:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(self.folder), purge_step=state.global_step + 1)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The figures of this step."""
        row = self.metrics.row
        if self.writer is not None and row.get("step") == state.global_step:
            for name in SHOWN:
                if row[name] is not None:
                    self.writer.add_scalar(f"train/{name}", row[name], state.global_step)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any, **_: Any
    ) -> None:
        """The share of moved codes: one pass over the weights, so only as often as checkpoints."""
        if self.writer is not None and not any(is_sharded(p) for p in model.parameters()):
            self.writer.add_scalar("codes/moved", moved_codes(model), state.global_step)
            self.writer.flush()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Close the log."""
        if self.writer is not None:
            self.writer.close()
