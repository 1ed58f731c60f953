"""The Hugging Face Trainer, with our loss, our parameter groups, and checkpoints without pickle.

A checkpoint holds adapters and scales (adapters.safetensors), Adam's moments and the random state
(optimizer.safetensors), schedules (scheduler.json) and Trainer's own trainer_state.json, which is written
last: a directory without it was cut short and is not resumed from. Frozen weights are never written; they
are made again from the base model.
"""

from __future__ import annotations

import json
import math
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lrqat.console import log, peak_memory_gb
from lrqat.errors import LrqatError
from lrqat.fused import read_json
from lrqat.jsonfile import read_metrics
from lrqat.losses import Head, final_states, head_loss, head_of
from lrqat.optimizer import load_state, state_of
from lrqat.pages import give_back, only_read
from lrqat.ranks import agreed

DROPOUT = ("dropout", "attention_dropout", "activation_dropout", "layerdrop")  # floats of transformers' modules


def give_back_mapped(module: Any, *_: Any) -> None:
    """Let go of an embedding's pages. Looked at every time: were it copied meanwhile, its values would be gone."""
    if only_read(module.weight):
        give_back(module.weight)


class LossModel(nn.Module):
    """A causal language model that maps token ids (and a teacher's states) to the loss alone.

    Args:
        model: a swapped model.
        teacher_VH: the weight of the teacher's head, where the model's own is rounded.
    """

    teacher_VH: Tensor | None

    def __init__(self, model: Any, teacher_VH: Tensor | None = None) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("teacher_VH", teacher_VH, persistent=False)
        model.get_input_embeddings().register_forward_hook(give_back_mapped)

    def forward(
        self,
        input_ids: Tensor,
        teacher: Tensor | None = None,
        answers: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The loss (`loss`): KD against the teacher's final hidden states [B, T, H] if given, else next-token CE.

        With answers, bool [B, T], the mean is over the tokens that predict one; the head sees no others. Where
        positions [B, T] begin again, another text begins.
        """
        hidden_BTH = final_states(self.model.base_model, input_ids, position_ids)
        head = head_of(self.model)
        head = head._replace(mapped=only_read(head.weight_VH))
        taught = None if self.teacher_VH is None else Head(self.teacher_VH, head.cap, only_read(self.teacher_VH))
        if answers is not None:
            next_BT = answers[:, 1:]
            hidden_1KH = hidden_BTH[:, :-1][next_BT][None]
            if teacher is not None:
                return {"loss": head_loss(hidden_1KH, head, teacher[:, :-1][next_BT][None], taught)}
            return {"loss": head_loss(hidden_1KH, head, input_ids[:, 1:][next_BT][None])}
        if teacher is not None:
            return {"loss": head_loss(hidden_BTH, head, teacher, taught)}
        return {"loss": head_loss(hidden_BTH[:, :-1], head, input_ids[:, 1:])}

    def trained(self) -> dict[str, Tensor]:
        """The parameters that training changes."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}


def without_dropout(model: Any) -> None:
    """The student drops nothing, as its teacher did not; train mode itself is what checkpointing asks for."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in DROPOUT:
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


class LowRankTrainer(Trainer):
    """Trainer whose checkpoints hold what training changed, in safetensors and JSON.

    The model is on its device already. For several processes on a CPU that is "cpu:0" to transformers and accelerate,
    and moving a model there from "cpu" would copy all of it, mapped weights too.
    """

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.accelerator.device_placement = False

    def _move_model_to_device(self, model: torch.nn.Module, device: torch.device) -> None:
        pass

    def get_train_dataloader(self) -> DataLoader:
        """The data set in its order: it is this process's own (`lrqat.ranks.share`), not to be dealt out again."""
        return DataLoader(
            self.train_dataset, self.args.per_device_train_batch_size, pin_memory=self.args.dataloader_pin_memory
        )

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_whole({n: p.detach().cpu() for n, p in self.model.trained().items()}, folder / "adapters.safetensors")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any | None = None) -> None:
        saved = load_whole(Path(resume_from_checkpoint) / "adapters.safetensors")
        trained = self.model.trained()
        assert saved.keys() == trained.keys()  # the run's fingerprint was compared before
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(saved[name])

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.args.should_save:
            return
        tensors, groups = state_of(self.optimizer)
        tensors["rng"] = torch.random.get_rng_state()
        if torch.cuda.is_available():
            tensors["rng.cuda"] = torch.cuda.random.get_rng_state()
        save_whole(tensors, Path(output_dir) / "optimizer.safetensors")
        schedule = {"groups": groups, "scheduler": self.lr_scheduler.state_dict()}
        (Path(output_dir) / "scheduler.json").write_text(json.dumps(schedule, default=float))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        tensors = load_whole(Path(checkpoint) / "optimizer.safetensors")
        schedule = read_json(Path(checkpoint) / "scheduler.json")
        torch.random.set_rng_state(tensors.pop("rng"))
        if "rng.cuda" in tensors:
            torch.cuda.random.set_rng_state(tensors.pop("rng.cuda"))
        load_state(self.optimizer, tensors, schedule["groups"])
        self.lr_scheduler.load_state_dict(schedule["scheduler"])

    def _save_rng_state(self, output_dir: str) -> None:
        """Kept with the optimizer."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Kept with the optimizer."""


