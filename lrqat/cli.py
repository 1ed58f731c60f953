"""The `lrqat` command: train, ptq, plan, generate, eval, zeroshot, report, export, import, formats."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from exporters.commands import TARGETS_HELP, formats_flags, grid_for, import_flags, take_like
from lrqat.command import common_flags, run, set_threads, show, with_recipe
from lrqat.commands import KV_HELP, MODEL_HELP, eval_flags, generate_flags, zeroshot_flags
from lrqat.errors import LrqatError
from lrqat.planning import plan_flags
from lrqat.ranks import count, rank
from lrqat.report.command import report_flags
from lrqat.settings import (
    ACTIVATIONS,
    BLOCK_LR_SCALES,
    CALIBRATION_BLOCKS,
    DOWNCASTS,
    DTYPES,
    KV,
    LOSSES,
    METHODS,
    NONE,
    OFFLOADS,
    OPTIMIZERS,
    STARTS,
    TRAIN_DTYPES,
    Beginning,
    TrainSettings,
)

DEFAULTS = {field.name: field.default for field in dataclasses.fields(TrainSettings)}
GRID_HELP = "w<bits>[g<group size>][-asym|-min], or a ggml type: w4g32, w3, q4_k"
LIKE_HELP = "in place of --grid: every weight on the grid that this GGUF file of the same model has for it, as Q4_K_M"
OVERRIDE_HELP = (
    "another grid for some weights: 're:.*down_proj=w8g32' (a regular expression from the name's start), lm_head=q6_k "
    "(a part of the name), or =dense; the last that matches wins. The only way to quantize head and embeddings"
)
SKIP_HELP = "leave what matches one of these regular expressions, anywhere in its name, as it is"
METHOD_HELP = (
    "what is trained: lrqat and l4q low-rank adapters, lsq all weights, scales the grid alone, efficientqat all "
    "weights layer by layer and then the grid alone"
)
DATA_HELP = ".txt or .jsonl files, or hub datasets NAME[:CONFIG][@SPLIT] (default: CPython's own documentation)"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `lrqat`."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["export"]:
        from exporters.cli import main as export

        return export(arguments[1:])
    return run(lambda: _main(with_recipe(arguments)))


def _main(arguments: list[str]) -> int:
    args = make_parser().parse_args(arguments)
    set_threads(args.threads)
    if getattr(args, "like", None) is not None and (model := args.model or args.model_flag):
        take_like(args, model)
    status: int = args.body(args)
    return status


def make_parser() -> argparse.ArgumentParser:
    """All subcommands and their flags; imports nothing heavy."""
    parser = argparse.ArgumentParser(
        prog="lrqat",
        description="Low-rank quantization-aware training on the grid that the runtime stores.",
        epilog="`lrqat export` is lrqat-export; see also lrqat-parity and lrqat-serve.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_train(commands)
    add_ptq(commands)
    plan_parser = add_command(
        commands,
        "plan",
        "will a training fit, by part, and how long is a step; from config and headers alone",
        "lrqat plan meta-llama/Llama-2-7b-hf --grid w4 --downcast int --gradient-checkpointing --memory 24G",
    )
    grid_flags(plan_parser)
    plan_flags(plan_parser)
    generate_flags(
        add_command(
            commands,
            "generate",
            "text of the model's own to calibrate and train it with, beside or in place of yours",
            "lrqat generate HuggingFaceTB/SmolLM2-135M --out own.jsonl && lrqat train ... --data own.jsonl corpus.txt",
        )
    )
    eval_flags(
        add_command(
            commands,
            "eval",
            "perplexity of a model on a text; with --reference also KL and top-1 agreement",
            "lrqat eval runs/smollm2/fused --text heldout.txt --reference HuggingFaceTB/SmolLM2-135M",
        )
    )
    report_flags(
        add_command(
            commands,
            "report",
            "a run as one HTML page: figures, curves, what moved, certificates, commands",
            "lrqat report runs/smollm2 --quality eval.json rtn.json --out report.html",
        )
    )
    zeroshot_flags(
        add_command(
            commands,
            "zeroshot",
            "zero-shot tasks through lm-eval, on local files, of a model or of a server",
            "lrqat zeroshot runs/smollm2 --tasks-dir zeroshot --limit 100",
        )
    )
    formats_flags(
        add_command(
            commands,
            "formats",
            "which format and runtime takes which grid, and what to do instead",
            "lrqat formats --model HuggingFaceTB/SmolLM2-135M --grid w4g64",
        )
    )
    import_flags(
        add_command(
            commands,
            "import",
            "a quantized model as a fused checkpoint, integers untouched: from any format to any that carries its grid",
            "lrqat import model-awq --out runs/imported && lrqat-export runs/imported --format gguf --out model.gguf",
        )
    )
    return parser


def add_command(commands: argparse._SubParsersAction, name: str, summary: str, example: str) -> argparse.ArgumentParser:
    """One subcommand with the flags that all share."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=summary,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    common_flags(parser)
    return parser


