"""A checkpoint in another dtype than its own, mapped all the same.

transformers converts a checkpoint in memory, all of it. Here tensor after tensor goes into RUN/converted, from which
the model is mapped; once it is, the files have no name any more, and their blocks are free when the process ends.
"""

from __future__ import annotations

import dataclasses
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrqat.fused import SafetensorsDirectory, write_json
from lrqat.memory import return_freed_memory
from lrqat.models import Base
from lrqat.ranks import first, rank, wait
from lrqat.safestream import Entry, write_model

KEPT_APART = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")  # of transformers' classes


def conversion(base: Base, dtype: torch.dtype) -> list[Entry]:
    """What is to be written; nothing where the checkpoint itself can be mapped, or transformers has to convert it.

    That is so for GGUF files, and for models of which some tensors are float32 whatever the dtype.
    """
    if base.is_gguf:
        return []
    files, skeleton = SafetensorsDirectory(base.path), base.skeleton(dtype)
    expected = {name: tensor.dtype for name, tensor in skeleton.state_dict().items() if tensor.is_floating_point()}
    if all(files.specs[name].dtype == dtype for name in expected if name in files.specs):
        return []
    if set(expected.values()) != {dtype}:
        return []
    if dtype != torch.float32 and any(getattr(skeleton, name, None) for name in KEPT_APART):
        return []
    return [
        Entry(name, to, spec.shape, partial(_converted, files, name, to))
        for name, spec in files.specs.items()
        for to in [dtype if spec.dtype.is_floating_point else spec.dtype]
    ]


def _converted(files: SafetensorsDirectory, name: str, dtype: torch.dtype) -> Tensor:
    return files.get(name).to(dtype)


def converted_model(base: Base, dtype: torch.dtype, entries: list[Entry], folder: Path) -> Any:
    """The transformers model of `conversion`'s tensors; of several processes, all map one file.

    Args:
        base: the checkpoint.
        dtype: of the model.
        entries: of `conversion`.
        folder: where the file is while it is needed; what an attempt that was killed has left there goes first.
    """
    try:
        with first():
            if not rank():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
                write_model(folder, entries, {"format": "pt"})
                write_json(folder / "config.json", base.config)
                return_freed_memory()
            model = dataclasses.replace(base, path=folder).model(dtype)
        wait()
    finally:
        if not rank():
            shutil.rmtree(folder, ignore_errors=True)  # a network's file system has it until the process ends
    return model
