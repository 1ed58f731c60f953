"""`lrqat-export`: a fused checkpoint into a wire format, read back and compared bit by bit."""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lrqat.command import common_flags, run, set_threads, show, with_recipe
from lrqat.errors import LrqatError

FORMATS = ("gguf", "gptq", "awq", "compressed-tensors")  # of exporters.formats, which is slow to import


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
    parser.add_argument(
        "--format", required=True, choices=FORMATS, help="gguf for llama.cpp, the others for vLLM and transformers"
    )
    parser.add_argument("--out", required=True, type=Path, help="a .gguf file, or a directory for safetensors formats")
    parser.add_argument("--reference", action="store_true", help="gguf: write the dequantized weights in F32 instead")
    parser.add_argument("--zeros", choices=("v1", "v2"), help="gptq: how zeros are stored (default: what vLLM expects)")
    parser.add_argument(
        "--activations", choices=("int8",), help="compressed-tensors: W8A8, for 8-bit weights per channel"
    )
    parser.add_argument(
        "--llama-cpp",
        type=Path,
        metavar="DIR",
        help="gguf: a llama.cpp checkout that knows the architecture; it is run",
    )
    parser.add_argument("--no-verify", action="store_true", help="do not read the result back and compare")
    return parser


OPTIONS = {"reference": "gguf", "zeros": "gptq", "activations": "compressed-tensors", "llama_cpp": "gguf"}


def _main(args: argparse.Namespace) -> int:
    set_threads(args.threads)
    for option, form in OPTIONS.items():
        if getattr(args, option) and args.format != form:
            raise LrqatError(f"--{option.replace('_', '-')}: is for --format {form}; leave it out")
    if args.reference and args.llama_cpp:
        raise LrqatError("--reference: --llama-cpp writes quantized files only; leave one of them out")

    from exporters import matrix
    from exporters.card import card, card_path, measured
    from exporters.formats import FORMATS as exporters
    from exporters.formats import as_stored
    from exporters.verify import verify
    from lrqat.fused import FusedCheckpoint, read_json

    checkpoint, known = FusedCheckpoint.load(args.fused), measured(args.fused)
    exporter = exporters[args.format]
    if args.format != "gguf":
        form = "w8a8" if args.activations else args.format
        runs = [matrix.answer(checkpoint, f"{form}@{runtime}") for runtime in ("vllm-cpu", "vllm-gpu")]
        if all(each.refusal for each in runs):
            print(f"warning: vLLM will not run this file: {runs[0].refusal}", file=sys.stderr)
    started = time.monotonic()
    if args.llama_cpp:
        from exporters.gguf_foreign import write

        written = write(checkpoint, args.out, args.llama_cpp)
    else:
        options: dict[str, Any] = {"zeros": args.zeros} if args.zeros else {}
        options |= {"activations": args.activations} if args.activations else {}
        options |= {"dequantized": True} if args.reference else {}
        written = exporter.write(checkpoint, args.out, **options)
    seconds = time.monotonic() - started
    files = [written] if written.is_file() else list(written.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    result = {"format": args.format, "out": str(written), "bytes": size, "seconds": seconds, **checkpoint.counts()}
    if args.llama_cpp:
        print(
            "note: not read back; each quantized row was found by its tag (exporters/gguf_foreign.py)", file=sys.stderr
        )
    elif not args.no_verify:
        try:
            result["bitwise_equal"] = verify(as_stored(checkpoint, args.format), exporter.read(written), written)
        except BaseException:  # a file that is not what it should be does not keep its name
            shutil.rmtree(written) if written.is_dir() else written.unlink()
            raise
    dtype = str(read_json(written / "config.json").get("dtype", "float16")) if written.is_dir() else ""
    card_path(written).write_text(card(checkpoint, args.format, str(written), dtype, known), encoding="utf-8")
    show(result, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