def grid_flags(p: argparse.ArgumentParser) -> None:
    """Which weights are quantized, and how."""
    p.add_argument("--grid", help=f"{GRID_HELP} ({DEFAULTS['grid']})")
    p.add_argument("--like", type=Path, metavar="GGUF", help=LIKE_HELP)
    p.add_argument("--override", action="extend", nargs="+", metavar="PATTERN=GRID", help=OVERRIDE_HELP)
    p.add_argument("--skip", action="extend", nargs="+", metavar="REGEX", help=SKIP_HELP)


def data_flags(p: argparse.ArgumentParser) -> None:
    """Text, and the blocks that it is cut into."""
    p.add_argument("--data", action="extend", nargs="+", metavar="SOURCE", help=DATA_HELP)
    p.add_argument("--seq-len", type=int, help=f"tokens a block ({DEFAULTS['seq_len']})")


def beginning_flags(p: argparse.ArgumentParser) -> None:
    """What is done to the weights before they are rounded."""
    p.add_argument("--rotate", type=int, metavar="SEED", help="fold random rotations into the weights (llama-like)")
    p.add_argument(
        "--untie-head", action="store_true", help="with --rotate: a tied head may become a parameter of its own"
    )
    p.add_argument(
        "--calibration-blocks",
        type=int,
        metavar="N",
        help=f"blocks that GPTQ, AWQ and Block-AP look at ({CALIBRATION_BLOCKS})",
    )


def defaults_of(name: str) -> str:
    """A setting's default for each method that takes it."""
    return ", ".join(f"{method} {taken[name]}" for method, taken in METHODS.items() if name in taken)


