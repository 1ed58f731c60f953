"""`lrqat plan`: will it fit, and how long does a step take? From config.json and headers; no weight is read."""

from __future__ import annotations

import argparse
import dataclasses
import re
from typing import Any

from lrqat.command import show
from lrqat.errors import LrqatError
from lrqat.settings import DOWNCASTS, LOSSES, METHODS, OFFLOADS, OPTIMIZERS, TRAIN_DTYPES, TrainSettings

UNITS = {"M": 1e6, "G": 1e9, "T": 1e12}
SETTINGS = (
    *("grid", "method", "rank", "downcast", "loss", "dtype", "offload", "optimizer", "seq_len"),
    *("batch_size", "gradient_accumulation", "steps", "gradient_checkpointing", "override", "skip"),
)
# What to try where it does not fit, from the cheapest on; each goes on top of those before.
SAVINGS: tuple[dict[str, Any], ...] = (
    {"gradient_checkpointing": True},
    {"downcast": "int"},
    {"batch_size": 1},
    {"offload": "disk"},  # of a GPU: in the CPU's memory
)


def plan_flags(p: argparse.ArgumentParser) -> None:
    """Flags of `lrqat plan` beside the grid's: those of `lrqat train` that matter."""
    p.add_argument("model", help="a Hugging Face directory, a hub id, or a GGUF file")
    p.add_argument("--method", choices=[name for name in METHODS if name != "efficientqat"], help="as of lrqat train")
    p.add_argument("--rank", type=int, help="of A and B")
    p.add_argument("--downcast", choices=DOWNCASTS, help="storage of Phi0")
    p.add_argument("--seq-len", type=int, help="tokens a block")
    p.add_argument("--batch-size", type=int, help="blocks a forward pass")
    p.add_argument("--gradient-accumulation", type=int, help="forward passes a step")
    p.add_argument("--steps", type=int, help="optimizer steps: for the whole time, and the text that is touched")
    p.add_argument("--loss", choices=LOSSES, help="kd holds the teacher's logits too")
    p.add_argument("--dtype", choices=TRAIN_DTYPES, help="of activations and dense weights")
    p.add_argument("--gradient-checkpointing", action="store_true", default=None, help="recompute layers in backward")
    p.add_argument("--offload", choices=OFFLOADS, help="where frozen weights live")
    p.add_argument("--optimizer", choices=OPTIMIZERS, help="with moments in 32 or 8 bits")
    p.add_argument(
        "--memory", metavar="SIZE", help="of the GPU to train on: 24G (10^9 bytes each); by default, this machine's CPU"
    )
    p.set_defaults(body=plan_command)


def plan_command(args: argparse.Namespace) -> int:
    """Body of `lrqat plan`: status 1 where it does not fit."""
    limit = None if args.memory is None else parse_size(args.memory)
    given = {name: getattr(args, name) for name in SETTINGS if getattr(args, name) is not None}
    given |= {name: tuple(given[name]) for name in ("override", "skip") if name in given}
    settings = TrainSettings(args.model, "unused", **given)

    from lrqat.estimate import available_bytes, estimate, measure_speed, step_seconds
    from lrqat.models import locate
    from lrqat.plan import plan

    skeleton = locate(args.model).skeleton()
    decided = plan(skeleton, settings.assignment, settings.rank)
    gpu = limit is not None
    if settings.offload == "cpu" and not gpu:
        raise LrqatError("offload cpu: this plan is for the CPU, in whose memory the weights are anyway; give --memory")
    found = estimate(skeleton, decided, settings, gpu)
    limit = available_bytes() if limit is None else limit
    rows: dict[str, Any] = {"model": args.model, "weights": str(decided)}
    rows |= {f"{name}_gb": nbytes / 1e9 for name, nbytes in found.parts.items()}
    rows |= {"loading_gb": found.loading / 1e9} if gpu else {}
    rows |= {"peak_gb": found.total / 1e9, "memory_gb": limit / 1e9, "fits": found.total <= limit}
    if found.total > limit:
        rows["fits_with"] = None
        tried = settings
        for saving in SAVINGS:
            if settings.method != "lrqat" and "downcast" in saving:
                continue
            if gpu and "offload" in saving:
                saving = {"offload": "cpu"}
            tried = dataclasses.replace(tried, **saving)
            if estimate(skeleton, decided, tried, gpu).total <= limit:
                rows["fits_with"] = flags(settings, tried)
                break
    if not gpu:
        rows["step_seconds"] = step_seconds(skeleton, decided, settings, measure_speed(decided, settings))
        rows["training_hours"] = rows["step_seconds"] * settings.steps / 3600
    show(rows, args.json)
    return 0 if rows["fits"] else 1


def parse_size(text: str) -> float:
    """24G, 24GB, 24 -> 24e9 bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([MGT]?)B?", text, re.IGNORECASE)
    if not found or not float(found[1]):
        raise LrqatError(f"--memory {text!r}: expected a size in 10^9 bytes, for example 24G")
    return float(found[1]) * UNITS[found[2].upper() or "G"]


def flags(before: TrainSettings, after: TrainSettings) -> str:
    """What to add to a command line."""
    changed = {f.name: getattr(after, f.name) for f in dataclasses.fields(after)}
    changed = {name: value for name, value in changed.items() if value != getattr(before, name)}
    words = [f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}") for name, value in changed.items()]
    return " ".join(words)