def save_whole(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a checkpoint's file, or one line that says why not."""
    try:
        save_file(tensors, path)
    except (SafetensorError, OSError) as error:
        raise LrqatError(f"{path}: cannot be written ({error}); free some space and --resume") from None


def load_whole(path: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint's file, or one line that says what to do."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise LrqatError(
            f"{path}: damaged ({error}); delete {path.parent.name} to resume from an earlier one"
        ) from None


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run."""
    whole = [p.parent for p in folder.glob("checkpoint-*/trainer_state.json") if _is_json(p)]
    return max(whole, key=lambda p: int(p.name.rpartition("-")[2]), default=None)


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text())
    except ValueError:
        return False
    return True


class Metrics(TrainerCallback):
    """One line per logged step in metrics.jsonl, and the same figures on the progress bar or in the log."""

    def __init__(self, path: Path, tokens_per_step: int) -> None:
        self.path = path
        self.tokens_per_step = tokens_per_step
        self.bar: Any = None
        self.started = 0.0
        self.first_step = 0
        self.row: dict[str, Any] = {}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Drop lines that a killed run wrote after its last checkpoint; open the bar."""
        import sys

        from tqdm import tqdm

        self.started = time.monotonic()
        self.first_step = state.global_step
        if not state.is_world_process_zero:
            return
        kept = read_metrics(self.path) if state.global_step else []
        with open(self.path, "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in kept if row["step"] <= state.global_step)
        if sys.stderr.isatty():
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="train", dynamic_ncols=True)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Record loss, gradient norm, learning rate, tokens/s and peak memory; stop at a loss that is no number."""
        if not logs or "loss" not in logs:
            return
        if not math.isfinite(logs["loss"]):
            raise LrqatError(f"step {state.global_step}: the loss is {logs['loss']}; lower --lr or --lr-scales")
        if not math.isfinite(logs.get("grad_norm") or 0.0):
            raise LrqatError(f"step {state.global_step}: the gradient is not finite; lower --lr or --lr-scales")
        if not state.is_world_process_zero:
            return
        elapsed = time.monotonic() - self.started
        done = state.global_step - self.first_step
        self.row = row = {
            "step": state.global_step,
            "loss": logs["loss"],
            "grad_norm": logs.get("grad_norm"),
            "lr": logs.get("learning_rate"),
            "tokens": state.global_step * self.tokens_per_step,
            "tokens_per_second": done * self.tokens_per_step / elapsed,
            "peak_memory_gb": peak_memory_gb(),
            "seconds": elapsed,
        }
        with open(self.path, "a") as file:
            file.write(json.dumps(row) + "\n")
        text = f"loss {row['loss']:.4f}  {row['tokens_per_second']:.0f} tok/s  {row['peak_memory_gb']:.2f} GB"
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(state.global_step - self.bar.n)
        elif done % max(1, state.max_steps // 50) == 0 or state.global_step == state.max_steps:
            left = elapsed / done * (state.max_steps - state.global_step)
            log(f"step {state.global_step}/{state.max_steps}  {text}  {left / 60:.1f} min left")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()


class StopOnSignal(TrainerCallback):
    """Ctrl-C (or SIGTERM) finishes the step, saves a checkpoint and stops; a second one stops at once.

    Of several processes all stop behind the same step, whichever of them got the signal.
    """

    def __init__(self) -> None:
        self.asked = self.stopped = False
        self.previous: dict[int, Any] = {}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Take the signals."""
        for number in (signal.SIGINT, signal.SIGTERM):
            self.previous[number] = signal.signal(number, self._stop)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        log("stopping after this step; once more to stop at once")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Ask Trainer for a checkpoint and the end."""
        self.stopped = agreed(self.asked)
        if self.stopped:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Give the signals back."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)
