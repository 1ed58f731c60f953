"""What the scripts beside it share: a grid, calibration text, the account of costs, the dense model that they leave.

Each script runs one tool in an environment of that tool's own, so this module needs torch, safetensors and
transformers only, and nothing of lrqat. Every run leaves

    OUT/model       a Hugging Face directory with the dequantized weights, exact: bfloat16 if that holds them all,
                    else float32
    OUT/cost.json   {"tool", "version", "method", "grid", "settings", "bits_per_weight", "megabytes",
                     "seconds", "cpu_seconds", "peak_memory_gb", "threads", "machine"}

Costs count from the start of the process (seconds from this module's import) to the tool's own packed output; turning
that into OUT/model is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import resource
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

STARTED = time.monotonic()
PRODUCTS = 50  # that tell how fast the machine is
ASSETS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
ASSETS += ("tokenizer.model", "vocab.json", "merges.txt", "generation_config.json")


@dataclass(frozen=True)
class Grid:
    """An integer grid: `bits`, columns a group (None: one group a row), and whether it has zero points."""

    bits: int
    group: int | None
    asymmetric: bool

    @classmethod
    def parse(cls, text: str) -> Grid:
        """Read w4g32, w3 (a scale a row), w2g64-asym."""
        found = re.fullmatch(r"w([2-8])(?:g([1-9]\d*))?(-asym)?", text)
        if not found:
            raise argparse.ArgumentTypeError(f"grid {text!r}: expected w4g32, w4, w2g64-asym or the like")
        return cls(int(found[1]), int(found[2]) if found[2] else None, bool(found[3]))

    def __str__(self) -> str:
        return f"w{self.bits}" + (f"g{self.group}" if self.group else "") + "-asym" * self.asymmetric

    def bits_per_weight(self, shapes: Sequence[tuple[int, ...]], scale_bits: int = 16) -> float:
        """Bits of codes, scales and zero points, over all weights of matrices [O, I]."""
        spent = weights = 0
        for rows, columns in shapes:
            groups = rows * (columns // (self.group or columns))
            spent += rows * columns * self.bits + groups * (scale_bits + self.bits * self.asymmetric)
            weights += rows * columns
        return spent / weights

    def account(self, weights: Mapping[str, Tensor], scale_bits: int = 16) -> dict[str, str | float]:
        """Of a model's linear layers, for `finish`."""
        shapes = [tuple(weight.shape) for name, weight in weights.items() if linear(name)]
        return {"grid": str(self), "bits_per_weight": self.bits_per_weight(shapes, scale_bits)}


@dataclass(frozen=True)
class Cost:
    """What a process has spent since it began."""

    seconds: float
    cpu_seconds: float
    peak_memory_gb: float

    @classmethod
    def so_far(cls) -> Cost:
        """Of this process and of those of its children that have ended; memory of the largest of them."""
        own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime
        return cls(time.monotonic() - STARTED, cpu, max(own.ru_maxrss, children.ru_maxrss) * 1024 / 1e9)


