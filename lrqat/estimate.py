"""What a training will hold in memory, and how long a step will take, before any weight is loaded.

    packed        frozen weights; with --offload disk, those of the largest decoder layer
    grid          the grids' parts that gains multiply, float32
    dense         embedding, head (of one in a mapped file, a slice), norms and what the plan leaves as it is
    trained       A, B and gains, or weights, float32; as much again are gradients
    moments       Adam's two (`lrqat.optimizer`)
    activations   what autograd keeps from forward to backward, counted by running the model without data
                  (torch's fake tensors, for which transformers expands grouped keys and builds a mask: some
                  percent too much there); with checkpointing, each layer's input and one layer's rest
    logits        chunks of the head's outputs, the student's and the teacher's; on a GPU in float32 as well
    transient     the largest weight, built for its matrix product, and the gradients around it; on a GPU a tile's
                  temporaries, too (a core's cache holds its own)
    malloc        freed memory between what is in use, a share of all that is not frozen (measured; not on a GPU)
    process       Python, torch, transformers, the tokenizer, their libraries (measured; not on a GPU)

The time is that of LR-QAT's linear layers, measured on this machine for one weight of the model, and of the head at the
same rate: attention and norms come on top, as do other methods' differences. Everything else is arithmetic.
"""

from __future__ import annotations

import copy
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lrqat.losses import CHUNK_TOKENS, SLICE_BYTES
from lrqat.memory import wide
from lrqat.methods.lr_qat import LRQAT
from lrqat.offload import frozen_bytes
from lrqat.optimizer import moment_bytes
from lrqat.plan import Plan
from lrqat.ranges import GPU_TILE_WEIGHTS
from lrqat.settings import TrainSettings
from lrqat.sites import EXPERT, TRAINED
from lrqat.starts.walk import decoder_layers

FLOAT = 4  # bytes of what is trained
PROCESS = 600e6  # bytes; CPU build of torch 2.13, transformers 5.19
MALLOC = 0.1
MALLOC_GIVEN_BACK = 0.03  # before every layer
FROZEN = ("packed", "grid", "dense")
BENEATH = ("lsq", "l4q")  # methods of real weights (`lrqat.methods.gains.WeightDomain`)
FACTORED = ("lrqat", "scales")  # methods that keep outputs (`WeightQuantizer.factored`)
BUFFERS = 3  # [T, O] around the largest weight
TILE_BYTES = 26  # of temporaries for each weight that a GPU works on at once (counted: LR-QAT, w4g128, bfloat16)
PROBED = (32, 160)  # tokens of the two timings
PROBED_WEIGHTS = 1 << 21


@dataclass(frozen=True)
class Estimate:
    """Bytes by part of a step; and of a GPU, in which the whole model lies before it is packed, what that takes."""

    parts: dict[str, float]
    loading: float = 0.0

    @property
    def total(self) -> float:
        """Bytes of the peak."""
        return max(sum(self.parts.values()), self.loading)


def estimate(skeleton: Any, plan: Plan, settings: TrainSettings, gpu: bool = False) -> Estimate:
    """Predict the peak of a training step.

    Args:
        skeleton: the model on the meta device.
        plan: which matrices, on which grids.
        settings: of the training.
        gpu: the memory is a GPU's, which holds no Python.
    """
    tokens, dtype = settings.batch_size * settings.seq_len, getattr(torch, settings.dtype)
    sizes, grid = trained_sizes(plan, settings), grid_numbers(plan)
    trained = sum(sizes)
    first, layer = kept_activations(skeleton, plan, settings)
    count = len(decoder_layers(skeleton)[1])
    hidden = skeleton.config.get_text_config().hidden_size
    words = skeleton.get_output_embeddings().weight.shape[0]
    largest = max(site.shape[0] * site.shape[1] for site in plan.sites.values() if site.kind in TRAINED)
    widest = max(max(site.shape) for site in plan.sites.values() if site.kind in TRAINED)
    if settings.gradient_checkpointing:
        activations = count * tokens * hidden * dtype.itemsize + layer
    else:
        activations = first + count * layer
    chunk = min(CHUNK_TOKENS, tokens) * words * dtype.itemsize
    parts = {
        "packed": packed_bytes(skeleton, plan, settings),
        "grid": FLOAT * grid,
        "dense": dense_bytes(skeleton, plan, settings, gpu),
        "trained": FLOAT * trained,
        "gradients": FLOAT * trained,
        "moments": sum(moment_bytes(settings.optimizer, size) for size in sizes),
        "activations": activations,
        "logits": (2 if settings.loss == "kd" else 1) * chunk + 2 * tokens * hidden * dtype.itemsize,
        "transient": largest * dtype.itemsize + BUFFERS * tokens * widest * dtype.itemsize,
    }
    if gpu:
        parts["transient"] += TILE_BYTES * min(largest, GPU_TILE_WEIGHTS)
        parts["logits"] += (4 if settings.loss == "kd" else 2) * FLOAT * min(CHUNK_TOKENS, tokens) * words
        return Estimate(parts, float(dtype.itemsize * sum(p.numel() for p in skeleton.parameters())))
    changing = sum(nbytes for name, nbytes in parts.items() if name not in FROZEN)
    share = MALLOC_GIVEN_BACK if settings.gradient_checkpointing and wide(skeleton.config) else MALLOC
    return Estimate({**parts, "malloc": share * changing, "process": PROCESS})