def add_train(commands: argparse._SubParsersAction) -> None:
    """`lrqat train`."""
    p = add_command(
        commands,
        "train",
        "train what a model's weights are rounded from, and fuse it into integers",
        "lrqat train HuggingFaceTB/SmolLM2-135M --grid w4g32 --data text.txt --steps 400 --out runs/smollm2",
    )
    p.add_argument("model", nargs="?", help=f"{MODEL_HELP}; or a fused checkpoint, to go on from its codes")
    p.add_argument("--model", dest="model_flag", help=argparse.SUPPRESS)  # so that a recipe can name it
    p.add_argument("--out", help="the run's directory (required)")
    p.add_argument("--resume", action="store_true", help="go on from the run's last checkpoint")
    grid_flags(p)
    p.add_argument("--for", dest="targets", metavar="TARGET,...", help=TARGETS_HELP)
    p.add_argument(
        "--tensor-parallel", type=int, default=1, metavar="N", help="with --for: GPUs a layer is split over (1)"
    )
    p.add_argument("--method", choices=METHODS, help=f"{METHOD_HELP} ({DEFAULTS['method']})")
    p.add_argument("--start", choices=STARTS, help=f"the codes that training begins with ({DEFAULTS['start']})")
    beginning_flags(p)
    data_flags(p)
    p.add_argument(
        "--answers-only", action="store_true", help="with conversations: the loss sees what the assistant says"
    )
    p.add_argument("--steps", type=int, help=f"optimizer steps ({DEFAULTS['steps']})")
    p.add_argument("--batch-size", type=int, help=f"blocks a forward pass ({DEFAULTS['batch_size']})")
    p.add_argument(
        "--gradient-accumulation", type=int, help="forward passes a step, of all processes together (1 a process)"
    )
    p.add_argument(
        "--loss", choices=LOSSES, help=f"distillation from the full-precision model, or CE ({DEFAULTS['loss']})"
    )
    p.add_argument("--teacher", metavar="MODEL", help="distil from this model instead of from the one that is trained")
    p.add_argument("--rank", type=int, help=f"rank of A and B ({defaults_of('rank')})")
    p.add_argument("--alpha", type=float, help="the adapters' multiplier is alpha / rank (default: alpha = rank)")
    p.add_argument("--downcast", choices=DOWNCASTS, help=f"how Phi0 is stored ({defaults_of('downcast')})")
    p.add_argument("--loftq", action="store_true", help="with --downcast int: A and B begin with what it has lost")
    p.add_argument("--lr", type=float, help=f"learning rate of adapters or weights ({defaults_of('lr')})")
    p.add_argument(
        "--lr-scales", type=float, help=f"relative learning rate of the scales; 0 freezes ({DEFAULTS['lr_scales']})"
    )
    p.add_argument(
        "--block-epochs",
        type=int,
        help="first train layer by layer on the layers' own outputs (Block-AP), so many passes over the calibration "
        f"blocks (efficientqat {METHODS['efficientqat']['block_epochs']}, others: not at all)",
    )
    p.add_argument("--block-lr", type=float, help="learning rate of adapters or weights there (that of --lr)")
    p.add_argument(
        "--block-lr-scales",
        type=float,
        help=f"relative learning rate of the scales there ({BLOCK_LR_SCALES})",
    )
    p.add_argument(
        "--activations",
        choices=(NONE, *ACTIVATIONS),
        help="round what flows into quantized layers, per token: 8 or 4 bits with a zero, or int8 as vLLM's kernels "
        "(default: not at all)",
    )
    p.add_argument("--kv", choices=(NONE, *KV), help=f"{KV_HELP} (default: not at all)")
    p.add_argument(
        "--optimizer",
        choices=OPTIMIZERS,
        help=f"adamw8bit holds Adam's moments in 8 bits instead of 32; needs torchao ({DEFAULTS['optimizer']})",
    )
    p.add_argument("--warmup", type=float, help=f"share of the steps ({DEFAULTS['warmup']})")
    p.add_argument("--range-p", type=float, help=f"exponent of the range search; 0 is min-max ({DEFAULTS['range_p']})")
    p.add_argument("--dtype", choices=TRAIN_DTYPES, help=f"of activations and dense weights ({DEFAULTS['dtype']})")
    p.add_argument("--gradient-checkpointing", action="store_true", help="recompute layers in backward: less memory")
    p.add_argument(
        "--compile",
        action="store_true",
        help="torch.compile the rounding and its gradient: less time, needs a compiler",
    )
    p.add_argument(
        "--shard", action="store_true", help="with several processes: each holds its part of the frozen weights"
    )
    p.add_argument(
        "--offload",
        choices=OFFLOADS,
        help="where frozen weights live: disk streams them layer by layer, for models larger than memory; cpu keeps a "
        "GPU's in host memory (default: beside the rest)",
    )
    p.add_argument("--seed", type=int, help=f"({DEFAULTS['seed']})")
    p.add_argument(
        "--save-every", type=int, metavar="STEPS", help=f"steps between checkpoints ({DEFAULTS['save_every']})"
    )
    p.set_defaults(body=train_command)


