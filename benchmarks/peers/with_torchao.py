"""torchao QAT: every weight trained through fake quantization, with cross-entropy; then converted by torchao.

torchao has no trainer: this is the loop its documentation shows, with the settings of torchtune's QAT recipe (AdamW,
learning rate 2e-5, constant; 2 sequences a step), float32 weights and bfloat16 autocast (--float32:
none). Scales are min-max, as IntxWeightOnlyConfig takes them.

    python benchmarks/peers/with_torchao.py MODEL OUT --grid w4g32 --core-minutes 60 --text FILE...
"""

from __future__ import annotations

from importlib.metadata import version

import torch
from shared import Cost, Grid, blocks, core_minutes_left, finish, fresh, parser, products, trained
from torchao.quantization import IntxWeightOnlyConfig, PerAxis, PerGroup, quantize_
from torchao.quantization.granularity import Granularity
from torchao.quantization.qat import QATConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

SAMPLES = 1024  # blocks of 512: most of the comparison's training text


def main() -> None:
    """Train, convert, and write what was converted."""
    arguments = parser(__doc__ or "")
    trained(arguments)
    arguments.add_argument("--samples", type=int, default=SAMPLES, help=f"training blocks ({SAMPLES})")
    arguments.add_argument("--seq-len", type=int, default=512, help="tokens of each (512)")
    arguments.add_argument("--batch", type=int, default=2, help="blocks a step (2)")
    arguments.add_argument("--lr", type=float, default=2e-5, help="learning rate (2e-5)")
    args = arguments.parse_args()
    out = fresh(args.out)
    grid: Grid = args.grid
    if grid.asymmetric:
        arguments.error(f"--grid {grid}: this script trains symmetric grids only")
    ids = blocks(AutoTokenizer.from_pretrained(args.model), args.text, args.samples, args.seq_len)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).train()
    granularity: Granularity = PerGroup(grid.group) if grid.group else PerAxis(0)
    base = IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{grid.bits}"), granularity=granularity)

    def linear(module: torch.nn.Module, name: str) -> bool:
        return isinstance(module, torch.nn.Linear) and "lm_head" not in name

    quantize_(model, QATConfig(base, step="prepare"), filter_fn=linear)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    order, steps = torch.Generator().manual_seed(0), 0
    while core_minutes_left(args.core_minutes):
        batch = ids[torch.randint(len(ids), (args.batch,), generator=order)]
        with products(args.float32):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
        if steps % 10 == 1:
            print(f"step {steps}: loss {loss.item():.4f}", flush=True)
    quantize_(model, QATConfig(base, step="convert"), filter_fn=linear)
    cost = Cost.so_far()
    weights = {
        name: value.dequantize() if hasattr(value, "qdata") else value for name, value in model.state_dict().items()
    }
    finish(
        out,
        args.model,
        weights,
        cost,
        tool="torchao",
        version=version("torchao"),
        method="qat",
        settings=f"cross-entropy, {steps} steps of {args.batch} x {args.seq_len} tokens, lr {args.lr:g}, all weights",
        **grid.account(weights, scale_bits=32),
    )


if __name__ == "__main__":
    main()
