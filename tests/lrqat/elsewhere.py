"""A second device without a GPU: "elsewhere" is memory of the CPU whose tensors only go with one another.

As on a GPU, an operation whose operands lie on two devices fails, scalars and indices apart, and so do a generator of
the CPU that is to fill a tensor there, and `numpy()`. What it cannot show: kernels, streams, pinned memory.

    python -m tests.lrqat.elsewhere COMMANDS.json      # [[word, ...], ...]; writes null or a traceback for each

A process of its own, because the device's name is registered for good.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "elsewhere"
DEVICE = torch.device("privateuseone", 0)  # so called until `register`
COPIES = {"aten::copy_", "aten::_to_copy"}
INDEXED = {"aten::index", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index"}


class Backend(_DummyBackendModule):  # type: ignore[misc]
    """What torch and transformers ask of a device's module."""

    def get_rng_state(self, device: Any = 0) -> torch.Tensor:
        """Nothing draws there."""
        return torch.zeros(0, dtype=torch.uint8)

    def set_rng_state(self, state: torch.Tensor, device: Any = 0) -> None:
        """Nothing draws there."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        """Checkpointing restores autocast's state."""
        return [torch.float16, torch.bfloat16]


class Elsewhere(torch.Tensor):
    """A tensor there; `raw` has its values."""

    raw: torch.Tensor

    @staticmethod
    def __new__(cls, raw: torch.Tensor) -> Elsewhere:
        """Of the raw tensor's shape, strides and dtype."""
        made: Elsewhere = torch.Tensor._make_wrapper_subclass(
            cls, raw.shape, strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype, device=DEVICE
        )
        made.raw = raw
        return made

    def tolist(self) -> Any:
        """As of a GPU's tensor."""
        return self.raw.tolist()

    def data_ptr(self) -> int:
        """Tells tied weights."""
        return self.raw.data_ptr()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Functions are the plain tensors', but that new data has other values."""
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        if func == torch.Tensor.data.__set__:
            args[0].raw = args[1].raw
        return result

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Operations on one of them at least."""
        return execute(func, *args, **(kwargs or {}))


def execute(func: Any, *args: Any, **kwargs: Any) -> Any:
    """The operation on the values; what comes out lies where a GPU's would."""
    name = func._schema.name
    asked = None if kwargs.get("device") is None else torch.device(kwargs["device"])
    check(name, args, kwargs, made_there=asked is not None and asked.type == NAME)
    there = {id(t.raw): t for t in tree_iter((args, kwargs)) if isinstance(t, Elsewhere)}
    stays = asked.type == NAME if asked else isinstance(args[0], Elsewhere) if name == "aten::copy_" else there
    if asked and stays:
        kwargs["device"] = torch.device("cpu")

    def unwrapped(value: Any) -> Any:
        return value.raw if isinstance(value, Elsewhere) else value

    def wrapped(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return there[id(value)] if id(value) in there else Elsewhere(value)

    if name == "aten::histc":  # a GPU counts integers
        return Elsewhere(func(args[0].raw.double(), *args[1:], **kwargs).to(args[0].dtype))
    result = func(*tree_map(unwrapped, args), **tree_map(unwrapped, kwargs))
    return tree_map(wrapped, result) if stays else result


def check(name: str, args: Sequence[Any], kwargs: Mapping[str, Any], made_there: bool) -> None:
    """Refuse operands on two devices, and a CPU generator for what lies there."""
    tensors = [t for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)]
    there = [t for t in tensors if isinstance(t, Elsewhere)]
    if (there or made_there) and isinstance(kwargs.get("generator"), torch.Generator):
        raise RuntimeError(f"{name}: a generator of the CPU for a tensor elsewhere")
    if not there or name in COPIES:
        return
    here = [t for t in tensors if not isinstance(t, Elsewhere) and t.dim() > 0]
    if name in INDEXED and isinstance(args[0], Elsewhere):  # indices may lie on the CPU, values may not
        here = [t for t in here if any(t is value for value in args[2:3])]
    if here:
        raise RuntimeError(f"{name}: operands on cpu {[*map(shape, here)]} and elsewhere {[*map(shape, there)]}")


def shape(tensor: torch.Tensor) -> tuple[int, ...]:
    """For messages."""
    return tuple(tensor.shape)


class Made(TorchFunctionMode):
    """`torch.tensor` with a device does not come to the dispatcher: made on the CPU, then copied."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Any function of torch."""
        kwargs = dict(kwargs or {})
        if func is torch.tensor and torch.device(kwargs.get("device") or "cpu").type == NAME:
            return func(*args, **kwargs | {"device": None}).to(kwargs["device"])
        return func(*args, **kwargs)


def register() -> None:
    """From now on the device is there, and lrqat and transformers' trainer take it for the GPU."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=Backend())
    library = torch.library.Library("_", "IMPL")
    library.fallback(execute, "PrivateUse1")
    globals()["_library"] = library  # dropped, it would take its kernels back

    plain = safetensors.torch.save_file  # reads the memory of tensors, of a GPU's as well

    def save_file(tensors: dict[str, torch.Tensor], *more: Any, **named: Any) -> None:
        plain({name: tensor.cpu() for name, tensor in tensors.items()}, *more, **named)

    safetensors.torch.save_file = save_file

    from transformers import PreTrainedModel, TrainingArguments

    import lrqat.console

    moved = PreTrainedModel.to

    def to(model: Any, *more: Any, **named: Any) -> Any:
        moved(model, *more, **named).tie_weights()  # moved to a GPU, a parameter is the same one as before
        return model

    PreTrainedModel.to = to
    TrainingArguments.device = property(lambda _: DEVICE)
    lrqat.console.device = lambda: DEVICE


def main(path: Path) -> None:
    """Run commands one after another; print what each raised."""
    register()
    from lrqat.cli import main as lrqat  # takes the device as it finds it

    said = []
    for words in json.loads(path.read_text()):
        try:
            with Made():
                status = lrqat(words)
            said.append(None if status == 0 else f"status {status}")
        except Exception:
            said.append(traceback.format_exc())
    path.write_text(json.dumps(said))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
