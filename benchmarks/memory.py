"""What training holds in memory, at the shapes of models that are too large to have around.

    python benchmarks/memory.py --shape 7b --tokens 256 --threads 1
    python benchmarks/memory.py --shape 13b --tokens 256 --offload disk

A Llama of the named shape with random packed weights: codes are written straight in packed form, no weight ever exists
as a float. Everything else is the real thing: `lrqat.train`'s trainer with AdamW and gradients clipped to norm 1,
checkpointing per decoder layer, distillation from cached (random) hidden states, one step as it is in the middle of a
run, Adam's moments being there. Embedding and head lie in a mapped file, as those of a checkpoint do.

Peaks are the kernel's (VmHWM: anonymous memory and pages of files), of the building, of the step, and with the saved
checkpoint; beside them what `lrqat plan` predicts. Linux only. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from lrqat.assign import Assignment
from lrqat.estimate import estimate
from lrqat.grid import Affine, Grid
from lrqat.layers import quantizers, swap
from lrqat.memory import keep_freed_memory, status_bytes
from lrqat.methods.lr_qat import LRQAT
from lrqat.offload import offloaded
from lrqat.optimizer import state_of
from lrqat.plan import plan
from lrqat.safestream import Entry, write_file
from lrqat.settings import OPTIMIZERS, TrainSettings
from lrqat.sites import Site
from lrqat.teacher import WORDS, Blocks
from lrqat.train import make_trainer

SHAPES = {  # hidden, intermediate, layers, heads, heads of keys and values
    "tiny": (256, 704, 4, 4, 4),
    "1b": (2048, 5632, 22, 32, 4),  # TinyLlama
    "7b": (4096, 11008, 32, 32, 32),  # Llama 2
    "13b": (5120, 13824, 40, 40, 40),
    "70b": (8192, 28672, 80, 64, 8),
}
VOCABULARY = 32000
NOISE_BYTES = 1 << 22  # of random codes, repeated: whole words of a generator
SCALE = 2.0**-9  # of every group: weights of a few hundredths


def memory(key: str) -> int:
    """VmHWM, RssAnon ... of this process, in bytes."""
    found = status_bytes(key)
    assert found is not None
    return found


def forget_peak() -> None:
    """From now on VmHWM counts anew (proc(5))."""
    Path("/proc/self/clear_refs").write_text("5")


def config(shape: str) -> LlamaConfig:
    """Of the named shape."""
    hidden, inner, layers, heads, kv = SHAPES[shape]
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )


def skeleton(shape: str) -> Any:
    """The model on the meta device, in bfloat16."""
    with torch.device("meta"):
        return LlamaForCausalLM(config(shape)).to(torch.bfloat16).requires_grad_(False)


def fill_dense(model: Any, path: Path) -> None:
    """Random embedding and head in a mapped file, norms of 1, and the buffers of rotary positions."""

    def random(parameter: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.empty(parameter.shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)

    ends = {"embedding": model.get_input_embeddings(), "head": model.get_output_embeddings()}
    entries = [
        Entry(name, torch.bfloat16, tuple(end.weight.shape), lambda end=end: random(end.weight))
        for name, end in ends.items()
    ]
    write_file(path, entries, {"format": "pt"})
    with safe_open(path, framework="pt") as file:
        for name, end in ends.items():
            end.weight = nn.Parameter(file.get_tensor(name), requires_grad=False)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta and parameter.ndim == 1:
                setattr(module, name, nn.Parameter(torch.ones(parameter.shape, dtype=torch.bfloat16), False))
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)


class RandomCodes(LRQAT):
    """LR-QAT of random frozen weights, made in packed form."""

    def _store(self, weight_OI: Tensor, affine: Affine) -> Tensor:
        rows, columns = self.shape
        packed = self.downcast == "int" and self.grid.bits <= 4
        dtype = torch.uint8 if self.downcast == "int" else torch.int8
        phi = torch.empty(rows, columns // 2 if packed else columns, dtype=dtype)
        noise = torch.randint(-(1 << 62), 1 << 62, (NOISE_BYTES // 8,)).view(dtype)
        for piece in phi.view(-1).split(NOISE_BYTES):
            piece.copy_(noise[: len(piece)])
        return phi


def quantizer(settings: TrainSettings, site: Site, grid: Grid, generator: torch.Generator) -> LRQAT:
    """LR-QAT whose weight exists nowhere: of one value, seen O x I times."""
    rows, columns = site.shape
    parts = {
        name: torch.full(part.shape, SCALE if name == "scales" else float(part.low or 0))
        for name, part in grid.parts(rows, columns).items()
    }
    assert settings.rank is not None and settings.downcast is not None
    return RandomCodes(
        torch.zeros(1, 1).expand(rows, columns),
        parts,
        grid,
        rank=settings.rank,
        alpha=settings.rank,
        downcast=settings.downcast,
        learn_scales=True,
        generator=generator,
    )


def random_teacher(path: Path, tokens: int, hidden: int) -> None:
    """Final hidden states [1, T, H], as `lrqat.teacher` keeps them."""
    states = torch.randn(1, tokens, hidden, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    np.save(path, states.view(WORDS[2]).numpy())


class Moments(TrainerCallback):
    """Adam has its moments before the step, as in all steps but a run's first: one of zero gradients moves nothing."""

    def on_train_begin(self, *_: Any, optimizer: Any, model: Any, **__: Any) -> None:
        """Take that step."""
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()


