"""NNCF FQ_LORA: absorbable low-rank adapters and scales trained inside fake quantization, distilled from the model.

The loop and settings of NNCF's own examples: rank 256 (less where a layer is narrower), AdamW, learning rate 1e-4 and
for scales a tenth of it, weight decay 1e-4, KL to the model's logits from cached hidden states, min-max start, batches
of 32 x 1024 tokens. Embeddings and head stay as they are, as in every other row (NNCF's default is 8 bits); weights are
float32 under bfloat16 autocast (--float32: none).
4 bits only: NNCF 3.4.0 lists INT3_SYM and INT2_SYM, but not for FQ_LORA (KeyError in get_fq_insertion_command).

    python benchmarks/peers/with_nncf.py MODEL OUT --grid w4g64-asym --core-minutes 60 --text FILE...
"""

from __future__ import annotations

from importlib.metadata import version

import nncf
import torch
import torchao  # noqa: F401  (nncf.strip wants it, which would say so only when all is trained)
from nncf.parameters import BackupMode, CompressionFormat, CompressWeightsMode, StripFormat
from nncf.quantization.advanced_parameters import AdvancedCompressionParameters
from nncf.torch.function_hook.wrapper import get_hook_storage
from nncf.torch.quantization.layers import AsymmetricLoraQuantizer, SymmetricLoraQuantizer
from shared import Cost, Grid, blocks, core_minutes_left, finish, fresh, parser, products, trained
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

MAX_RANK, LR = 256, 1e-4


def inputs(ids_BT: Tensor) -> dict[str, Tensor]:
    """What the model takes."""
    mask = torch.ones_like(ids_BT)
    return {"input_ids": ids_BT, "attention_mask": mask, "position_ids": mask.cumsum(1) - 1}


def main() -> None:
    """Start, train, absorb the adapters, and write the weights."""
    arguments = parser(__doc__ or "", grid="w4g64-asym")
    trained(arguments)
    arguments.add_argument("--samples", type=int, default=1024, help="training blocks (1024)")
    arguments.add_argument("--seq-len", type=int, default=1024, help="tokens of each (1024)")
    arguments.add_argument("--batch", type=int, default=32, help="blocks a step, one forward pass each (32)")
    args = arguments.parse_args()
    grid: Grid = args.grid
    if grid.bits != 4:
        arguments.error(f"--grid {grid}: NNCF's FQ_LORA has 4 bits only")
    mode = CompressWeightsMode.INT4_ASYM if grid.asymmetric else CompressWeightsMode.INT4_SYM
    out = fresh(args.out)
    ids = blocks(AutoTokenizer.from_pretrained(args.model), args.text, args.samples, args.seq_len)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    model.config.use_cache = False
    kept = torch.float32 if args.float32 else torch.bfloat16
    with torch.no_grad(), products(args.float32):
        hidden = [model.model(**inputs(row[None])).last_hidden_state.to(kept) for row in ids]

    example = inputs(ids[:1, :8])
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    rank = min(MAX_RANK, *(side for linear in linears for side in linear.weight.shape))
    model = nncf.compress_weights(
        model,
        mode=mode,
        group_size=grid.group or -1,
        backup_mode=BackupMode.NONE,
        dataset=nncf.Dataset([example]),
        compression_format=CompressionFormat.FQ_LORA,
        advanced_parameters=AdvancedCompressionParameters(lora_adapter_rank=rank),
    )
    model.requires_grad_(False)
    adapters: list[Tensor] = []
    scales: list[Tensor] = []
    for _, hook in get_hook_storage(model).named_hooks():
        if isinstance(hook, AsymmetricLoraQuantizer | SymmetricLoraQuantizer) and hook.num_bits == grid.bits:
            hook.enable_gradients()
            own = hook.get_adapters()
            adapters += own.values()
            scales += (value for name, value in hook.get_trainable_params().items() if name not in own)
    groups = [{"params": adapters, "lr": LR}, {"params": scales, "lr": LR / 10}]
    optimizer = torch.optim.AdamW(groups, weight_decay=LR)
    model.train()
    order, steps = torch.Generator().manual_seed(0), 0
    while core_minutes_left(args.core_minutes):
        for index in torch.randint(len(ids), (args.batch,), generator=order).tolist():
            with products(args.float32):
                with torch.no_grad():
                    wanted = model.lm_head(hidden[index])
                logits = model(**inputs(ids[index][None])).logits
            wanted, logits = (x.float().flatten(0, 1).log_softmax(1) for x in (wanted, logits))
            loss = F.kl_div(logits, wanted, log_target=True, reduction="batchmean")
            (loss / args.batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
        if steps % 10 == 1:
            print(f"step {steps}: KL {loss.item():.4f}", flush=True)
    model = nncf.strip(
        model.eval(), do_copy=False, strip_format=StripFormat.IN_PLACE, example_input=inputs(ids[:1, :8])
    )
    cost = Cost.so_far()
    weights = {name: value for name, value in model.state_dict().items() if "nncf" not in name}
    finish(
        out,
        args.model,
        weights,
        cost,
        tool="NNCF",
        version=version("nncf"),
        method="fq-lora",
        settings=f"rank {rank}, distilled, {steps} steps of {args.batch} x {args.seq_len} tokens, lr {LR:g}",
        **grid.account(weights),
    )


if __name__ == "__main__":
    main()
