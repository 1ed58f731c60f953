"""auto-round: rounding and clipping learned by signed gradient descent, one block after the other.

The library's defaults: 200 iterations, batches of 8, 128 samples of 2048 tokens. `--preset light` is its
auto-round-light (50 iterations, learning rate 5e-3). Saved in its own format (GPTQ's packing, zero points as they are).

    python benchmarks/peers/with_auto_round.py MODEL OUT --grid w4g32 --text FILE...
"""

from __future__ import annotations

import json
from importlib.metadata import version

from auto_round import AutoRound
from shared import Cost, Grid, blocks, finish, float32, fresh, gptq_weights, parser, tensors
from transformers import AutoTokenizer

PRESETS = {"default": {}, "light": {"iters": 50, "lr": 5e-3}}


def main() -> None:
    """Quantize, and decode what was saved."""
    arguments = parser(__doc__ or "")
    arguments.add_argument("--preset", choices=sorted(PRESETS), default="default")
    arguments.add_argument("--samples", type=int, default=128, help="calibration blocks (128)")
    arguments.add_argument("--seq-len", type=int, default=2048, help="tokens of each (2048)")
    arguments.add_argument("--batch", type=int, default=8, help="blocks a step (8)")
    float32(arguments)
    args = arguments.parse_args()
    out = fresh(args.out)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    ids = blocks(tokenizer, args.text, args.samples, args.seq_len)
    grid: Grid = args.grid
    scheme = {"bits": grid.bits, "group_size": grid.group or -1, "sym": not grid.asymmetric, "data_type": "int"}
    learner = AutoRound(
        str(args.model),
        tokenizer,
        scheme=scheme,
        dataset=list(ids.split(args.batch)),
        nsamples=args.samples,
        seqlen=args.seq_len,
        batch_size=args.batch,
        device_map="cpu",
        amp=not args.float32,
        **PRESETS[args.preset],
    )
    learner.quantize_and_save(str(out / "packed"), format="auto_round")
    cost = Cost.so_far()
    (folder,) = {path.parent for path in (out / "packed").rglob("*.safetensors")}
    said = json.loads((folder / "config.json").read_text())["quantization_config"]
    # "IF using sym, we change to gptq sym kernel": GPTQ's first format, which stores z - 1.
    weights = gptq_weights(tensors(folder), grid, zero_offset="auto_gptq" in said.get("packing_format", ""))
    finish(
        out,
        args.model,
        weights,
        cost,
        tool="auto-round",
        version=version("auto-round"),
        method="auto-round" if args.preset == "default" else f"auto-round-{args.preset}",
        settings=f"{args.preset} preset, {args.samples} x {args.seq_len} tokens, batch {args.batch}"
        + ", float32" * args.float32,
        **grid.account(weights),
    )


if __name__ == "__main__":
    main()