class AfterStep(TrainerCallback):
    """Notes the peak when a step is over, before its checkpoint is written."""

    def __init__(self) -> None:
        self.peak = 0
        self.cpu_seconds = self.seconds = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Begin to count."""
        forget_peak()
        self.seconds, self.cpu_seconds = -time.monotonic(), -cpu_seconds()

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        """AdamW is done; gradients are still there."""
        self.peak = memory("VmHWM")
        self.seconds += time.monotonic()
        self.cpu_seconds += cpu_seconds()


def cpu_seconds() -> float:
    """Of this process, so far."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def held(model: Any, optimizer: Any) -> dict[str, int]:
    """Bytes of what lives from step to step, by part."""
    trained = [p for p in model.parameters() if p.requires_grad]
    found = quantizers(model).values()
    packed = [getattr(q, name) for q in found for name in q.immutable]
    starts = [part for q in found for part in q.buffers() if all(part is not other for other in packed)]
    return {
        "packed": sum(t.nbytes for t in packed),
        "grid": sum(t.nbytes for t in starts),
        "dense": sum(p.nbytes for p in model.parameters() if not p.requires_grad),
        "trained": sum(p.nbytes for p in trained),
        "gradients": sum(p.grad.nbytes for p in trained if p.grad is not None),
        "moments": sum(t.nbytes for t in state_of(optimizer)[0].values() if t.ndim),
    }


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--grid", default="w4")
    parser.add_argument("--downcast", choices=("int", "fixed"), default="int")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=256, help="of the one block of the step (256)")
    parser.add_argument("--layers", type=int, help="only so many decoder layers")
    parser.add_argument("--offload", choices=("disk",), help="as of lrqat train")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw", help="as of lrqat train")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--dir", type=Path, help="where files lie while it runs (default: the system's)")
    args = parser.parse_args(argv)
    keep_freed_memory()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.layers:
        hidden, inner, _, heads, kv = SHAPES[args.shape]
        SHAPES[args.shape] = (hidden, inner, args.layers, heads, kv)
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        result = measure(args, Path(folder))
    print(json.dumps(result))
    return 0


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Build, train one step, tell."""
    settings = TrainSettings(
        args.shape,
        str(folder / "run"),
        grid=args.grid,
        downcast=args.downcast,
        rank=args.rank,
        seq_len=args.tokens,
        batch_size=1,
        steps=1,
        gradient_checkpointing=True,
        offload=args.offload,
        optimizer=args.optimizer,
    )
    model = skeleton(args.shape)
    decided = plan(model, Assignment.make(Grid.parse(settings.grid)), settings.rank)
    predicted = estimate(model, decided, settings)
    print(f"{args.shape}: {decided.weights / 1e9:.2f} billion weights, {decided}", file=sys.stderr)
    before = memory("VmRSS")
    folder.joinpath("run").mkdir()
    fill_dense(model, folder / "dense.safetensors")
    generator = torch.Generator().manual_seed(2)
    with offloaded(settings.offload, folder / "run" / "frozen.safetensors", decided) as frozen:

        def make(site: Site, _: Tensor, grid: Grid) -> LRQAT:
            return quantizer(settings, site, grid, generator)

        swap(model, decided, frozen.taking(make) if frozen else make)
        if frozen:
            frozen.finish(model)
    model.train()
    built = memory("VmHWM")
    random_teacher(folder / "teacher.npy", args.tokens, model.config.hidden_size)
    ids_NT = torch.randint(0, VOCABULARY, (1, args.tokens), generator=generator)
    trainer = make_trainer(model, Blocks(ids_NT, folder / "teacher.npy", torch.bfloat16), settings, Path(settings.out))
    after = AfterStep()
    trainer.add_callback(Moments())
    trainer.add_callback(after)
    parts: dict[str, int] = {}

    class Count(TrainerCallback):
        def on_optimizer_step(self, *_: Any, **__: Any) -> None:
            parts.update(held(model, trainer.optimizer.optimizer))

    trainer.add_callback(Count())
    trainer.train()
    own = {f"{name}_gb": round(nbytes / 1e9, 3) for name, nbytes in parts.items()}
    foreseen = {f"{name}_gb": round(nbytes / 1e9, 3) for name, nbytes in predicted.parts.items()}
    for name in sorted(own.keys() | foreseen.keys()):
        print(f"{name:18} {own.get(name, ''):>8} predicted {foreseen.get(name, ''):>8}", file=sys.stderr)
    return {
        "benchmark": "memory",
        "shape": args.shape,
        "layers": model.config.num_hidden_layers,
        "grid": args.grid,
        "downcast": args.downcast,
        "rank": args.rank,
        "tokens": args.tokens,
        "offload": args.offload,
        "weights": decided.weights,
        "peak_gb": round(after.peak / 1e9, 3),
        "predicted_gb": round(predicted.total / 1e9, 3),
        "peak_building_gb": round(built / 1e9, 3),
        "peak_with_checkpoint_gb": round(memory("VmHWM") / 1e9, 3),
        "imported_gb": round(before / 1e9, 3),
        "parts": own,
        "predicted": foreseen,
        "step_seconds": round(after.seconds, 1),
        "step_cpu_seconds": round(after.cpu_seconds, 1),
        "threads": torch.get_num_threads(),
    }


if __name__ == "__main__":
    sys.exit(main())