def machine() -> dict[str, Any]:
    """What a core-minute is worth here: the processor, and GFLOP/s of one thread on a layer's float32 product.

    The fastest of some, in processor time: other work makes it no slower a machine (Zen 3: 68 to 78 alone, 72 to 78
    with three others on two cores; medians of the wall clock beside other work were 20 to 58).
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    left, right = torch.ones(512, 576), torch.ones(576, 1536)
    seconds = []
    for _ in range(PRODUCTS):
        began = time.thread_time()
        torch.mm(left, right)
        seconds.append(time.thread_time() - began)
    torch.set_num_threads(threads)
    told = Path("/proc/cpuinfo")
    name = re.search(r"^model name\s*: (.+)$", told.read_text() if told.is_file() else "", re.MULTILINE)
    speed = 2 * left.numel() * right.shape[1] / min(seconds) / 1e9
    return {"processor": name[1].strip() if name else platform.processor(), "gflops": round(speed, 1)}


def core_minutes_left(budget: float) -> bool:
    """Whether this process has used less than its budget of processor time; other work on the machine counts not."""
    return time.process_time() < 60 * budget


def products(float32: bool) -> torch.autocast:
    """What a trained peer computes its products under: bfloat16 autocast, unless float32 is asked for."""
    return torch.autocast("cpu", torch.bfloat16, enabled=not float32)


def trained(arguments: argparse.ArgumentParser) -> None:
    """The arguments of tools that train."""
    arguments.add_argument("--core-minutes", type=float, default=60, help="processor time to train for (60)")
    float32(arguments)


def float32(arguments: argparse.ArgumentParser) -> None:
    """The argument of tools that compute in bfloat16."""
    arguments.add_argument(
        "--float32", action="store_true", help="in place of bfloat16: faster on a CPU without instructions for it"
    )


def parser(description: str, grid: str | None = "w4g32") -> argparse.ArgumentParser:
    """The arguments that every script takes; `grid` is the default one, None for a script that has other names."""
    made = argparse.ArgumentParser(description=description.partition("\n\n")[0])
    made.add_argument("model", type=Path, metavar="MODEL", help="a Hugging Face directory")
    made.add_argument("out", type=Path, metavar="OUT", help="directory of this run; its contents are replaced")
    made.add_argument("--text", type=Path, nargs="+", default=[], metavar="FILE", help="calibration: .txt, .jsonl")
    if grid:
        made.add_argument("--grid", type=Grid.parse, default=Grid.parse(grid), help=f"w4g32, w4, w2g64, ... ({grid})")
    return made


def documents(file: Path) -> Iterator[str]:
    """A file's documents: rows of .jsonl (`text`), or all of a .txt."""
    if file.suffix == ".jsonl":
        with open(file, encoding="utf-8") as lines:
            yield from (json.loads(line)["text"] for line in lines if line.strip())
    else:
        yield file.read_text(encoding="utf-8")


def blocks(tokenizer: Any, files: Sequence[Path], count: int, length: int) -> Tensor:
    """Token ids, int64 [count, length], chosen as `lrqat ptq` chooses: all documents joined, cut, drawn with seed 0."""
    ids: list[int] = []
    for text in chain.from_iterable(map(documents, files)):
        ids += [*tokenizer(text, verbose=False)["input_ids"], tokenizer.eos_token_id]
    found = len(ids) // length
    if found < count:
        sys.exit(f"--text: {len(ids)} tokens in {len(files)} files, expected {count} x {length}; add files")
    order = torch.randperm(found, generator=torch.Generator().manual_seed(0))
    return torch.tensor(ids[: found * length]).view(found, length)[order[:count]]


def linear(name: str) -> bool:
    """The name of a weight that tools quantize."""
    return name.endswith("_proj.weight")


def fresh(out: Path) -> Path:
    """`out`, emptied and marked as unfinished; refuses to empty a directory that is not a run's."""
    if out.exists():
        if any(out.iterdir()) and not ((out / "cost.json").is_file() or (out / "unfinished").is_file()):
            sys.exit(f"{out}: exists, and is not an earlier run; name another OUT")
        shutil.rmtree(out)
    out.mkdir(parents=True)
    (out / "unfinished").touch()
    return out