def available_bytes() -> float:
    """Memory that a program may take on this machine without swapping (proc(5)); elsewhere than on Linux, all of it."""
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file() and (found := re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())):
        return float(found[1]) * 1024
    return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def grid_numbers(plan: Plan) -> int:
    """How many numbers the parts of all grids are."""
    return sum(
        part.shape[0] * part.shape[1]
        for name, grid in plan.grids.items()
        for part in grid.parts(plan.sites[name].shape[0], plan.sites[name].shape[1]).values()
    )


def trained_sizes(plan: Plan, settings: TrainSettings) -> list[int]:
    """Numbers of each parameter that is trained."""
    found = []
    for name, grid in plan.grids.items():
        site = plan.sites[name]
        if site.kind not in TRAINED:
            continue
        rows, columns = site.shape
        if settings.method == "lsq":
            found.append(rows * columns)
        elif settings.rank is not None:
            found += [settings.rank * rows, settings.rank * columns]
        if settings.lr_scales > 0:
            parts = grid.parts(rows, columns)
            learned = (*grid.learned, *(grid.learned_beneath if settings.method in BENEATH else ()))
            found += [parts[part].shape[0] * parts[part].shape[1] for part in learned]
    return found


def packed_bytes(skeleton: Any, plan: Plan, settings: TrainSettings) -> int:
    """Frozen weights that are resident."""
    found = frozen_bytes(settings, plan)
    if settings.offload == "cpu":
        return 0
    if settings.offload is None:
        return sum(found.values())
    name, layers = decoder_layers(skeleton)
    layer = {number: 0 for number in range(len(layers))}
    for weight, nbytes in found.items():
        number = plan.sites[weight].origin.parameter.removeprefix(f"{name}.").partition(".")[0]
        if plan.sites[weight].origin.parameter.startswith(f"{name}."):
            layer[int(number)] += nbytes
    return max(layer.values())


def dense_bytes(skeleton: Any, plan: Plan, settings: TrainSettings, gpu: bool) -> int:
    """Dense parameters, a tied one once; of a mapped embedding and head, what is resident at once."""
    quantized = {plan.sites[name].origin.parameter for name in plan.grids if plan.sites[name].kind in TRAINED}
    itemsize = getattr(torch, settings.dtype).itemsize
    embedding, head = skeleton.get_input_embeddings().weight, skeleton.get_output_embeddings().weight
    total = 0
    for name, parameter in skeleton.named_parameters():
        if name in quantized:
            continue
        nbytes = parameter.numel() * itemsize
        if parameter is head and not gpu:
            nbytes = min(nbytes, SLICE_BYTES)
        elif parameter is embedding and not gpu:
            nbytes = min(nbytes, settings.batch_size * settings.seq_len * parameter.shape[1] * itemsize)
        total += nbytes
    return total


