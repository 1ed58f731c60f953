"""The `lrqat` command: train, ptq, eval, export, import, formats."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from exporters.commands import TARGETS_HELP, formats_flags, grid_for, import_flags
from lrqat.command import common_flags, run, set_threads, show, with_recipe
from lrqat.errors import LrqatError
from lrqat.settings import DTYPES, LOSSES, TRAIN_DTYPES, TrainSettings

DEFAULTS = {field.name: field.default for field in dataclasses.fields(TrainSettings)}
MODEL_HELP = "a Hugging Face directory, a hub id, or a GGUF file"
GRID_HELP = "w<bits>[g<group size>][-asym|-min], or a ggml type: w4g32, w3, q4_k"
OVERRIDE_HELP = (
    "another grid for some weights: 're:.*down_proj=w8g32' (a regular expression from the name's start), lm_head=q6_k "
    "(a part of the name), or =dense; the last that matches wins. The only way to quantize head and embeddings"
)
SKIP_HELP = "leave what matches one of these regular expressions, anywhere in its name, as it is"


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
    add_eval(commands)
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
    p.add_argument("--override", action="extend", nargs="+", metavar="PATTERN=GRID", help=OVERRIDE_HELP)
    p.add_argument("--skip", action="extend", nargs="+", metavar="REGEX", help=SKIP_HELP)


def add_train(commands: argparse._SubParsersAction) -> None:
    """`lrqat train`."""
    p = add_command(
        commands,
        "train",
        "train adapters inside the rounding of a model's weights, and fuse them into integers",
        "lrqat train HuggingFaceTB/SmolLM2-135M --grid w4g32 --data text.txt --steps 400 --out runs/smollm2",
    )
    p.add_argument("model", nargs="?", help=MODEL_HELP)
    p.add_argument("--model", dest="model_flag", help=argparse.SUPPRESS)  # so that a recipe can name it
    p.add_argument("--out", help="the run's directory (required)")
    p.add_argument("--resume", action="store_true", help="go on from the run's last checkpoint")
    grid_flags(p)
    p.add_argument("--for", dest="targets", metavar="TARGET,...", help=TARGETS_HELP)
    p.add_argument(
        "--tensor-parallel", type=int, default=1, metavar="N", help="with --for: GPUs a layer is split over (1)"
    )
    p.add_argument("--method", choices=("lrqat",), help=f"how codes are trained ({DEFAULTS['method']})")
    p.add_argument(
        "--data",
        action="extend",
        nargs="+",
        metavar="SOURCE",
        help=".txt or .jsonl files, or hub datasets NAME[:CONFIG][@SPLIT] (default: CPython's own documentation)",
    )
    p.add_argument("--steps", type=int, help=f"optimizer steps ({DEFAULTS['steps']})")
    p.add_argument("--batch-size", type=int, help=f"blocks a forward pass ({DEFAULTS['batch_size']})")
    p.add_argument(
        "--gradient-accumulation", type=int, help=f"forward passes a step ({DEFAULTS['gradient_accumulation']})"
    )
    p.add_argument("--seq-len", type=int, help=f"tokens a block ({DEFAULTS['seq_len']})")
    p.add_argument(
        "--loss", choices=LOSSES, help=f"distillation from the full-precision model, or CE ({DEFAULTS['loss']})"
    )
    p.add_argument("--rank", type=int, help=f"rank of A and B ({DEFAULTS['rank']})")
    p.add_argument("--alpha", type=float, help="the adapters' multiplier is alpha / rank (default: alpha = rank)")
    p.add_argument("--downcast", choices=("fixed", "int", "bf16"), help=f"storage of Phi0 ({DEFAULTS['downcast']})")
    p.add_argument("--lr", type=float, help=f"learning rate of A and B ({DEFAULTS['lr']})")
    p.add_argument(
        "--lr-scales", type=float, help=f"relative learning rate of the scales; 0 freezes ({DEFAULTS['lr_scales']})"
    )
    p.add_argument("--warmup", type=float, help=f"share of the steps ({DEFAULTS['warmup']})")
    p.add_argument("--range-p", type=float, help=f"exponent of the range search; 0 is min-max ({DEFAULTS['range_p']})")
    p.add_argument("--dtype", choices=TRAIN_DTYPES, help=f"of activations and dense weights ({DEFAULTS['dtype']})")
    p.add_argument("--gradient-checkpointing", action="store_true", help="recompute layers in backward: less memory")
    p.add_argument("--seed", type=int, help=f"({DEFAULTS['seed']})")
    p.add_argument(
        "--save-every", type=int, metavar="STEPS", help=f"steps between checkpoints ({DEFAULTS['save_every']})"
    )
    p.set_defaults(body=train_command)


def train_command(args: argparse.Namespace) -> int:
    """Body of `lrqat train`."""
    given = {name: getattr(args, name) for name in DEFAULTS if getattr(args, name) is not None}
    given["model"] = args.model or args.model_flag
    for name in ("model", "out"):
        if not given.get(name):
            raise LrqatError(f"train: {'MODEL' if name == 'model' else '--out'} is missing; see lrqat train --help")
    if given.get("range_p") == 0:
        given["range_p"] = None
    for name in ("data", "override", "skip"):
        if name in given:
            given[name] = tuple(given[name])
    settings = TrainSettings(**given)
    if args.targets:
        rules = (settings.override, settings.skip)
        grid = grid_for(settings.model, args.grid, *rules, args.targets, args.tensor_parallel)
        settings = dataclasses.replace(settings, grid=grid)

    from lrqat.train import Interrupted, train

    try:
        summary = train(settings, resume=args.resume)
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return 130
    show(summary, args.json)
    return 0


def add_ptq(commands: argparse._SubParsersAction) -> None:
    """`lrqat ptq`."""
    p = add_command(
        commands,
        "ptq",
        "round a model to a grid without training: the baseline, in the same fused checkpoint",
        "lrqat ptq HuggingFaceTB/SmolLM2-135M --grid w4g32 --method rtn --out runs/rtn",
    )
    p.add_argument("model", help=MODEL_HELP)
    p.add_argument("--out", required=True, help="the run's directory; the checkpoint is OUT/fused")
    grid_flags(p)
    p.add_argument("--method", choices=("rtn",), default="rtn", help="round to nearest")
    p.add_argument("--range-p", type=float, default=3.5, help="exponent of the range search; 0 is min-max (3.5)")
    p.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the dense weights (bfloat16)")
    p.set_defaults(body=ptq_command)


def ptq_command(args: argparse.Namespace) -> int:
    """Body of `lrqat ptq`."""
    from lrqat.assign import Assignment
    from lrqat.grid import Grid

    grid, override, skip = Grid.parse(args.grid or str(DEFAULTS["grid"])), args.override or [], args.skip or []
    Assignment.make(grid, override, skip)  # refuses before anything heavy is imported

    import torch

    from lrqat.fused import FusedCheckpoint
    from lrqat.models import locate
    from lrqat.ptq import quantize

    fused = quantize(
        locate(args.model), grid, args.range_p or None, skip, getattr(torch, args.dtype), Path(args.out), override
    )
    counts = FusedCheckpoint.load(fused).counts()
    show({"grid": str(grid), "override": override or None, **counts, "fused": str(fused)}, args.json)
    return 0


def add_eval(commands: argparse._SubParsersAction) -> None:
    """`lrqat eval`."""
    p = add_command(
        commands,
        "eval",
        "perplexity of a model on a text; with --reference also KL and top-1 agreement",
        "lrqat eval runs/smollm2/fused --text heldout.txt --reference HuggingFaceTB/SmolLM2-135M",
    )
    p.add_argument("model", help=f"a fused checkpoint, {MODEL_HELP}")
    p.add_argument("--text", required=True, nargs="+", metavar="SOURCE", help=".txt or .jsonl files, or hub datasets")
    p.add_argument("--reference", metavar="MODEL", help="the full-precision model to compare with")
    p.add_argument("--seq-len", type=int, default=1024, help="tokens a block; each is its own context (1024)")
    p.add_argument("--blocks", type=int, help="use only the first N blocks")
    p.add_argument("--dtype", choices=DTYPES, default="float32", help="of the computation (float32)")
    p.set_defaults(body=eval_command)


def eval_command(args: argparse.Namespace) -> int:
    """Body of `lrqat eval`."""
    from lrqat.evaluate import evaluate_files

    scores = evaluate_files(args.model, args.reference, args.text, args.seq_len, args.blocks, args.dtype)
    show({"model": args.model, **scores.to_dict()}, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
