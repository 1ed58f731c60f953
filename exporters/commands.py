"""The commands of `lrqat` that are about formats: `formats`, `import`, and `train --for`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lrqat.command import show
from lrqat.errors import LrqatError, at_least

TARGETS_HELP = (
    "check before training that these take the result: gguf, gptq, awq, compressed-tensors, llama.cpp, vllm-cpu, "
    "vllm-gpu, or one of the former @ one of the latter; without --grid, the first grid that all of them take"
)


def split_targets(text: str) -> list[str]:
    """`gguf,gptq@vllm-cpu` -> its parts."""
    return [part for part in text.replace(" ", "").split(",") if part]


def blueprint(model: str, grid: Any, override: Sequence[str], skip: Sequence[str]) -> Any:
    """A model's checkpoint as it would be fused: names, shapes and grids, of which nothing else is read."""

    from lrqat.assign import Assignment
    from lrqat.fused import FusedCheckpoint, FusedSpec, Spec
    from lrqat.layers import effective_config
    from lrqat.models import locate
    from lrqat.plan import plan
    from lrqat.sites import checkpoint_tensors

    base = locate(model)
    skeleton = base.skeleton()
    decided = plan(skeleton, Assignment.make(grid, override, skip))
    specs, dense = {}, {}
    for name, tensor in checkpoint_tensors(skeleton).items():
        if name in decided.grids:
            rows, columns = tensor.shape
            specs[name] = FusedSpec(decided.grids[name], (rows, columns))
        else:
            dense[name] = Spec(tensor.dtype, tuple(tensor.shape))
    config = effective_config(skeleton, base.config)
    if config["tie_word_embeddings"]:
        dense.pop("lm_head.weight", None)
    return FusedCheckpoint({}, {}, specs, dense, config, base.assets)


def grid_for(
    model: str, grid: str | None, override: Sequence[str], skip: Sequence[str], targets: str, tensor_parallel: int
) -> str:
    """The grid that all targets take: the one given, checked, or the first of the usual ones.

    Raises:
        LrqatError: a target cannot take it; says which can.
    """
    from exporters import matrix
    from lrqat.console import log
    from lrqat.grid import Grid

    wanted = split_targets(targets)
    if unknown := [target for target in wanted if target not in matrix.TARGETS]:
        raise LrqatError(f"--for {unknown[0]}: expected some of {', '.join(matrix.TARGETS)}")

    def on(grid: Grid) -> Any:
        return blueprint(model, grid, override, skip)

    if grid is None:
        found, answers = matrix.pick(on, wanted, tensor_parallel)
    else:
        found = Grid.parse(grid)
        answers = matrix.require(on(found), wanted, tensor_parallel)
    log(f"grid {found}: " + "; ".join(f"{answer.target} as {answer.runs}" for answer in answers))
    return str(found)


def take_like(args: argparse.Namespace, model: str) -> None:
    """Put the grids of `--like`'s file into --grid, and before what --override says.

    Raises:
        LrqatError: --grid beside it, a model that has its grid already, or what `gguf_like.grids_like` refuses.
    """
    if args.grid is not None:
        raise LrqatError(f"--grid {args.grid}: --like gives every weight its grid; leave one of them out")

    from exporters.gguf_like import grids_like
    from lrqat.fused import is_fused
    from lrqat.layers import effective_config
    from lrqat.models import locate

    if is_fused(model):
        raise LrqatError(f"--like: {model} is on its grid already; leave it out")
    base = locate(model)
    args.grid, found = grids_like(args.like, effective_config(base.skeleton(), base.config))
    args.override = [*found, *(args.override or [])]


def formats_flags(p: argparse.ArgumentParser) -> None:
    """Flags of `lrqat formats`."""
    p.add_argument("--grid", help="only this grid; with --model the grid of the model")
    p.add_argument("--model", help="ask for a model's own shapes, architecture and fused layers")
    p.add_argument("--override", action="extend", nargs="+", default=[], metavar="PATTERN=GRID", help="as in train")
    p.add_argument("--skip", action="extend", nargs="+", default=[], metavar="REGEX", help="as in train")
    p.add_argument(
        "--tensor-parallel", type=int, default=1, metavar="N", help="GPUs that vLLM splits each layer over (1)"
    )
    p.set_defaults(body=formats_command)


def formats_command(args: argparse.Namespace) -> int:
    """Body of `lrqat formats`."""
    from exporters import matrix
    from lrqat.grid import Grid

    at_least("--tensor-parallel", args.tensor_parallel, 1)
    if not args.model and (args.override or args.skip):
        raise LrqatError("--override, --skip: are about a model's weights; name it with --model")
    if args.model:
        checkpoint = blueprint(args.model, Grid.parse(args.grid or "w4g32"), args.override, args.skip)
    elif args.grid:
        checkpoint = matrix.one_weight(Grid.parse(args.grid))
    else:
        rows = matrix.table(args.tensor_parallel)
        print(json.dumps(rows) if args.json else text_table(rows))
        return 0
    answers = matrix.answers(checkpoint, args.tensor_parallel)
    rows = [
        {
            "target": each.target,
            "exact": "no" if each.refusal else "yes",
            "runs on": each.runs,
            "instead": str(each.refusal or ""),
        }
        for each in answers
    ]
    print(json.dumps(rows) if args.json else text_table(rows))
    return 0


def text_table(rows: Sequence[Any]) -> str:
    """Rows of equal keys as aligned columns; the last column may be long."""
    keys = list(rows[0])
    widths = {key: max(len(key), *(len(str(row[key])) for row in rows)) for key in keys}
    lines = [[key.ljust(widths[key]) for key in keys], *([str(row[k]).ljust(widths[k]) for k in keys] for row in rows)]
    return "\n".join("  ".join(line).rstrip() for line in lines)


def import_flags(p: argparse.ArgumentParser) -> None:
    """Flags of `lrqat import`."""
    p.add_argument("path", type=Path, help="a GGUF file, or a GPTQ, AWQ or compressed-tensors directory")
    p.add_argument("--out", required=True, type=Path, help="the run's directory; the checkpoint is OUT/fused")
    p.set_defaults(body=import_command)


def import_command(args: argparse.Namespace) -> int:
    """Body of `lrqat import`."""
    from exporters.importing import import_checkpoint

    if (args.out / "run.json").exists():
        raise LrqatError(f"{args.out}: holds a training run; name another --out")
    checkpoint = import_checkpoint(args.path)
    fused = checkpoint.save(args.out / "fused")
    grids = sorted({str(spec.grid) for spec in checkpoint.specs.values()})
    show({"source": str(args.path), "grids": ", ".join(grids), **checkpoint.counts(), "fused": str(fused)}, args.json)
    return 0