class Keeping(torch.autograd.Function):
    """A linear layer that keeps what `lrqat.methods.base.QuantizedLinear` keeps, without computing anything."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: int, keeps_output: bool, keeps_codes: bool) -> Tensor:
        """[..., I] -> [..., O]."""
        output = x.new_empty(*x.shape[:-1], rows)
        codes_OI = x.new_empty(rows, x.shape[-1], dtype=torch.uint8) if keeps_codes else None
        ctx.save_for_backward(x, output if keeps_output else None, codes_OI)
        return output


class KeepingLinear(nn.Module):
    """In the place of a quantized linear layer."""

    def __init__(self, rows: int, keeps_output: bool, keeps_codes: bool) -> None:
        super().__init__()
        self.rows = rows
        self.keeps_output = keeps_output
        self.keeps_codes = keeps_codes

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        output: Tensor = Keeping.apply(x, self.rows, self.keeps_output, self.keeps_codes)
        return output


def kept_activations(skeleton: Any, plan: Plan, settings: TrainSettings) -> tuple[float, float]:
    """(what autograd keeps outside of the layers, inside of one), in bytes, by a run on fake tensors."""
    one, two = (_kept(skeleton, plan, settings, layers) for layers in (1, 2))
    return max(0.0, 2 * one - two), two - one


def _kept(skeleton: Any, plan: Plan, settings: TrainSettings, layers: int) -> float:
    """Bytes that autograd keeps of the same architecture with fewer layers."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    config = copy.deepcopy(skeleton.config)
    text = config.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    keeps_output = settings.method in FACTORED and settings.lr_scales > 0
    keeps_codes = settings.method == "lrqat" and settings.gradient_checkpointing and settings.compile
    factored = {
        site.origin.parameter: grid.columns_per_group(site.shape[1]) == site.shape[1]
        for name, grid in plan.grids.items()
        if (site := plan.sites[name]).kind in TRAINED
    }
    dtype = getattr(torch, settings.dtype)
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with FakeTensorMode():
        model = type(skeleton)._from_config(config, dtype=dtype).requires_grad_(False).eval()
        for path, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and (whole := factored.get(f"{path}.weight")) is not None:
                layer = KeepingLinear(module.out_features, whole and keeps_output, whole and keeps_codes)
                model.set_submodule(path, layer)
        own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
        embedding = model.get_input_embeddings()
        ids_BT = torch.zeros(settings.batch_size, settings.seq_len, dtype=torch.int64)
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            states = embedding(ids_BT).requires_grad_()
            output = model.base_model(inputs_embeds=states, use_cache=False).last_hidden_state
        total = float(sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in own))
        del output
    return total


@dataclass(frozen=True)
class Speed:
    """Seconds of one pass of a linear layer: weights * (fixed + tokens * each), forward and backward."""

    forward: tuple[float, float]
    backward: tuple[float, float]

    def seconds(self, way: tuple[float, float], weights: int, tokens: int) -> float:
        """Of one pass."""
        return weights * (way[0] + tokens * way[1])


def measure_speed(plan: Plan, settings: TrainSettings) -> Speed:
    """Time LR-QAT on one weight with the columns and the grid of the plan's first: about a second."""
    name, grid = next((n, g) for n, g in plan.grids.items() if plan.sites[n].kind in TRAINED)
    columns = plan.sites[name].shape[1]
    rows = max(8, PROBED_WEIGHTS // columns)
    generator = torch.Generator().manual_seed(0)
    weight_OI = torch.empty(rows, columns).normal_(0, 0.02, generator=generator)
    parts = grid.fit(weight_OI, None)
    quantizer = LRQAT(
        weight_OI,
        parts,
        grid,
        rank=min(settings.rank or 1, rows, columns),
        alpha=1.0,
        downcast=settings.downcast or "int",
        learn_scales=True,
        generator=generator,
    )
    found = []
    for tokens in PROBED:
        x_TI = torch.randn(tokens, columns, generator=generator).to(getattr(torch, settings.dtype)).requires_grad_()
        times = []
        for _ in range(3):
            started = time.perf_counter()
            y_TO = quantizer(x_TI, None)
            between = time.perf_counter()
            torch.autograd.backward(y_TO, torch.ones_like(y_TO))
            times.append((between - started, time.perf_counter() - between))
        found.append([min(t[way] for t in times) / (rows * columns) for way in range(2)])
    lines = []
    for way in range(2):
        each = max(0.0, (found[1][way] - found[0][way]) / (PROBED[1] - PROBED[0]))
        lines.append((max(0.0, found[0][way] - each * PROBED[0]), each))
    return Speed(lines[0], lines[1])


def step_seconds(skeleton: Any, plan: Plan, settings: TrainSettings, speed: Speed) -> float:
    """Of one optimizer step on this machine."""
    tokens = settings.batch_size * settings.seq_len
    config = skeleton.config.get_text_config()
    chosen = (getattr(config, "num_experts_per_tok", None) or 1) / (
        getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 1
    )
    seconds = 0.0
    for name in plan.grids:
        site = plan.sites[name]
        if site.kind in TRAINED:
            weights, seen = site.shape[0] * site.shape[1], int(tokens * chosen) if site.kind == EXPERT else tokens
            passes = 2 if settings.gradient_checkpointing else 1
            seconds += passes * speed.seconds(speed.forward, weights, seen)
            seconds += speed.seconds(speed.backward, weights, seen)
    head = skeleton.get_output_embeddings().weight
    seconds += (3 if settings.loss == "kd" else 2) * head.numel() * tokens * speed.forward[1]
    return seconds * settings.gradient_accumulation
