"""What does a training step cost? Methods side by side: seconds, CPU seconds and peak memory of a step.

Every case is a process of its own with the same model, tokens, distillation loss and AdamW with global clipping; they
take steps in turn, in an order drawn anew for every round, one at a time: what the machine does meanwhile meets all.
Ratios are to the first case, the median over rounds.

    frozen              forward, and backward through the activations alone: the floor
    lora                PEFT's LoRA on all linear layers, nothing rounded; adapters in float32, as PEFT makes them and
                        lrqat has them, under autocast to --dtype, as Trainer does (needs `pip install peft`)
    lora-bf16           the same with adapters in bfloat16, and Adam's moments with them
    full                full fine-tuning, nothing rounded
    METHOD@GRID         lrqat, lsq, scales or l4q
    lrqat-tiles@GRID    lrqat with dL/dW formed row tile by row tile, where it would not be
    torchao@GRID        torchao's QAT of all weights, in float32 under autocast too (needs `pip install torchao`)
    nncf@GRID           NNCF's FQ_LORA, likewise (needs `pip install nncf`)

    python benchmarks/step.py MODEL --cases lora lrqat@w4 lsq@w4 --rounds 8 --compile
    python benchmarks/step.py MODEL --dtype float32     # where the processor has no instructions for bfloat16
    python benchmarks/step.py MODEL --cases lrqat@w4g32 --profile       # where the time goes, operator by operator

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import time
from typing import Any

from lrqat.settings import TRAIN_DTYPES

CASES = ("lora", "lora-bf16", "frozen", "full", "lsq@w4", "lrqat-tiles@w4", "lrqat@w4", "lrqat@w4g32")
METRICS = ("seconds", "cpu_seconds")
AUTOCAST = ("lora", "torchao", "nncf")  # cases whose users train float32 parameters so
LEARNING_RATE = 1e-6  # finite, and no rate that would move much
PROFILED = 15  # operators
WARM_UP = 2  # steps that are not counted: compilation, memory from the system


def model_of(case: str, args: argparse.Namespace) -> Any:
    """The model, with what the case trains requiring gradients."""
    import torch

    from lrqat.begin import swap_for_training
    from lrqat.grid import Grid
    from lrqat.layers import quantizers
    from lrqat.methods.lr_qat import LRQAT
    from lrqat.models import locate
    from lrqat.plan import plan
    from lrqat.settings import TrainSettings

    base = locate(args.model)
    if case.startswith(("torchao", "nncf")):
        tool, grid = case.split("@")
        other = torchao_model if tool == "torchao" else nncf_model
        return other(base.model(torch.float32).requires_grad_(True), Grid.parse(grid), args.rank).train()
    model = base.model(getattr(torch, args.dtype))
    if case.startswith(("frozen", "lora")):
        model.requires_grad_(False)
    if case.startswith("lora"):
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules="all-linear", task_type="CAUSAL_LM")
        get_peft_model(model, config, autocast_adapter_dtype=case == "lora")
    if "@" in case:
        method, grid = case.split("@")
        settings = TrainSettings(
            model=args.model,
            out="unused",
            grid=grid,
            method=method.removesuffix("-tiles"),
            rank=args.rank if method.startswith(("lrqat", "l4q")) else None,
            compile=args.compile,
            dtype=args.dtype,
        )
        swap_for_training(model, plan(base.skeleton(), settings.assignment, settings.rank), settings)
        if method == "lrqat-tiles":
            for quantizer in quantizers(model).values():
                assert isinstance(quantizer, LRQAT)
                quantizer.factored = False
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def torchao_model(model: Any, grid: Any, _: int) -> Any:
    """torchao's QAT of symmetric weights."""
    import torch
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerAxis, PerGroup
    from torchao.quantization.qat import QATConfig

    granularity: Any = PerAxis(0) if grid.group_size == -1 else PerGroup(grid.group_size)
    base = IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{grid.bits}"), granularity=granularity)
    head = model.get_output_embeddings()
    quantize_(
        model,
        QATConfig(base, step="prepare"),
        filter_fn=lambda module, _: isinstance(module, torch.nn.Linear) and module is not head,
    )
    return model


def nncf_model(model: Any, grid: Any, rank: int) -> Any:
    """NNCF's FQ_LORA of symmetric 4-bit weights."""
    import nncf
    import torch
    from nncf.torch.function_hook.wrapper import get_hook_storage
    from nncf.torch.quantization.layers import SymmetricLoraQuantizer

    ids = torch.zeros(1, 8, dtype=torch.int64)
    example = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": torch.arange(8)[None]}
    model.config.use_cache = False
    model = nncf.compress_weights(
        model.eval(),
        mode=nncf.CompressWeightsMode.INT4_SYM,
        group_size=grid.group_size,
        backup_mode=nncf.BackupMode.NONE,
        dataset=nncf.Dataset([example]),
        compression_format=nncf.CompressionFormat.FQ_LORA,
        advanced_parameters=nncf.AdvancedCompressionParameters(lora_adapter_rank=rank),
    )
    model.requires_grad_(False)
    for _, hook in get_hook_storage(model).named_hooks():
        if isinstance(hook, SymmetricLoraQuantizer) and hook.num_bits == grid.bits:
            hook.enable_gradients()
    return model


