"""Perplexity, KL and top-1 agreement of one model against another, on the same tokens.

    token perplexity   exp(mean -log q(next token))
    word perplexity    exp(total nats / words), words split at white space: comparable between tokenizers that see the
                       same text (all of it: without --blocks); what a block's edge cuts is a word in both
    KL                 mean KL(reference || model), nats per token
    top-1              share of tokens where both models rank the same token first

Logits exist for one block's chunk at a time.
"""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lrqat.console import bar, device, log
from lrqat.data import blocks
from lrqat.errors import LrqatError
from lrqat.fused import FusedCheckpoint, is_fused
from lrqat.losses import Head, body_and_head, final_states, head_of
from lrqat.models import fused_tokenizer, locate
from lrqat.rounding import Rounding, rounded_model

CHUNK_TOKENS = 256
WORDS = {2: torch.uint16, 4: torch.uint32}
MOST_NATS = 709.0  # e^709 is near the end of float64


@dataclass(frozen=True)
class Scores:
    """Figures of one model on one text; kl and top1 need a reference. And what was rounded beside the weights."""

    tokens: int
    context: int
    perplexity: float
    word_perplexity: float | None
    kl: float | None
    top1: float | None
    activations: str | None = None
    kv: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@torch.no_grad()
def hidden_states(body: Any, block_T: Tensor, positions_T: Tensor | None = None) -> Tensor:
    """Final hidden states [T, H] of one block; positions that begin again begin another text."""
    return final_states(body, block_T[None], None if positions_T is None else positions_T[None])[0]


class Remembered(NamedTuple):
    """What a model has made of some blocks: all that is needed of it to compare another one with it.

    Attributes:
        head: its output head.
        states_NTH: final hidden states of the blocks, as a rule in a mapped file.
    """

    head: Head
    states_NTH: Tensor

    def states(self, number: int, block_T: Tensor) -> Tensor:
        """[T, H] of the block with this number."""
        return self.states_NTH[number].to(block_T.device)


class Running(NamedTuple):
    """The same of a model that is there."""

    head: Head
    body: Any

    def states(self, number: int, block_T: Tensor) -> Tensor:
        """[T, H] of a block."""
        return hidden_states(self.body, block_T)


def remember(model: Any, blocks_NT: Tensor, path: Path) -> Remembered:
    """Run a model on all blocks, and keep its states in a file, which is made."""
    body, head = body_and_head(model)
    dtype = next(body.parameters()).dtype
    write_states(path, body, blocks_NT, head.weight_VH.shape[1], dtype, "reference")
    return Remembered(head, read_states(path, dtype))


def write_states(
    path: Path,
    body: Any,
    blocks_NT: Tensor,
    hidden_size: int,
    dtype: torch.dtype,
    label: str,
    positions_NT: Tensor | None = None,
) -> None:
    """Write the final hidden states of all blocks: an .npy of unsigned words, [N, T, H] (numpy has no bfloat16).

    Args:
        path: the .npy file.
        body: a model up to its final hidden states.
        blocks_NT: int64 token ids.
        hidden_size: H.
        dtype: of the states.
        label: of the progress.
        positions_NT: of tokens in texts of their own; None: a block is one.
    """
    shape = (*blocks_NT.shape, hidden_size)
    states_NTH = np.lib.format.open_memmap(path, mode="w+", dtype=f"u{dtype.itemsize}", shape=shape)
    with open(path, "r+b") as file:  # a full disk is an error now, not a crash when a page is written
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    for number in bar(range(len(blocks_NT)), label):
        place = next(body.parameters()).device
        positions_T = None if positions_NT is None else positions_NT[number].to(place)
        states_TH = hidden_states(body, blocks_NT[number].to(place), positions_T)
        states_NTH[number] = states_TH.to(dtype).cpu().view(WORDS[dtype.itemsize]).numpy()
    states_NTH.flush()


def read_states(path: Path, dtype: torch.dtype) -> Tensor:
    """What `write_states` wrote, [N, T, H], mapped, to be read: a private map would count as memory to be had."""
    return torch.from_numpy(np.load(path, mmap_mode="r+", allow_pickle=False)).view(dtype)


