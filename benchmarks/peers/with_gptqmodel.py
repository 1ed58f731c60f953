"""GPTQModel: GPTQ with its defaults (damping, act_group_aware in place of desc_act), saved in GPTQ's first format.

Its README calibrates on 1024 documents of C4, one a batch; here they are blocks of equal length.

    python benchmarks/peers/with_gptqmodel.py MODEL OUT --grid w4g32 --text FILE...
"""

from __future__ import annotations

import os
from importlib.metadata import version

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # its own default, half the cores, is one too few on two

import torch
from gptqmodel import GPTQModel, QuantizeConfig
from shared import Cost, Grid, blocks, finish, float32, fresh, gptq_weights, parser, tensors
from transformers import AutoTokenizer


def main() -> None:
    """Quantize, and decode what was saved."""
    arguments = parser(__doc__ or "")
    arguments.add_argument("--samples", type=int, default=1024, help="calibration blocks (1024)")
    arguments.add_argument("--seq-len", type=int, default=512, help="tokens of each (512)")
    float32(arguments)
    args = arguments.parse_args()
    out, args.model = fresh(args.out).resolve(), args.model.resolve()
    grid: Grid = args.grid
    ids = blocks(AutoTokenizer.from_pretrained(args.model), args.text, args.samples, args.seq_len)
    os.chdir(out)  # it writes a folder of logs beside itself
    config = QuantizeConfig(bits=grid.bits, group_size=grid.group or -1, sym=not grid.asymmetric, device="cpu")
    model = GPTQModel.load(str(args.model), config, dtype=torch.float32 if args.float32 else "auto")
    model.quantize([{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids], batch_size=1)
    model.save(str(out / "packed"))
    cost = Cost.so_far()
    weights = gptq_weights(tensors(out / "packed"), grid, zero_offset=1)
    finish(
        out,
        args.model,
        weights,
        cost,
        tool="GPTQModel",
        version=version("gptqmodel"),
        method="gptq",
        settings=f"{args.samples} x {args.seq_len} tokens{', float32' * args.float32}, all else default",
        **grid.account(weights),
    )


if __name__ == "__main__":
    main()
