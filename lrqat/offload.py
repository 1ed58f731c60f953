"""Training a model that is larger than memory: frozen weights lie elsewhere and come when they are needed.

    disk    in RUN/frozen.safetensors, mapped: NAME#BUFFER of every quantizer (`WeightQuantizer.immutable`); "embedding"
            and "head" where they are not in a mapped file already
    cpu     on a GPU: in pinned host memory

"disk" holds as much in memory as one decoder layer's frozen weights. Each layer asks for the next one's pages while it
works, in backward for the one before, and a layer that is left gives its pages back. The file is written while the
quantizers are made, weight by weight. The arithmetic is the same, so are the codes.

Refuses "cpu" where there is no GPU, and a disk that is too full, before any weight is loaded.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lrqat.errors import LrqatError
from lrqat.grid import Grid
from lrqat.layers import Make, quantizers
from lrqat.methods.base import WeightQuantizer
from lrqat.pages import ask_for, give_back, in_file, only_read
from lrqat.plan import Plan
from lrqat.safestream import GrowingFile
from lrqat.settings import TrainSettings
from lrqat.sites import TRAINED, Site
from lrqat.starts.walk import decoder_layers

SPARE_BYTES = 1 << 30  # left on the disk for checkpoints and the fused model's beginnings


def check_offload(settings: TrainSettings, plan: Plan, skeleton: Any, device: torch.device, converted: int = 0) -> None:
    """Refuse what cannot be, before anything is loaded.

    Args:
        settings: of the training.
        plan: which matrices, on which grids.
        skeleton: the model without weights.
        device: that trains.
        converted: bytes of the checkpoint in another dtype, which lies on the same disk (`lrqat.convert`).
    """
    if settings.offload == "cpu" and device.type == "cpu":
        raise LrqatError(
            "offload cpu: there is no GPU, so the weights are in the CPU's memory anyway; use --offload disk, or leave "
            "it out"
        )
    need = converted
    if settings.offload == "disk":
        decoder_layers(skeleton)  # refuses a model whose layers are not found
        need += sum(frozen_bytes(settings, plan).values())
    out = Path(settings.out).absolute()
    there = next(path for path in (out, *out.parents) if path.exists())
    free = shutil.disk_usage(there).free
    if need and free < need + SPARE_BYTES:
        asks = [f"--dtype {settings.dtype} of another checkpoint"] if converted else []
        asks += ["--offload disk"] if settings.offload == "disk" else []
        raise LrqatError(
            f"{out}: {' with '.join(asks)} needs {(need + SPARE_BYTES) / 1e9:.1f} GB there, {free / 1e9:.1f} GB are "
            "free; free some space or name another --out"
        )


def frozen_bytes(settings: TrainSettings, plan: Plan) -> dict[str, int]:
    """What never changes of each planned weight's quantizer, in bytes (`WeightQuantizer.immutable`)."""
    return {name: _frozen_bytes(settings, plan.sites[name], grid) for name, grid in plan.grids.items()}


def _frozen_bytes(settings: TrainSettings, site: Site, grid: Grid) -> int:
    rows, columns = site.shape
    packed = rows * columns // (2 if grid.bits <= 4 and columns % 2 == 0 else 1)
    if site.kind not in TRAINED:
        return rows * columns
    if settings.method == "l4q":
        return rows * columns * getattr(torch, settings.dtype).itemsize
    if settings.method == "lrqat" and settings.downcast != "int":
        return rows * columns * (2 if settings.downcast == "bf16" else 1)
    return packed


class HostMemory:
    """--offload cpu: frozen tensors in pinned memory of the CPU."""

    def taking(self, make: Make) -> Make:
        """`make`, whose quantizers' frozen tensors leave the GPU at once."""

        def made(site: Site, weight_OI: Tensor, grid: Grid) -> WeightQuantizer:
            quantizer = make(site, weight_OI, grid)
            if site.kind in TRAINED:
                for name in quantizer.immutable:
                    place(quantizer, name, getattr(quantizer, name).cpu().pin_memory())
            return quantizer

        return made

    def finish(self, model: Any) -> None:
        """Those that no `taking` has seen."""
        for quantizer in quantizers(model).values():
            for name in quantizer.immutable:
                if (tensor := getattr(quantizer, name)).is_cuda:
                    place(quantizer, name, tensor.cpu().pin_memory())


