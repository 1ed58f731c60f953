"""How does the cost of a training step grow? CPU seconds against tokens, rank and parameters, with straight lines.

    python benchmarks/scaling.py --grid w4g32 --plot scaling.png

A Llama with random weights, SmolLM2's width; distillation loss, AdamW with global clipping, one thread. One thing at a
time is varied; all points of a sweep take steps in turn, and a point is the median over rounds. A line is fitted to
each sweep by least squares, and its R^2 told. Attention is the part that grows with the square of the sequence, so the
sweep over tokens is made with sequences of one length, and once more with one sequence of growing length.

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lrqat.begin import swap_for_training
from lrqat.command import set_threads
from lrqat.optimizer import make_optimizer
from lrqat.plan import plan
from lrqat.settings import TrainSettings
from lrqat.trainer import LossModel

SEQUENCE = 256
BASE: dict[str, int] = {"layers": 4, "rank": 32, "blocks": 2, "seq_len": SEQUENCE}
SWEEPS: dict[str, tuple[str, list[dict[str, int]]]] = {  # name -> (what the axis counts, what is varied)
    "tokens": ("tokens", [{"blocks": count} for count in (1, 2, 4, 8)]),
    "sequence": ("tokens", [{"blocks": 1, "seq_len": SEQUENCE * count} for count in (1, 2, 4, 8)]),
    "rank": ("rank", [{"rank": rank} for rank in (8, 32, 64, 128)]),
    "parameters": ("million weights", [{"layers": layers} for layers in (2, 4, 8, 12)]),
}
LEARNING_RATE = 1e-6


def prepared(
    grid: str, compile: bool, layers: int, rank: int, blocks: int, seq_len: int
) -> tuple[Callable[[], None], int]:
    """(a step, how many weights are quantized)."""
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8 * SEQUENCE,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    settings = TrainSettings("unused", "unused", grid=grid, rank=rank, range_p=None, compile=compile)
    decided = plan(model, settings.assignment, settings.rank)
    swap_for_training(model, decided, settings)
    loss = LossModel(model.train())
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer("adamw", [{"params": trained, "lr": LEARNING_RATE}])
    ids_BT = torch.randint(0, config.vocab_size, (blocks, seq_len))
    teacher_BTH = torch.randn(blocks, seq_len, config.hidden_size).to(torch.bfloat16)

    def step() -> None:
        loss(ids_BT, teacher_BTH)["loss"].backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step, decided.weights


def measure(points: Sequence[Callable[[], None]], rounds: int) -> list[float]:
    """CPU seconds of each step: the median over rounds."""
    samples: list[list[float]] = [[] for _ in points]
    for number in range(rounds + 1):
        for step, taken in zip(points, samples, strict=True):
            started = time.process_time()
            step()
            if number:  # the first compiles and takes memory from the system
                taken.append(time.process_time() - started)
    return [statistics.median(taken) for taken in samples]


def line(x: Sequence[float], y: Sequence[float]) -> dict[str, float]:
    """Least squares: y = fixed + each * x, and R^2."""
    each, fixed = np.polyfit(x, y, 1)
    left = np.asarray(y) - (fixed + each * np.asarray(x))
    return {"fixed": float(fixed), "each": float(each), "r2": float(1 - left.var() / np.var(y))}


def plot(sweeps: dict[str, Any], path: Path) -> None:
    """A panel for each sweep."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(sweeps), 3), layout="constrained")
    for axes, (name, found) in zip(figure.subplots(1, len(sweeps), squeeze=False)[0], sweeps.items(), strict=True):
        x = np.asarray(found["x"])
        axes.plot(x, found["fit"]["fixed"] + found["fit"]["each"] * x, color="0.6", linewidth=1)
        axes.plot(x, found["cpu_seconds"], "o")
        axes.set_title(f"{name}, R² {found['fit']['r2']:.4f}", fontsize=9)
        axes.set_xlabel(found["axis"])
        axes.set_ylim(0, 1.1 * max(found["cpu_seconds"]))
        axes.set_xlim(0, 1.1 * max(found["x"]))
    figure.axes[0].set_ylabel("CPU seconds a step")
    figure.savefig(path, dpi=150)


def main() -> None:
    """All sweeps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", default="w4g32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sweeps", nargs="+", choices=SWEEPS, default=list(SWEEPS))
    parser.add_argument("--compile", action="store_true", help="as lrqat train")
    parser.add_argument("--plot", type=Path, metavar="PNG")
    args = parser.parse_args()
    set_threads(1)
    sweeps: dict[str, Any] = {}
    for name in args.sweeps:
        axis, varied = SWEEPS[name]
        settings = [{**BASE, **change} for change in varied]
        points, weights = zip(*(prepared(args.grid, args.compile, **point) for point in settings), strict=True)
        values = {
            "tokens": [float(point["blocks"] * point["seq_len"]) for point in settings],
            "rank": [float(point["rank"]) for point in settings],
            "million weights": [count / 1e6 for count in weights],
        }[axis]
        seconds = measure(points, args.rounds)
        sweeps[name] = {"axis": axis, "x": values, "cpu_seconds": seconds, "fit": line(values, seconds)}
        shown = "  ".join(f"{x:.4g}: {y:.3f} s" for x, y in zip(values, seconds, strict=True))
        print(f"{name:11} {shown}   R2 {sweeps[name]['fit']['r2']:.4f}")
    if args.plot:
        plot(sweeps, args.plot)
    print(json.dumps({"benchmark": "scaling", "grid": args.grid, "compile": args.compile, "sweeps": sweeps}))


if __name__ == "__main__":
    main()