@torch.no_grad()
def score(
    model: Any,
    blocks_NT: Tensor,
    reference: Any | None = None,
    words: int | None = None,
) -> Scores:
    """Compare `model` with `reference` on blocks of token ids, each block its own context.

    Args:
        model: a causal language model with a linear head, soft-capped or not.
        blocks_NT: int64 [N, T].
        reference: the full-precision model, what is remembered of it, or None.
        words: words that the blocks' text has, for the word perplexity.
    """
    nats = kl = 0.0
    same = predicted = 0
    body, head = body_and_head(model)
    other: Remembered | Running | None = reference if isinstance(reference, Remembered) else None
    if reference is not None and other is None:
        other_body, other_head = body_and_head(reference)
        other = Running(other_head, other_body)
    for number, block_T in enumerate(bar(blocks_NT.to(head.weight_VH.device), "evaluate")):
        hidden_TH = hidden_states(body, block_T)
        other_TH = None if other is None else other.states(number, block_T)
        for start in range(0, len(block_T) - 1, CHUNK_TOKENS):
            chunk = slice(start, min(start + CHUNK_TOKENS, len(block_T) - 1))
            next_C = block_T[chunk.start + 1 : chunk.stop + 1]
            log_q_CV = head.logits(hidden_TH[chunk]).float().log_softmax(1)
            nats -= log_q_CV.gather(1, next_C[:, None]).double().sum().item()
            predicted += len(next_C)
            if other is not None and other_TH is not None:
                log_p_CV = other.head.logits(other_TH[chunk]).float().log_softmax(1)
                kl += (log_p_CV.exp() * (log_p_CV - log_q_CV)).sum(1).double().sum().item()
                same += int((log_p_CV.argmax(1) == log_q_CV.argmax(1)).sum())
    compared = reference is not None
    return Scores(
        tokens=predicted,
        context=blocks_NT.shape[1],
        perplexity=exponential(nats / predicted),
        word_perplexity=exponential(nats / words) if words else None,
        kl=kl / predicted if compared else None,
        top1=same / predicted if compared else None,
    )


def exponential(nats: float) -> float:
    """e^nats; infinite where float64 ends, as of "words" that are whole paragraphs without a space."""
    return math.exp(nats) if nats < MOST_NATS else math.inf


def rounding_of(source: str, activations: str | None = None, kv: str | None = None) -> Rounding:
    """What the model rounds beside its weights: as its run was trained, or as said; "none" turns it off."""
    if is_fused(source):
        return Rounding.trained(FusedCheckpoint.load(Path(source)).provenance).but(activations, kv)
    found = Rounding().but(activations, kv)
    if found.activations is not None:
        raise LrqatError(
            f"{source}: activations are rounded in front of quantized layers, and this is no fused checkpoint; "
            "leave --activations out"
        )
    return found


def load_any(source: str, dtype: torch.dtype, rounding: Rounding | None = None) -> tuple[Any, Any]:
    """(model, tokenizer) of a fused checkpoint (dequantized), or of anything that `locate` finds.

    Args:
        source: what the user named.
        dtype: of the computation.
        rounding: beside the weights; None: as the run was trained.
    """
    rounding = rounding_of(source) if rounding is None else rounding
    if is_fused(source):
        checkpoint = FusedCheckpoint.load(Path(source))
        return rounded_model(checkpoint, rounding, dtype).to(device()), fused_tokenizer(checkpoint)
    base = locate(source)
    model = base.model(dtype).to(device())
    rounding.keys(model)
    return model, base.tokenizer


def evaluate_files(
    source: str,
    reference: str | None,
    texts: list[str],
    length: int,
    limit: int | None,
    dtype: str,
    activations: str | None = None,
    kv: str | None = None,
) -> Scores:
    """`score` for a model by name on text files by name; the tokenizer is the model's own.

    The reference is gone when the model is loaded: two of 7B are more than many a GPU holds. What was rounded in
    training beside the weights is rounded here, unless `activations` and `kv` say otherwise.
    """
    rounding = rounding_of(source, activations, kv)
    if rounding:
        log(f"{source}: {rounding}")
    tokenizer = tokenizer_of(source)
    blocks_NT = blocks(texts, tokenizer, length, limit)
    with TemporaryDirectory(prefix="lrqat-eval-") as folder:
        other = None
        if reference is not None:
            check_words(f"--reference {reference}", tokenizer_of(reference), tokenizer)
            full = load_any(reference, getattr(torch, dtype), Rounding())[0]
            other = remember(full, blocks_NT, Path(folder) / "states.npy")
            del full
        model = load_any(source, getattr(torch, dtype), rounding)[0]
        if other is not None:
            check_heads(f"--reference {reference}", other.head, head_of(model))
        found = score(model, blocks_NT, other, words_of(blocks_NT, tokenizer))
    return replace(found, activations=rounding.activations, kv=rounding.kv)


def words_of(blocks_NT: Tensor, tokenizer: Any) -> int:
    """Words of what is predicted: of each block all but its first token."""
    return sum(len(tokenizer.decode(block_T[1:]).split()) for block_T in blocks_NT)


def tokenizer_of(source: str) -> Any:
    """The tokenizer alone of what `load_any` loads."""
    return fused_tokenizer(FusedCheckpoint.load(Path(source))) if is_fused(source) else locate(source).tokenizer


OTHER_WORDS = "has another vocabulary than the model; name a model of the same family"


def check_words(what: str, other: Any, own: Any) -> None:
    """Refuse to compare distributions over other words: the tokenizers of what is named and of the model."""
    if other.get_vocab() != own.get_vocab():
        raise LrqatError(f"{what}: {OTHER_WORDS}")


def check_heads(what: str, other: Head, own: Head) -> None:
    """The same by their heads, which may have rows that no token has."""
    if len(other.weight_VH) != len(own.weight_VH):
        raise LrqatError(f"{what}: {OTHER_WORDS}")
