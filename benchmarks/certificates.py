"""Parity certificates of one model in every format, on the real runtimes; one table, one JSON line.

    python benchmarks/certificates.py MODEL --work DIR [--trained GRID=RUN ...] [--python PYTHON] [--only gguf]

Every grid is rounded to nearest (but for those that `--trained` names a run of), exported, read back bit
by bit, and certified with its positive and negative control. What is done is not done again: the table can be stopped.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from lrqat.jsonfile import read_json, write_json

CASES = (  # (grid, overrides, format, export options)
    ("w4g32", (), "gguf", ()),
    ("w4g32-min", (), "gguf", ()),
    ("w5g32", (), "gguf", ()),
    ("w8g32", (), "gguf", ()),
    ("w4g32-fp16", ("re:.*down_proj=q4_k",), "gguf", ()),
    ("w4g32-fp16", ("re:.*down_proj=q2_k",), "gguf", ()),
    ("w4g32", (), "gptq", ()),
    ("w4g64", (), "gptq", ()),
    ("w4", (), "gptq", ()),
    ("w4g32", (), "awq", ()),
    ("w4g32-asym", (), "awq", ()),
    ("w4g64-asym", (), "awq", ()),
    ("w4g32", (), "compressed-tensors", ()),
    ("w4g32-asym", (), "compressed-tensors", ()),
    ("w8", (), "compressed-tensors", ("--activations", "int8")),
)


def command(module: str, *words: object, fails: int = 0) -> str:
    """Run one of our commands; its stdout. `fails` is the status of one that says no."""
    line = [sys.executable, "-m", module, *map(str, words)]
    done = subprocess.run(line, capture_output=True, text=True)
    if done.returncode not in (0, fails):
        sys.exit(f"{' '.join(line)}\n{done.stderr}")
    return done.stdout


def certify(
    case: tuple[str, tuple[str, ...], str, tuple[str, ...]], args: argparse.Namespace
) -> tuple[str, dict[str, Any]]:
    """The certificate of one case, made or found."""
    grid, overrides, form, options = case
    label = "+".join([grid, *(rule.rpartition("=")[2] for rule in overrides)])
    name = f"{label}-{form}"
    out = args.work / (f"{name}.gguf" if form == "gguf" else name)
    path = out.with_suffix(".certificate.json") if form == "gguf" else out / "certificate.json"
    if not path.is_file():
        run = args.trained.get(label, args.work / label)
        if not (run / "fused" / "fused.json").is_file():
            rules = ("--override", *overrides) if overrides else ()
            command("lrqat.cli", "ptq", args.model, "--grid", grid, *rules, "--out", run)
        command("exporters.cli", run, "--format", form, "--out", out, *options)
        more = ("--text", *args.text) if args.text else ()
        size = ("--sequences", args.sequences, "--seq-len", 512)
        command("serve.parity_cli", run, out, "--python", args.python, *size, *more, fails=1)
    return name, read_json(path)


def main() -> None:
    """All cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--trained", nargs="+", default=[], metavar="GRID=RUN", help="w4g32=RUN, w4g32-fp16+q2_k=RUN")
    parser.add_argument("--python", default=sys.executable, help="an interpreter that has vLLM")
    parser.add_argument("--text", nargs="+", default=[])
    parser.add_argument("--sequences", type=int, default=1)
    parser.add_argument("--only", default="", help="formats, separated by commas")
    args = parser.parse_args()
    args.trained = {label: Path(run) for label, _, run in (text.partition("=") for text in args.trained)}
    args.work.mkdir(parents=True, exist_ok=True)
    asked = {"model": str(args.model), "trained": {label: str(run) for label, run in args.trained.items()}}
    asked |= {"text": args.text, "sequences": args.sequences}
    stamp = args.work / "asked.json"
    if stamp.is_file() and (before := read_json(stamp)) != asked:
        sys.exit(f"{args.work}: holds certificates of {before}; name another --work")
    write_json(stamp, asked)
    head = f"{'':38} {'weights':>9} {'KL':>9} {'top-1':>6} {'|d logp|':>9} {'control +':>10} {'control -':>10}  verdict"
    print(head, flush=True)
    rows = {}
    for case in CASES:
        if args.only and case[2] not in args.only.split(","):
            continue
        name, found = certify(case, args)
        figures, controls = found["logits"]["figures"], found["controls"]
        signs = [
            f"{controls[key]['figures']['kl']:.1e}" if key in controls else "-" for key in ("positive", "negative")
        ]
        weights = f"{found['weights']['equal']}/{found['weights']['total']}"
        rows[name] = {"verdict": found["verdict"], "weights": weights, "runtime": found["runtime"], **figures}
        print(
            f"{name:38} {weights:>9} {figures['kl']:9.1e} {figures['top1']:6.3f} "
            f"{figures['logprob_difference_mean']:9.1e} {signs[0]:>10} {signs[1]:>10}  {found['verdict']}",
            flush=True,
        )
    print(json.dumps({"benchmark": "certificates", "model": args.model, "rows": rows}))


if __name__ == "__main__":
    main()
