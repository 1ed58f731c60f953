"""Conversations packed whole into blocks of equal length.

    block        conversation 1    conversation 2        padding
    positions    0 1 2 3 ...       0 1 2 3 4 5 ...       0 1 ...

So every answer stands behind its own question and nothing else: where positions begin again, transformers builds the
attention mask of a text of its own (`masking_utils.find_packed_sequence_indices`). Blocks are filled best fit, among a
few that are open. A conversation that is longer than a block loses its end.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from lrqat.console import log

OPEN = 64  # blocks that are filled at a time
Marked = list[tuple[int, bool]]  # (token id, is an answer)


class Packed(NamedTuple):
    """Blocks of conversations.

    Attributes:
        ids_NT: int64 token ids.
        answers_NT: bool, the tokens to learn.
        positions_NT: int64, of each token in its own conversation.
    """

    ids_NT: Tensor
    answers_NT: Tensor
    positions_NT: Tensor


def pack(conversations: Iterable[Marked], length: int, pad: int) -> Packed:
    """Blocks of `length` tokens, none without an answer; what does not fit is told in the log.

    Args:
        conversations: token by token.
        length: tokens of a block.
        pad: token id behind the last conversation of a block.
    """
    begun: list[list[Marked]] = []
    room: list[int] = []
    columns = array("i"), array("b"), array("i")
    answers = lost = 0

    def close(number: int) -> None:
        room.pop(number)
        block = begun.pop(number)
        block.append([(pad, False)] * (length - sum(map(len, block))))
        for conversation in block:
            for position, (token, answer) in enumerate(conversation):
                for column, value in zip(columns, (token, answer and position > 0, position), strict=True):
                    column.append(value)

    for conversation in conversations:
        marks = [answer for _, answer in conversation]
        answers += sum(marks)
        if not any(marks[1:length]):
            lost += sum(marks)
            continue
        lost += sum(marks[length:])
        kept = conversation[:length]
        fitting = [number for number, left in enumerate(room) if left >= len(kept)]
        if fitting:
            number = min(fitting, key=room.__getitem__)
        else:
            if len(begun) == OPEN:
                close(room.index(min(room)))
            begun.append([])
            room.append(length)
            number = len(begun) - 1
        begun[number].append(kept)
        room[number] -= len(kept)
    while begun:
        close(0)
    if lost:
        log(f"not trained: {lost / answers:.1%} of the answers' tokens, behind the first {length} of a conversation")
    ids, marks_, positions = (torch.tensor(column, dtype=torch.int64).view(-1, length) for column in columns)
    return Packed(ids, marks_.bool(), positions)
