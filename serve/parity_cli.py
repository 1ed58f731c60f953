"""`lrqat-parity`: check an exported model against its fused checkpoint on the real runtime; write a certificate.

lrqat-parity FUSED EXPORTED              in process, with both controls
lrqat-parity FUSED EXPORTED --url URL    what a deployed server tells over HTTP
lrqat-parity --verify CERTIFICATE        are the files still those that were certified?
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from lrqat.command import common_flags, run, set_threads, show, with_recipe
from lrqat.errors import LrqatError

SIZES = {False: (4, 512), True: (1, 384)}  # sequences and tokens: in process, over HTTP


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
        epilog="examples:\n  lrqat-parity runs/smollm2/fused smollm2-q4_0.gguf\n"
        "  lrqat-parity --verify smollm2-q4_0.certificate.json\n"
        "  lrqat-parity runs/smollm2/fused smollm2-q4_0.gguf --url http://127.0.0.1:8000",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    common_flags(parser)
    parser.add_argument("fused", type=Path, nargs="?", help="a fused checkpoint, or the run that holds it")
    parser.add_argument("exported", type=Path, nargs="?", help="what lrqat-export wrote: a .gguf file or a directory")
    parser.add_argument(
        "--verify", type=Path, metavar="CERTIFICATE", help="only hash again all files that this certificate names"
    )
    parser.add_argument("--url", help="check the server that runs there, by what it tells over HTTP")
    parser.add_argument("--runtime", choices=("llama.cpp", "vllm"), help="default: the one that reads the format")
    parser.add_argument("--text", nargs="+", default=[], metavar="SOURCE", help="default: CPython's documentation")
    parser.add_argument("--sequences", type=int, help="how many to compare on (4; with --url 1)")
    parser.add_argument("--seq-len", type=int, help="tokens of each (512; with --url 384)")
    parser.add_argument("--no-controls", action="store_true", help="skip the positive and the negative control")
    parser.add_argument(
        "--as-served",
        action="store_true",
        help="compare although the runtime does not round the activations, keys or values that training rounded",
    )
    parser.add_argument("--python", default=sys.executable, help="vllm: an interpreter whose environment has vLLM")
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), help="vllm: to serve in (float16; W8A8 bfloat16)")
    parser.add_argument("--out", type=Path, metavar="JSON", help="where the certificate goes")
    return parser


def _main(args: argparse.Namespace) -> int:
    if args.verify is not None:
        return _verify(args)
    if args.exported is None:
        raise LrqatError("lrqat-parity: expected FUSED EXPORTED, or --verify CERTIFICATE; see --help")
    set_threads(args.threads)
    import torch

    from exporters.card import certify_card
    from serve import certificate as certificates
    from serve.http_parity import certify_served
    from serve.launch import has_cuda
    from serve.parity import certify, runtime_for, table

    runtime = runtime_for(
        args.exported, args.runtime, threads=torch.get_num_threads(), python=args.python, dtype=args.dtype
    )
    count, length = SIZES[args.url is not None]
    count = count if args.sequences is None else args.sequences
    length = length if args.seq_len is None else args.seq_len
    path = args.out or certificates.certificate_path(args.exported)
    if not path.parent.is_dir():
        raise LrqatError(f"{path}: no directory {path.parent} for the certificate; make it, or give another --out")
    if args.url:
        certificate = certify_served(
            args.fused,
            args.exported,
            runtime,
            args.url,
            texts=args.text,
            count=count,
            length=length,
            as_served=args.as_served,
        )
        path = args.out or path.with_name(path.name.replace(certificates.NAME, f"http.{certificates.NAME}"))
    else:
        if runtime.name == "vllm":
            has_cuda(args.python)  # refuses an interpreter without vLLM, before the reference is computed
        certificate = certify(
            args.fused,
            args.exported,
            runtime,
            texts=args.text,
            count=count,
            length=length,
            controls=not args.no_controls,
            as_served=args.as_served,
        )
    certificate = certificates.write(path, certificate, args.fused, args.exported)
    if not args.url:
        certify_card(args.exported, certificate)
    print(json.dumps(certificate) if args.json else f"{table(certificate)}\ncertificate {path}")
    return 1 if certificate["verdict"] == "fail" else 0


def _verify(args: argparse.Namespace) -> int:
    """Status 1, and one line, unless all files are those that the certificate names."""
    from serve.certificate import verify

    try:
        found = verify(args.verify, args.fused, args.exported)
    except LrqatError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    base = "as certified" if found["base"] else "not here, not checked"
    rows = {
        "exported": f"{found['exported']} files as certified",
        "fused": f"{found['fused']} files as certified",
        "base": base,
        "verdict": found["verdict"].upper(),
    }
    show(found if args.json else rows, args.json)
    return 1 if found["verdict"] == "fail" else 0


if __name__ == "__main__":
    sys.exit(main())
