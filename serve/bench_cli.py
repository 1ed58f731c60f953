"""`lrqat-bench`: is a trained model as fast as an ordinary one of the same format? See serve/bench.py."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lrqat.command import common_flags, run, with_recipe
from serve.layout import sentence

COLUMNS = {"prompt_cpu_s": "prompt, CPU", "token_cpu_s": "generation, CPU", "ttft_s": "TTFT", "itl_s": "ITL"}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `lrqat-bench`."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return run(lambda: _main(make_parser().parse_args(with_recipe(arguments))))


def make_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(
        prog="lrqat-bench",
        description="Compare the first model with each of the others on their runtime: tensors, then latency, "
        "throughput, CPU time, memory and load time, in paired and interleaved requests to servers that run side by "
        "side. The first model is compared with itself too: that is the noise. The last line is one JSON object.",
        epilog="example:\n  lrqat-bench smollm2-q4_0.gguf stock-q4_0.gguf",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    common_flags(parser)
    parser.add_argument(
        "models", type=Path, nargs="+", metavar="MODEL", help="exported models of one runtime, ours first"
    )
    parser.add_argument("--prompt-tokens", type=int, default=128, metavar="N", help="of the prompt that is timed (128)")
    parser.add_argument("--tokens", type=int, default=32, metavar="N", help="to generate in each round (32)")
    parser.add_argument(
        "--rounds", type=int, default=10, metavar="N", help="requests of each kind to each model in a sitting (10)"
    )
    parser.add_argument(
        "--sittings", type=int, default=5, metavar="N", help="how often each model is loaded, into other memory (5)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of prompts and of the order of requests (0)")
    parser.add_argument("--text", type=Path, metavar="FILE", help="to cut prompts from (CPython's documentation)")
    parser.add_argument("--python", help="vllm: an interpreter whose environment has vLLM (default: this one)")
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), help="vllm: to serve in")
    parser.add_argument("--out", type=Path, metavar="JSON", help="where the result goes too")
    return parser


def _main(args: argparse.Namespace) -> int:
    from lrqat.data import default_texts
    from lrqat.jsonfile import write_json
    from serve.bench import Settings, bench

    settings = Settings(
        prompt_tokens=args.prompt_tokens,
        generated_tokens=args.tokens,
        rounds=args.rounds,
        sittings=args.sittings,
        threads=1 if args.threads is None else args.threads,
        seed=args.seed,
        python=args.python,
        dtype=args.dtype,
    )
    text = args.text.read_text(encoding="utf-8") if args.text else "".join(default_texts())
    result = bench(args.models, settings, text)
    if args.out:
        write_json(args.out, result)
    if not args.json:
        print(table(result))
    print(json.dumps(result))
    return 0


def table(result: dict[str, Any]) -> str:
    """The result for a terminal."""
    width = max(map(len, result["models"]))
    lines = [f"{'model':{width}}  {'file bytes':>13}  tensors"]
    for label, model in result["models"].items():
        if label != result["noise"]:
            kinds = ", ".join(f"{row['tensors']} {dtype}" for dtype, row in model["dtypes"].items())
            lines.append(f"{label:{width}}  {model['file_bytes']:13,}  {kinds}")
    for label, found in result["layouts"].items():
        if label != result["noise"]:
            lines.append(f"{label:{width}}  {sentence(found)}")
    lines += ["", f"{'':{width}}  TTFT ms  ITL ms  prompt tok/s  tok/s  prompt tok/CPU s  tok/CPU s  load s  peak MB"]
    for label, model in result["models"].items():
        m = model["medians"]
        lines.append(
            f"{label:{width}}  {m['ttft_s'] * 1e3:7.1f} {m['itl_s'] * 1e3:7.2f} {model['prompt_tokens_per_s']:13.1f} "
            f"{model['tokens_per_s']:6.1f} {model['prompt_tokens_per_cpu_s']:17.1f} {model['tokens_per_cpu_s']:10.1f} "
            f"{m['load_s']:7.2f} {m['peak_bytes'] / 1e6:8.0f}"
        )
    lines += ["", f"ratio of {result['first']} to ({result['confidence']:.0%} interval):"]
    lines.append(f"{'':{width}}  {' '.join(f'{name:20}' for name in COLUMNS.values())} verdict")
    for label, found in result["ratios"].items():
        cells = " ".join(f"{_cell(found[metric]):20}" for metric in COLUMNS)
        lines.append(f"{label:{width}}  {cells} {result['verdicts'][label]}")
    low, high = 1 - result["limit"], 1 + result["limit"]
    lines.append(
        f"equal: {' and '.join(COLUMNS[name] for name in result['judged_by'])} within {low:.2f} and {high:.2f}"
    )
    if result["verdicts"][result["noise"]] != "equal":
        lines.append("warning: not even the first model equals itself; close other programs, or give more --sittings")
    return "\n".join(lines)


def _cell(row: dict[str, Any]) -> str:
    return f"{row['ratio']:.3f}" + (f" [{row['low']:.3f}, {row['high']:.3f}]" if row["low"] is not None else "")


if __name__ == "__main__":
    sys.exit(main())
