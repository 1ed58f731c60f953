"""The commands of `lrqat` that run a model as it is: `eval`, `zeroshot` and `generate`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from lrqat.command import show
from lrqat.errors import LrqatError, at_least
from lrqat.jsonfile import write_json
from lrqat.settings import ACTIVATIONS, DTYPES, KV, NONE

MODEL_HELP = "a Hugging Face directory, a hub id, or a GGUF file"
KV_HELP = "round keys and values to so many bits, per token and head, as a quantized KV cache"
ZEROSHOT = ("piqa", "arc_easy", "hellaswag:1000", "lambada_openai")
BATCH, SERVER_BATCH = 32, 8  # continuations at a time of `zeroshot`


def rounding_flags(p: argparse.ArgumentParser) -> None:
    """What is rounded beside the weights."""
    p.add_argument(
        "--activations",
        choices=(NONE, *ACTIVATIONS),
        help="what flows into quantized layers is rounded so (default: as the run was trained)",
    )
    p.add_argument("--kv", choices=(NONE, *KV), help=f"{KV_HELP} (default: as the run was trained)")


def eval_flags(p: argparse.ArgumentParser) -> None:
    """Flags of `lrqat eval`."""
    p.add_argument("model", help=f"a fused checkpoint, {MODEL_HELP}")
    p.add_argument("--text", required=True, nargs="+", metavar="SOURCE", help=".txt or .jsonl files, or hub datasets")
    p.add_argument("--reference", metavar="MODEL", help="the full-precision model to compare with")
    p.add_argument("--seq-len", type=int, default=1024, help="tokens a block; each is its own context (1024)")
    p.add_argument("--blocks", type=int, help="use only the first N blocks")
    p.add_argument("--dtype", choices=DTYPES, default="float32", help="of the computation (float32)")
    rounding_flags(p)
    p.set_defaults(body=eval_command)


def eval_command(args: argparse.Namespace) -> int:
    """Body of `lrqat eval`."""
    from lrqat.evaluate import evaluate_files

    scores = evaluate_files(
        args.model, args.reference, args.text, args.seq_len, args.blocks, args.dtype, args.activations, args.kv
    )
    show({"model": args.model, **scores.to_dict()}, args.json)
    return 0


def zeroshot_flags(p: argparse.ArgumentParser) -> None:
    """Flags of `lrqat zeroshot`."""
    p.add_argument("model", help=f"a fused checkpoint, {MODEL_HELP}; with --server, the directory that it serves")
    p.add_argument(
        "--tasks",
        nargs="+",
        default=list(ZEROSHOT),
        metavar="NAME[:FIRST]",
        help=f"with :FIRST only so many rows ({' '.join(ZEROSHOT)})",
    )
    p.add_argument("--tasks-dir", required=True, type=Path, metavar="DIR", help="where the tasks' files lie")
    p.add_argument("--limit", type=int, metavar="N", help="only the first N rows of every task")
    p.add_argument("--server", metavar="URL", help="ask this server, vLLM or llama.cpp, instead of running here")
    p.add_argument("--batch-size", type=int, help=f"continuations at a time ({BATCH}, of a server {SERVER_BATCH})")
    p.add_argument("--dtype", choices=DTYPES, default="float32", help="of the computation here (float32)")
    p.add_argument("--out", type=Path, metavar="JSON", help="write the result there too")
    rounding_flags(p)
    p.set_defaults(body=zeroshot_command)


def zeroshot_command(args: argparse.Namespace) -> int:
    """Body of `lrqat zeroshot`."""
    from lrqat import zeroshot, zeroshot_here, zeroshot_server

    wanted = zeroshot.parse_tasks(args.tasks)
    at_least("--limit", args.limit, 2)
    at_least("--batch-size", args.batch_size, 1)
    if args.server and (args.activations or args.kv):
        raise LrqatError("--activations, --kv: a server rounds what it rounds; leave them out")
    zeroshot.check_installed()
    tasks = zeroshot.make_tasks(wanted, args.tasks_dir.expanduser())
    if args.server:
        model, rounding = zeroshot_server.model_there(args.model, args.server, args.batch_size or SERVER_BATCH), None
    else:
        model, rounding = zeroshot_here.model_here(
            args.model, args.dtype, args.activations, args.kv, args.batch_size or BATCH
        )
    table = zeroshot.measure(model, tasks, args.limit)
    mean = zeroshot.average(table)
    result = {"model": args.model, "server": args.server, "rounding": rounding, "tasks": table, "average": mean}
    if args.out:
        write_json(args.out, result)
    print(json.dumps(result) if args.json else zeroshot.as_text(table, mean))
    return 0


def generate_flags(p: argparse.ArgumentParser) -> None:
    """Flags of `lrqat generate`."""
    p.add_argument("model", help=f"a fused checkpoint, {MODEL_HELP}")
    p.add_argument("--out", required=True, type=Path, metavar="JSONL", help="the file, for --data")
    p.add_argument("--tokens", type=int, default=200_000, help="how many to draw, at least (200000)")
    p.add_argument("--length", type=int, default=192, help="tokens of a sequence (192)")
    p.add_argument("--batch-size", type=int, default=128, help="sequences at a time (128)")
    p.add_argument("--temperature", type=float, default=1.0, help="1 draws from the model's own distribution (1)")
    p.add_argument("--seed", type=int, default=0, help="of the draws (0)")
    p.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the computation (bfloat16)")
    p.set_defaults(body=generate_command)


def generate_command(args: argparse.Namespace) -> int:
    """Body of `lrqat generate`."""
    from lrqat.generate import generate_corpus

    found = generate_corpus(
        args.model,
        args.out.expanduser(),
        tokens=args.tokens,
        length=args.length,
        batch_size=args.batch_size,
        temperature=args.temperature,
        seed=args.seed,
        dtype=args.dtype,
    )
    show(found, args.json)
    return 0