class FrozenFile:
    """--offload disk: frozen tensors in one mapped file.

    Args:
        path: of the file; it is there when all is in it.
        names: of the planned weights.
    """

    def __init__(self, path: Path, names: Iterable[str]) -> None:
        self.file = GrowingFile(path, [f"{name}#frozen_buffer" for name in (*names, "embedding", "head")])

    def taking(self, make: Make) -> Make:
        """`make`, whose quantizers' frozen tensors go to the file and out of memory; until `finish` they are empty."""

        def made(site: Site, weight_OI: Tensor, grid: Grid) -> WeightQuantizer:
            quantizer = make(site, weight_OI, grid)
            quantizer.name = site.name
            if site.kind in TRAINED:  # what is rounded once is read once more, by `swap`
                self._take(quantizer)
            return quantizer

        return made

    def _take(self, quantizer: WeightQuantizer) -> None:
        for name in quantizer.immutable:
            tensor = getattr(quantizer, name)
            self.file.add(f"{quantizer.name}#{name}", tensor)
            place(quantizer, name, tensor.new_empty(0))

    def finish(self, model: Any) -> None:
        """Write what no `taking` has seen, map the file, and let the decoder layers stream it."""
        for quantizer in quantizers(model).values():
            if any(isinstance(quantizer._buffers.get(name), Tensor) for name in quantizer.immutable):
                self._take(quantizer)
        taken = {"head": model.get_output_embeddings().weight, "embedding": model.get_input_embeddings().weight}
        if taken["head"] is taken["embedding"]:
            del taken["head"]
        taken = {name: p for name, p in taken.items() if p.device.type == "cpu" and not in_file(p)}
        for name, parameter in taken.items():
            self.file.add(name, parameter.detach())
        self.file.finish()
        mapped = self.file.mapped()
        for name, parameter in taken.items():
            parameter.data = mapped[name]
        for quantizer in quantizers(model).values():
            for name in quantizer.immutable:
                place(quantizer, name, mapped[f"{quantizer.name}#{name}"])
            quantizer.mapped = bool(quantizer.immutable)
        stream(model)


@contextmanager
def offloaded(where: str | None, path: Path, plan: Plan) -> Iterator[FrozenFile | HostMemory | None]:
    """What `--offload` asks for; `path` is for "disk", and nothing half-written is left there."""
    if where == "disk":
        frozen = FrozenFile(path, plan.grids)
        with frozen.file:
            yield frozen
    else:
        yield HostMemory() if where == "cpu" else None


def place(quantizer: WeightQuantizer, name: str, tensor: Tensor) -> None:
    """Put a frozen tensor where `Module.to` does not see it: it stays in the memory that it is in."""
    quantizer._buffers.pop(name, None)
    setattr(quantizer, name, tensor)


def stream(model: Any) -> list[RemovableHandle]:
    """From now on each decoder layer that is entered asks for the next one's pages, and the one left gives its back.

    Returns the handles by which that ends.
    """
    _, layers = decoder_layers(model)
    inside = [frozen_in_files(layer) for layer in layers]
    held = {id(tensor) for tensors in inside for tensor in tensors}
    outside = [tensor for tensor in frozen_in_files(model) if id(tensor) not in held]
    walk = Pages(inside, outside)
    handles = []
    for number, layer in enumerate(layers):
        handles += [
            layer.register_forward_pre_hook(lambda _module, _arguments, number=number: walk.enter(number)),
            layer.register_forward_hook(lambda _module, _arguments, output, number=number: walk.follow(number, output)),
        ]
    return handles


@contextmanager
def streamed(model: Any) -> Iterator[None]:
    """`stream` for as long as the `with` lasts; a model whose layers are not found stays in memory.

    Nothing may have been written to its weights: what is given back is read from the file again.
    """
    try:
        handles = stream(model)
    except LrqatError:
        handles = []
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def frozen_in_files(module: nn.Module) -> list[Tensor]:
    """Every frozen tensor of a module that lies in a mapped file."""
    packed = [getattr(q, name) for q in module.modules() if isinstance(q, WeightQuantizer) for name in q.immutable]
    return [tensor for tensor in (*module.parameters(), *packed) if only_read(tensor)]


class Pages:
    """Whose pages are in memory: the entered layer's, and what the kernel has read ahead.

    Args:
        inside: of each decoder layer, its tensors in mapped files.
        outside: those of no layer (embedding and head); they go with the layer that is left.
    """

    def __init__(self, inside: list[list[Tensor]], outside: list[Tensor]) -> None:
        self.inside = inside
        self.outside = outside
        self.current = 0
        self.direction = 1

    def enter(self, number: int) -> None:
        """A layer begins its forward or its backward pass."""
        if number != self.current:
            for tensor in (*self.inside[self.current], *self.outside):
                give_back(tensor)
            self.direction = 1 if number > self.current else -1
            self.current = number
        if not 0 <= number + self.direction < len(self.inside):
            self.direction = -self.direction
        if 0 <= number + self.direction < len(self.inside):
            for tensor in self.inside[number + self.direction]:
                ask_for(tensor)

    def follow(self, number: int, output: Any) -> None:
        """A layer's output: its gradient is where the layer's backward pass begins."""
        state = output[0] if isinstance(output, tuple) else output
        if isinstance(state, Tensor) and state.requires_grad:
            state.register_hook(lambda _gradient: self.enter(number))
