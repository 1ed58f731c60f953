"""`lrqat-export`: a fused checkpoint into a wire format, read back and compared bit by bit."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from lrqat.command import common_flags, run, set_threads, show, with_recipe
from lrqat.errors import LrqatError

FORMATS = ("gguf", "gptq")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `lrqat-export`."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return run(lambda: _main(make_parser().parse_args(with_recipe(arguments))))


def make_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(
        prog="lrqat-export",
        description="Write a fused checkpoint as the bytes a runtime reads; integers are copied, never re-rounded.",
        epilog="example:\n  lrqat-export runs/smollm2/fused --format gguf --out smollm2-q4_0.gguf",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    common_flags(parser)
    parser.add_argument("fused", type=Path, help="a fused checkpoint, or the run that holds it")
    parser.add_argument("--format", required=True, choices=FORMATS, help="gguf for llama.cpp, gptq for vLLM")
    parser.add_argument("--out", required=True, type=Path, help="a .gguf file, or a directory for safetensors formats")
    parser.add_argument("--reference", action="store_true", help="gguf: write the dequantized weights in F32 instead")
    parser.add_argument("--zeros", choices=("v1", "v2"), help="gptq: how zeros are stored (default: what vLLM expects)")
    parser.add_argument("--no-verify", action="store_true", help="do not read the result back and compare")
    return parser


def _main(args: argparse.Namespace) -> int:
    set_threads(args.threads)
    if args.reference and args.format != "gguf":
        raise LrqatError("--reference: only gguf has an F32 reference file; leave it out")
    if args.zeros and args.format != "gptq":
        raise LrqatError("--zeros: only gptq stores zeros in two ways; leave it out")

    from lrqat.fused import FusedCheckpoint

    checkpoint = FusedCheckpoint.load(args.fused)
    started = time.monotonic()
    if args.format == "gguf":
        from exporters import gguf

        written = gguf.write(checkpoint, args.out, dequantized=args.reference)
        size, exported = written.stat().st_size, gguf.read
    else:
        from exporters import gptq

        if limit := gptq.vllm_limits(checkpoint):
            print(f"warning: vLLM will not run this file: {limit}", file=sys.stderr)
        written = gptq.write(checkpoint, args.out, zeros=args.zeros)
        size, exported = sum(f.stat().st_size for f in written.glob("*.safetensors")), gptq.read
    seconds = time.monotonic() - started
    result = {"format": args.format, "out": str(written), "bytes": size, "seconds": seconds, **checkpoint.counts()}
    if not args.no_verify:
        from exporters.verify import verify

        result["bitwise_equal"] = verify(checkpoint, exported(written), written)
    show(result, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
