"""The distillation teacher, as its final hidden states on disk.

The full-precision model runs once over the training blocks, before its weights are quantized in place; what
is kept is the final hidden state of every token, 2H bytes each. Training multiplies it by the (frozen) head,
chunk by chunk, and so has the teacher's exact distribution over the whole vocabulary with neither a second
copy of the weights nor a teacher forward per step. docs/log.md has the measurement against a second forward
through the un-rounded Phi0.

The file is a memory-mapped .npy of unsigned words, the bits of the states (numpy has no bfloat16), [N, T, H].
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lrqat.console import bar
from lrqat.evaluate import hidden_states
from lrqat.fused import read_json, write_json

WORDS = {2: torch.uint16, 4: torch.uint32}


def cache_teacher(path: Path, body: Any, blocks_NT: Tensor, hidden_size: int, dtype: torch.dtype, key: str) -> None:
    """Write the final hidden states of all blocks to `path`, unless the file for `key` is there already.

    Args:
        path: the .npy file; `path` + .json holds the key.
        body: the full-precision model up to its final hidden states.
        blocks_NT: int64 token ids.
        hidden_size: H.
        dtype: dtype of the states.
        key: identifies model and data.
    """
    stamp = path.with_suffix(".json")
    if path.is_file() and stamp.is_file() and read_json(stamp).get("key") == key:
        return
    path.unlink(missing_ok=True)
    shape = (*blocks_NT.shape, hidden_size)
    states_NTH = np.lib.format.open_memmap(path, mode="w+", dtype=f"u{dtype.itemsize}", shape=shape)
    with open(path, "r+b") as file:  # a full disk is an error now, not a crash when a page is written
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    for number in bar(range(len(blocks_NT)), "teacher"):
        states_TH = hidden_states(body, blocks_NT[number].to(next(body.parameters()).device))
        states_NTH[number] = states_TH.to(dtype).cpu().view(WORDS[dtype.itemsize]).numpy()
    states_NTH.flush()
    write_json(stamp, {"key": key})


class Blocks(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Training blocks with, when distilling, the teacher's states."""

    def __init__(self, blocks_NT: Tensor, teacher: Path | None, dtype: torch.dtype) -> None:
        self.blocks_NT = blocks_NT
        self.dtype = dtype
        self.states_NTH = np.load(teacher, mmap_mode="r", allow_pickle=False) if teacher else None

    def __len__(self) -> int:
        return len(self.blocks_NT)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = {"input_ids": self.blocks_NT[index]}
        if self.states_NTH is not None:
            row["teacher"] = torch.from_numpy(self.states_NTH[index].copy()).view(self.dtype)
        return row
