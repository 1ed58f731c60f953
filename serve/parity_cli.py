"""`lrqat-parity`: check an exported model against its fused checkpoint on the real runtime; write a certificate."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from lrqat.command import common_flags, run, set_threads, with_recipe


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `lrqat-parity`; status 1 when the verdict is fail."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return run(lambda: _main(make_parser().parse_args(with_recipe(arguments))))


def make_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(
        prog="lrqat-parity",
        description="Prove that the served model is the trained one: weights bitwise, logits within derived limits, "
        "with a positive and a negative control. Writes a certificate beside the exported model.",
        epilog="example:\n  lrqat-parity runs/smollm2/fused smollm2-q4_0.gguf",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    common_flags(parser)
    parser.add_argument("fused", type=Path, help="a fused checkpoint, or the run that holds it")
    parser.add_argument("exported", type=Path, help="what lrqat-export wrote: a .gguf file or a directory")
    parser.add_argument("--runtime", choices=("llama.cpp", "vllm"), help="default: the one that reads the format")
    parser.add_argument("--text", nargs="+", default=[], metavar="SOURCE", help="default: CPython's documentation")
    parser.add_argument("--sequences", type=int, default=4, help="how many to compare on (4)")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens of each (512)")
    parser.add_argument("--no-controls", action="store_true", help="skip the positive and the negative control")
    parser.add_argument("--python", default=sys.executable, help="vllm: an interpreter whose environment has vLLM")
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), help="vllm: to serve in (float16; W8A8 bfloat16)")
    parser.add_argument("--out", type=Path, metavar="JSON", help="where the certificate goes")
    return parser


def _main(args: argparse.Namespace) -> int:
    set_threads(args.threads)
    import torch

    from lrqat.fused import write_json
    from serve.parity import certificate_path, certify, runtime_for, table

    runtime = runtime_for(
        args.exported, args.runtime, threads=torch.get_num_threads(), python=args.python, dtype=args.dtype
    )
    certificate = certify(
        args.fused,
        args.exported,
        runtime,
        texts=args.text,
        count=args.sequences,
        length=args.seq_len,
        controls=not args.no_controls,
    )
    path = args.out or certificate_path(args.exported)
    write_json(path, certificate)
    print(json.dumps(certificate) if args.json else f"{table(certificate)}\ncertificate {path}")
    return 1 if certificate["verdict"] == "fail" else 0


if __name__ == "__main__":
    sys.exit(main())
