"""PEFT: LoRA adapters trained beside the full-precision weights with cross-entropy, merged, then rounded to nearest.

The order of work that L4Q (arXiv 2402.04902) argues against. The rounding is `lrqat ptq`'s, so that the rows of L4Q and
of this script (l4q of benchmarks/quality.yaml) differ in the training alone: that one begins at the nearest codes, this
one ends there, both after 40 steps of two blocks of the same text. Rank 4 is L4Q's, alpha 8 and every linear but the
head PEFT's usual. This script wants lrqat's own environment with peft in it.

    python benchmarks/peers/with_peft.py MODEL OUT --grid w3g64-min --steps 40 --text FILE...
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.metadata import version

import torch
from peft import LoraConfig, get_peft_model
from shared import Cost, blocks, finish, fresh, parser
from transformers import AutoModelForCausalLM, AutoTokenizer

from lrqat.fused import FusedCheckpoint


def main() -> None:
    """Train, merge, round, and write what was rounded."""
    arguments = parser(__doc__ or "", grid=None)
    arguments.add_argument("--grid", default="w3g64-min", help="as `lrqat ptq` has them (w3g64-min)")
    arguments.add_argument("--steps", type=int, default=40, help="AdamW steps (40)")
    arguments.add_argument("--seq-len", type=int, default=512, help="tokens of a block (512)")
    arguments.add_argument("--batch", type=int, default=2, help="blocks a step (2)")
    arguments.add_argument("--rank", type=int, default=4, help="of the adapters (4)")
    arguments.add_argument("--lr", type=float, default=2e-4, help="learning rate, falling linearly to zero (2e-4)")
    args = arguments.parse_args()
    out = fresh(args.out)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    ids = blocks(tokenizer, args.text, args.steps * args.batch, args.seq_len)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    lora = LoraConfig(r=args.rank, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, lora).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, args.steps)
    for step, batch in enumerate(ids.split(args.batch), 1):
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 10 == 1:
            print(f"step {step}: loss {loss.item():.4f}", flush=True)
    model.merge_and_unload().save_pretrained(out / "merged")
    tokenizer.save_pretrained(out / "merged")
    rounding = [sys.executable, "-m", "lrqat.cli", "ptq", out / "merged", "--grid", args.grid, "--dtype", "float32"]
    subprocess.run([*rounding, "--out", out / "rounded"], check=True)
    cost = Cost.so_far()
    checkpoint = FusedCheckpoint.load(out / "rounded")
    weights = {**checkpoint.dense, **{name: fused.dequantize() for name, fused in checkpoint.tensors.items()}}
    specs = checkpoint.specs.values()
    for leftover in ("merged", "rounded"):
        shutil.rmtree(out / leftover)
    finish(
        out,
        args.model,
        weights,
        cost,
        tool="PEFT",
        version=version("peft"),
        method="lora+rtn",
        settings=f"cross-entropy, rank {args.rank}, {args.steps} steps of {args.batch} x {args.seq_len} tokens, "
        f"lr {args.lr:g}; merged, then rounded to nearest",
        grid=args.grid,
        bits_per_weight=sum(spec.bits for spec in specs) / sum(spec.weights for spec in specs),
    )


if __name__ == "__main__":
    main()
