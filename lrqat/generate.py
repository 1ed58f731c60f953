"""Text of a model's own, to calibrate and train it with: what it has learnt, in its own shares.

    x_0 = the token that begins a document;   x_{t+1} ~ softmax(logits(x_0 ... x_t) / temperature)

As LLM-QAT (arXiv 2305.17888) has it, but from the first token on by chance. Half of such text in place of Wikipedia and
C4 takes 6 to 13% of a 4-bit model's KL off texts that are neither (docs/log.md, "What 4 bits lose, and where").

A sequence is cut where the model ends a document, which is where any special token stands; it goes on with the next.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lrqat.console import bar, log
from lrqat.errors import LrqatError, at_least
from lrqat.evaluate import load_any
from lrqat.jsonfile import write_text

BEGINNINGS = ("<|endoftext|>", "<|begin_of_text|>")  # of a document in pretraining; <s> and <bos> are `bos_token`
SHORTEST = 8  # tokens of a document; what is less is what a sequence's end has left


def generate_corpus(
    source: str, out: Path, *, tokens: int, length: int, batch_size: int, temperature: float, seed: int, dtype: str
) -> dict[str, Any]:
    """A .jsonl of {"text": ...}, as `--data` takes it; returns its documents and tokens.

    Args:
        source: a model, as `load_any` takes it.
        out: the file; written beside and renamed, once all is there.
        tokens: how many are drawn at least.
        length: of a sequence.
        batch_size: sequences at a time.
        temperature: 1 draws from the model's own distribution.
        seed: of the draws.
        dtype: of the computation.

    Raises:
        LrqatError: a number out of its range, no folder for the file, or a tokenizer without a first token.
    """
    at_least("--tokens", tokens, 1)
    at_least("--length", length, SHORTEST)
    at_least("--batch-size", batch_size, 1)
    if not 0 < temperature < float("inf"):
        raise LrqatError(f"--temperature: expected more than 0, got {temperature}")
    if not out.parent.is_dir() or out.is_dir():
        raise LrqatError(f"--out {out}: expected a file in a folder that is there")
    model, tokenizer = load_any(source, getattr(torch, dtype))
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or length + 1
    if length + 1 > longest:
        raise LrqatError(f"--length: expected at most {longest - 1} of this model, got {length}")
    first, special = beginning(tokenizer, source), frozenset(tokenizer.all_special_ids)
    rounds = -(-tokens // (length * batch_size))
    log(f"{source}: {rounds * batch_size} sequences of {length} tokens behind {tokenizer.convert_ids_to_tokens(first)}")
    rows: list[str] = []
    kept = 0
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for _ in bar(range(rounds), "generate"):
            for sequence in draw(model, first, batch_size, length, temperature):
                for document in documents(sequence, special):
                    if text := tokenizer.decode(document).strip():
                        rows.append(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                        kept += len(document)
    write_text(out, "".join(rows))
    return {"documents": len(rows), "tokens": kept, "out": str(out)}


def beginning(tokenizer: Any, source: str) -> int:
    """The token that a document begins behind."""
    vocabulary = tokenizer.get_vocab()
    named = [name for name in BEGINNINGS if name in vocabulary]
    for token in (*named, tokenizer.bos_token, tokenizer.eos_token):
        if token is not None:
            return int(tokenizer.convert_tokens_to_ids(token))
    raise LrqatError(f"{source}: its tokenizer has no token that begins or ends a text; use --data of yours")


def draw(model: Any, first: int, count: int, length: int, temperature: float) -> list[list[int]]:
    """Sequences of `length` token ids, by chance alone: no token is left out, and none ends one."""
    start_B1 = torch.full((count, 1), first, device=model.device)
    drawn_BT = model.generate(
        start_B1,
        attention_mask=torch.ones_like(start_B1),
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        repetition_penalty=1.0,
        max_new_tokens=length,
        eos_token_id=[],
        pad_token_id=first,
        use_cache=True,
    )
    found: list[list[int]] = drawn_BT[:, 1:].tolist()
    return found


def documents(sequence: Sequence[int], special: frozenset[int]) -> list[list[int]]:
    """What lies between special tokens, but for scraps."""
    found: list[list[int]] = [[]]
    for token in sequence:
        if token in special:
            found.append([])
        else:
            found[-1].append(token)
    return [document for document in found if len(document) >= SHORTEST]