def nncf_loss(model: Any, ids: Any, teacher: Any) -> Any:
    """KL to the teacher from all logits at once: NNCF's hooks work in the whole model's forward only."""
    import torch
    from torch.nn import functional as F

    with torch.no_grad():
        wanted = model.get_output_embeddings()(teacher)
    mask = torch.ones_like(ids)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=mask.cumsum(1) - 1).logits
    rows = (x.flatten(0, 1).float().log_softmax(1) for x in (logits, wanted))
    return F.kl_div(*rows, log_target=True, reduction="batchmean")


def one(case: str, args: argparse.Namespace) -> None:
    """A case's process: one JSON line for every line that comes in."""
    import torch

    from lrqat.command import set_threads
    from lrqat.console import peak_memory_gb
    from lrqat.memory import keep_freed_memory
    from lrqat.optimizer import make_optimizer
    from lrqat.trainer import LossModel

    keep_freed_memory()  # as `lrqat train` does; the others gain by it too
    set_threads(args.threads)
    torch.manual_seed(0)
    with contextlib.redirect_stdout(sys.stderr):  # NNCF prints tables
        model = model_of(case, args)
    loss = LossModel(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer("adamw", [{"params": trained, "lr": LEARNING_RATE}]) if trained else None
    config = model.config.get_text_config()
    shape = (args.batch_size, args.seq_len)
    if not trained:  # a gradient has to reach the first layer
        model.get_input_embeddings().register_forward_hook(lambda *found: found[-1].requires_grad_())
    dtype = getattr(torch, args.dtype)
    sizes = {"trained": sum(p.numel() for p in trained)}

    def take() -> dict[str, float]:
        ids = torch.randint(0, config.vocab_size, shape)
        teacher = torch.randn(*shape, config.hidden_size).to(dtype)
        begun, cpu = time.perf_counter(), time.process_time()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32 and case.partition("@")[0] in AUTOCAST):
            found = nncf_loss(model, ids, teacher) if case.startswith("nncf") else loss(ids, teacher)["loss"]
        found.backward()
        if optimizer is not None:
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return {"seconds": time.perf_counter() - begun, "cpu_seconds": time.process_time() - cpu}

    if args.profile:
        for _ in range(WARM_UP):
            take()
        with torch.profiler.profile() as profile:
            take()
        print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=PROFILED))
        return
    for _ in sys.stdin:
        found = {**take(), **sizes}
        print(json.dumps({**found, "peak_memory_gb": round(peak_memory_gb(), 3)}), flush=True)


def step(child: subprocess.Popen[str], case: str) -> dict[str, float]:
    """Ask for a step."""
    assert child.stdin is not None and child.stdout is not None
    try:
        child.stdin.write("\n")
        child.stdin.flush()
        found: dict[str, float] = json.loads(child.stdout.readline())
    except (OSError, json.JSONDecodeError):
        sys.exit(f"error: {case} has ended; its reason stands above")
    return found


def main() -> None:
    """All cases, in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a Hugging Face directory")
    parser.add_argument("--cases", nargs="+", default=CASES, metavar="CASE")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=TRAIN_DTYPES, default="bfloat16", help="of activations (bfloat16)")
    parser.add_argument("--compile", action="store_true", help="as lrqat train")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--profile", action="store_true", help="a step of each case under torch's profiler, no figures")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.dtype == "float32":  # there it is what lora is
        args.cases = [case for case in args.cases if case != "lora-bf16"]
    if args.one:
        one(args.one, args)
        return
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    if args.profile:
        for case in args.cases:
            print(case)
            subprocess.run([sys.executable, *sys.argv, "--one", case], env=environment, check=True)
        return
    children = {}
    try:
        for case in args.cases:
            words = [sys.executable, *sys.argv, "--one", case]
            pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            children[case] = subprocess.Popen(words, env=environment, **pipes)
            for _ in range(WARM_UP):
                step(children[case], case)
        samples: dict[str, list[dict[str, float]]] = {case: [] for case in args.cases}
        order, drawn = list(args.cases), random.Random(0)
        for number in range(args.rounds):
            drawn.shuffle(order)
            for case in order:
                samples[case].append(step(children[case], case))
            print(f"round {number + 1}/{args.rounds}", file=sys.stderr)
    finally:
        for child in children.values():
            child.kill()
            child.wait()
    first, results = args.cases[0], {}
    for case, rows in samples.items():
        found = {metric: round(statistics.median(row[metric] for row in rows), 3) for metric in METRICS}
        ratios = {
            f"{metric}_ratio": round(
                statistics.median(a[metric] / b[metric] for a, b in zip(rows, samples[first], strict=True)), 3
            )
            for metric in METRICS
        }
        results[case] = {
            **found,
            **ratios,
            "peak_memory_gb": rows[-1]["peak_memory_gb"],
            "trained": rows[-1]["trained"],
        }
        print(
            f"{case:20} {found['seconds']:7.2f} s  {found['cpu_seconds']:7.2f} CPU s  "
            f"x{ratios['cpu_seconds_ratio']:.3f} CPU  {rows[-1]['peak_memory_gb']:.2f} GB"
        )
    settings = {key: value for key, value in vars(args).items() if key not in ("one", "cases")}
    print(json.dumps({"benchmark": "step", "settings": settings, "ratio_to": first, "results": results}))


if __name__ == "__main__":
    main()