def train_settings(args: argparse.Namespace) -> TrainSettings:
    """What the flags of `lrqat train` say."""
    given = {name: getattr(args, name) for name in DEFAULTS if getattr(args, name) is not None}
    given["model"] = args.model or args.model_flag
    given.setdefault("gradient_accumulation", count())
    for name in ("model", "out"):
        if not given.get(name):
            raise LrqatError(f"train: {'MODEL' if name == 'model' else '--out'} is missing; see lrqat train --help")
    if given.get("range_p") == 0:
        given["range_p"] = None
    for name in ("data", "override", "skip"):
        if name in given:
            given[name] = tuple(given[name])
    from lrqat.fused import is_fused

    if is_fused(given["model"]):
        from lrqat.continuing import continued

        if args.targets:
            raise LrqatError(f"--for: {given['model']} is on its grid already; ask lrqat-export, or leave it out")
        given = continued(given)
    settings = TrainSettings(**given)
    if args.tensor_parallel != 1 and not args.targets:
        raise LrqatError("--tensor-parallel: is for --for, which picks the grid; leave it out")
    if args.targets:
        rules = (settings.override, settings.skip)
        grid = grid_for(settings.model, args.grid, *rules, args.targets, args.tensor_parallel)
        settings = dataclasses.replace(settings, grid=grid)
    return settings


def train_command(args: argparse.Namespace) -> int:
    """Body of `lrqat train`."""
    settings = train_settings(args)

    from lrqat.train import Interrupted, train

    try:
        summary = train(settings, resume=args.resume)
    except Interrupted as stop:
        if rank() == 0:
            print(stop, file=sys.stderr)
        return 130
    if rank() == 0:
        show(summary, args.json)
    return 0


def add_ptq(commands: argparse._SubParsersAction) -> None:
    """`lrqat ptq`."""
    p = add_command(
        commands,
        "ptq",
        "round a model to a grid without training: the baseline, in the same fused checkpoint",
        "lrqat ptq HuggingFaceTB/SmolLM2-135M --grid w4g32 --method gptq --data text.txt --out runs/gptq",
    )
    p.add_argument("model", help=MODEL_HELP)
    p.add_argument("--out", required=True, help="the run's directory; the checkpoint is OUT/fused")
    grid_flags(p)
    p.add_argument("--method", choices=STARTS, default="rtn", help="round to nearest, or with calibration text (rtn)")
    beginning_flags(p)
    data_flags(p)
    p.add_argument("--range-p", type=float, default=3.5, help="exponent of the range search; 0 is min-max (3.5)")
    p.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of weights before they are rounded (bfloat16)")
    p.set_defaults(body=ptq_command)


def ptq_command(args: argparse.Namespace) -> int:
    """Body of `lrqat ptq`."""
    from lrqat.assign import Assignment
    from lrqat.grid import Grid

    grid, override, skip = Grid.parse(args.grid or str(DEFAULTS["grid"])), args.override or [], args.skip or []
    Assignment.make(grid, override, skip)  # refuses before anything heavy is imported
    text = {"data": args.data, "seq_len": args.seq_len, "calibration_blocks": args.calibration_blocks}
    if args.method == "rtn" and (given := [name for name, value in text.items() if value is not None]):
        raise LrqatError(f"{given[0]}: method rtn looks at no text; leave it out, or use --method gptq")
    seq_len = Beginning.seq_len if args.seq_len is None else args.seq_len
    count = CALIBRATION_BLOCKS if args.calibration_blocks is None else args.calibration_blocks
    blocks = None if args.method == "rtn" else count
    beginning = Beginning(args.method, args.rotate, args.untie_head, tuple(args.data or ()), seq_len, blocks)

    import torch

    from lrqat.fused import FusedCheckpoint
    from lrqat.models import locate
    from lrqat.ptq import quantize

    fused = quantize(
        locate(args.model),
        grid,
        args.range_p or None,
        skip,
        getattr(torch, args.dtype),
        Path(args.out),
        override,
        beginning,
    )
    counts = FusedCheckpoint.load(fused).counts()
    show(
        {"grid": str(grid), "override": override or None, "method": args.method, **counts, "fused": str(fused)},
        args.json,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
