"""The distillation teacher, as its final hidden states on disk.

The full-precision model runs once over the training blocks, before its weights are quantized in place; what
is kept is the final hidden state of every token, 2H bytes each. Training multiplies it by the (frozen) head,
chunk by chunk, and so has the teacher's exact distribution over the whole vocabulary with neither a second
copy of the weights nor a teacher forward per step. docs/log.md has the measurement against a second forward
through the un-rounded Phi0.

The file is what `lrqat.evaluate.write_states` writes.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrqat.errors import LrqatError
from lrqat.evaluate import check_heads, check_words, load_any, read_states, write_states
from lrqat.fused import read_json, write_json
from lrqat.losses import Head, body_and_head
from lrqat.safestream import tensor_bytes


def cache_teacher(
    path: Path,
    body: Any,
    blocks_NT: Tensor,
    hidden_size: int,
    dtype: torch.dtype,
    key: str,
    positions_NT: Tensor | None = None,
) -> None:
    """Write the final hidden states of all blocks to `path`, unless the file for `key` is there already.

    Args:
        path: the .npy file; `path` + .json holds the key.
        body: the full-precision model up to its final hidden states.
        blocks_NT: int64 token ids.
        hidden_size: H.
        dtype: dtype of the states.
        key: identifies model and data.
        positions_NT: of tokens in texts of their own; None: a block is one.
    """
    stamp = path.with_suffix(".json")
    if path.is_file() and stamp.is_file() and read_json(stamp).get("key") == key:
        return
    path.unlink(missing_ok=True)
    write_states(path, body, blocks_NT, hidden_size, dtype, "teacher", positions_NT)
    write_json(stamp, {"key": key})


def cache_named(
    path: Path,
    source: str,
    tokenizer: Any,
    student: Head,
    blocks_NT: Tensor,
    dtype: torch.dtype,
    key: str,
    positions_NT: Tensor | None = None,
) -> Tensor:
    """`cache_teacher` for a model that the user named; returns the weight of its head [V, its own H].

    Args:
        path: the .npy file.
        source: whatever `lrqat eval` takes.
        tokenizer: the student's.
        student: its head; the weight may be on the meta device.
        blocks_NT: int64 token ids.
        dtype: of the teacher and its states.
        key: identifies student and data.
        positions_NT: as in `cache_teacher`.

    Raises:
        LrqatError: the two do not have the same words.
    """
    model, own = load_any(source, dtype)
    body, head = body_and_head(model)
    check_words(f"teacher {source}", own, tokenizer)
    check_heads(f"teacher {source}", head, student)
    if head.cap != student.cap:
        raise LrqatError(f"teacher {source}: caps logits at {head.cap}, the student at {student.cap}; name another")
    weights = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        weights.update(name.encode() + tensor_bytes(tensor.cpu()))
    whole = f"{key} {weights.hexdigest()}"
    cache_teacher(path, body, blocks_NT, head.weight_VH.shape[1], dtype, whole, positions_NT)
    return head.weight_VH.detach()


class Blocks(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Training blocks with, when distilling, the teacher's states, and which tokens are answers if only they count.

    Args:
        blocks_NT: int64 token ids.
        teacher: what `cache_teacher` wrote for these blocks.
        dtype: of the states.
        answers_NT: bool.
        positions_NT: as in `cache_teacher`.
        order: the blocks to train on, one after the other; by default each once.
    """

    def __init__(
        self,
        blocks_NT: Tensor,
        teacher: Path | None,
        dtype: torch.dtype,
        answers_NT: Tensor | None = None,
        order: Tensor | None = None,
        positions_NT: Tensor | None = None,
    ) -> None:
        self.order = range(len(blocks_NT)) if order is None else order.tolist()
        self.blocks_NT = blocks_NT
        self.beside = {"answers": answers_NT, "position_ids": positions_NT}
        self.states_NTH = read_states(teacher, dtype) if teacher else None

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        index = self.order[index]
        row = {"input_ids": self.blocks_NT[index]}
        row |= {name: tensor_NT[index] for name, tensor_NT in self.beside.items() if tensor_NT is not None}
        if self.states_NTH is not None:
            row["teacher"] = self.states_NTH[index].clone()
        return row