def tensors(directory: Path) -> dict[str, Tensor]:
    """All tensors of a directory's safetensors files."""
    found: dict[str, Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    return found


def unpack(words: Tensor, bits: int) -> Tensor:
    """Codes of a dense little-endian bit stream: int32 [R, W] -> uint8 [R, W * 32 // bits].

    Of three words (GPTQ's unit at 3 bits) bits 3i to 3i+2 are code i, word boundaries or not:

        unpack([[0b10_001_000, ...]], 3) -> [[0, 1, 2, ...]]
    """
    rows = words.contiguous().view(torch.uint8)
    stream = (rows[:, :, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    stream = stream.flatten(1)[:, : words.shape[1] * 32 // bits * bits].unflatten(1, (-1, bits))
    return (stream << torch.arange(bits, dtype=torch.uint8)).sum(2, dtype=torch.uint8)


def gptq_weight(qweight: Tensor, qzeros: Tensor, scales: Tensor, bits: int, zero_offset: int) -> Tensor:
    """s * (q - z) in float32 [O, I], of GPTQ's layout with groups in their order.

    Args:
        qweight: int32 [I * bits / 32, O].
        qzeros: int32 [G, O * bits / 32].
        scales: float16 [G, O].
        bits: of a code.
        zero_offset: what is added to stored zeros: 1 in GPTQ's first format, else 0.
    """
    scales_OG = scales.float().T
    codes_OGI = unpack(qweight.T, bits).float().unflatten(1, (scales_OG.shape[1], -1))
    stored = unpack(qzeros, bits)
    if zero_offset and (stored == 2**bits - 1).any():
        sys.exit(
            "qzeros: a zero of 0 in GPTQ's first format, whose neighbour writers disagree about; take --grid w4g32"
        )
    zeros_OG = (stored.float() + zero_offset).T
    return (scales_OG[:, :, None] * (codes_OGI - zeros_OG[:, :, None])).flatten(1)


def gptq_weights(packed: Mapping[str, Tensor], grid: Grid, zero_offset: int) -> dict[str, Tensor]:
    """A checkpoint's tensors, each weight in GPTQ's layout by `gptq_weight`; refuses groups that are out of order."""
    found: dict[str, Tensor] = {}
    for name, value in packed.items():
        stem, _, part = name.rpartition(".")
        if part not in ("qweight", "qzeros", "scales", "g_idx"):
            found[name] = value
        if part == "qweight":
            scales = packed[f"{stem}.scales"]
            if (groups_I := packed.get(f"{stem}.g_idx")) is not None:
                in_order = torch.arange(len(groups_I)) * len(scales) // len(groups_I)
                if not torch.equal(groups_I.long(), in_order):
                    sys.exit(f"{stem}.g_idx: groups are out of order, expected desc_act=False")
            found[f"{stem}.weight"] = gptq_weight(value, packed[f"{stem}.qzeros"], scales, grid.bits, zero_offset)
    return found


def finish(
    out: Path,
    model: Path,
    weights: Mapping[str, Tensor],
    cost: Cost,
    *,
    bits_per_weight: float,
    megabytes: float | None = None,
    **said: str | float,
) -> None:
    """Write OUT/model and, last, OUT/cost.json.

    Args:
        out: the run's directory.
        model: the full-precision model, whose config and tokenizer are copied.
        weights: every tensor by its name in the model; the head is left out where it is tied.
        cost: what the tool spent.
        bits_per_weight: of the linear layers.
        megabytes: of the whole model; None: the linear layers at those bits, all else in 16.
        said: the other fields of cost.json.
    """
    (out / "model").mkdir()
    config = json.loads((model / "config.json").read_text())
    kept = {k: v for k, v in weights.items() if not (k == "lm_head.weight" and config.get("tie_word_embeddings"))}
    exact = all(torch.equal(v.to(torch.bfloat16).to(v.dtype), v) for v in kept.values())
    dtype = torch.bfloat16 if exact else torch.float32
    save_file({k: v.to(dtype).contiguous() for k, v in kept.items()}, out / "model/model.safetensors", {"format": "pt"})
    for name in ASSETS:
        if (model / name).is_file():
            shutil.copyfile(model / name, out / "model" / name)
    (out / "model/config.json").write_text(json.dumps(config | {"dtype": str(dtype).removeprefix("torch.")}, indent=2))
    if megabytes is None:
        bits = ((bits_per_weight if linear(k) else 16) * v.numel() for k, v in kept.items())
        megabytes = sum(bits) / 8e6
    row = {**said, "bits_per_weight": bits_per_weight, "megabytes": megabytes, **vars(cost)}
    row = {key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}
    row |= {"threads": torch.get_num_threads(), "machine": machine()}
    (out / "cost.json.partial").write_text(json.dumps(row, indent=1) + "\n")
    os.replace(out / "cost.json.partial", out / "cost.json")
    (out / "unfinished").unlink()
    print(json.dumps(row))
