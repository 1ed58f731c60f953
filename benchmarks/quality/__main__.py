"""The command line: run, test, zeroshot, table."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.quality import plan, rows, table
from lrqat.command import run as run_command
from lrqat.errors import LrqatError


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    args = make_parser().parse_args(argv)
    return run_command(lambda: args.body(args))


def make_parser() -> argparse.ArgumentParser:
    """All flags."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=(__doc__ or "").rstrip())
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    p = commands.add_parser("run", help="do what is left of a plan, and score it on validation text")
    p.add_argument("plan", type=Path, metavar="PLAN", help="a YAML file as benchmarks/quality.yaml")
    p.add_argument("--model", type=Path, required=True, metavar="DIR", help="a Hugging Face directory")
    p.add_argument("--data", nargs="+", required=True, metavar="FILE", help="training and calibration text of all rows")
    p.add_argument("--valid", type=Path, required=True, metavar="FILE", help="validation text")
    text_flags(p, blocks=12)
    p.set_defaults(body=run)

    p = commands.add_parser("test", help="score finished rows on the test text; what has been scored stays as it is")
    p.add_argument("--test", type=Path, required=True, metavar="FILE", help="test text")
    text_flags(p, blocks=32)
    p.set_defaults(body=test)

    p = commands.add_parser("zeroshot", help="score finished rows on lm-eval's tasks, beside the full-precision model")
    p.add_argument("--tasks-dir", type=Path, required=True, metavar="DIR", help="as of lrqat zeroshot")
    p.add_argument("--limit", type=int, metavar="N", help="only the first N rows of every task")
    hand_flags(p)
    p.set_defaults(body=zeroshot)

    p = commands.add_parser("table", help="write the table and the plots of all results")
    p.add_argument("--out", type=Path, required=True)
    p.set_defaults(body=write_table)
    return parser


def text_flags(p: argparse.ArgumentParser, blocks: int) -> None:
    """How a text is scored."""
    p.add_argument("--blocks", type=int, default=blocks, help=f"of the text: its first ones ({blocks})")
    p.add_argument("--seq-len", type=int, default=1024, help="tokens a block; each is its own context (1024)")
    hand_flags(p)


def hand_flags(p: argparse.ArgumentParser) -> None:
    """Which rows, and with how many hands."""
    p.add_argument("--out", type=Path, required=True, help="directory of all rows")
    p.add_argument("--only", default="", metavar="REGEX", help="rows whose label, as w3g64-lrqat-s0, has this in it")
    p.add_argument("--jobs", type=int, default=1, help="rows at a time (1)")
    p.add_argument("--threads", type=int, help="CPU threads a row (default: cores / jobs)")


def hands(args: argparse.Namespace) -> rows.Hands:
    """Rows at a time, and threads of each."""
    return rows.Hands(args.jobs, args.threads or max(1, (os.cpu_count() or 1) // max(1, args.jobs)))


def run(args: argparse.Namespace) -> int:
    """Body of `run`."""
    text = rows.Text.make("valid", args.valid, args.seq_len, args.blocks)
    planned = plan.read(args.plan, args.out, args.only)
    plan.check(planned, args.data)
    with rows.Bench.begin(args.out, args.model, args.data) as bench:
        return report(args.out, rows.run(bench, planned, text, hands(args)))


def test(args: argparse.Namespace) -> int:
    """Body of `test`."""
    text = rows.Text.make("test", args.test, args.seq_len, args.blocks)
    with rows.Bench.open(args.out) as bench:
        return report(args.out, rows.test(bench, text, hands(args), args.only))


def zeroshot(args: argparse.Namespace) -> int:
    """Body of `zeroshot`."""
    if not args.tasks_dir.is_dir():
        raise LrqatError(f"--tasks-dir {args.tasks_dir}: no such directory; lrqat/zeroshot.py says what it holds")
    with rows.Bench.open(args.out) as bench:
        return report(args.out, rows.zeroshot(bench, args.tasks_dir, hands(args), args.only, args.limit))


def report(out: Path, done: rows.Done) -> int:
    """One line for every row that failed, and one of JSON; the exit status."""
    for label, reason in sorted(done.failed.items()):
        print(f"error: {label}: {reason}", file=sys.stderr)
    left = {"failed": sorted(done.failed)} if done.failed else {}
    print(json.dumps({"benchmark": "quality", "path": str(out / "rows"), "rows": done.finished, **left}))
    return 130 if done.stopped else 1 if done.failed else 0


def write_table(args: argparse.Namespace) -> int:
    """Body of `table`."""
    path, count = table.write(args.out)
    print(json.dumps({"benchmark": "quality", "path": str(path), "rows": count}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
