"""Text to blocks of token ids.

A source is a text file (one continuous text), a .jsonl or .ndjson file, or a dataset on the Hugging Face hub, spelled
NAME[:CONFIG][@SPLIT]. Rows of the latter two hold one of

    {"text": ...}                                     plain text
    {"messages": [{"role", "content"}, ...]}          a conversation, through the chat template
    {"prompt": ..., "response": ...}                  one turn, through the chat template

Documents are tokenized, ended with the tokenizer's EOS token (chat templates end themselves), joined, and cut
into blocks of equal length; the rest is dropped.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrqat.errors import LrqatError

OTHERS = {
    ".json": "write one object a line into a .jsonl file",
    ".csv": "write rows of text, messages, or prompt and response into a .jsonl file",
    ".parquet": "name its folder on the hub, or write rows into a .jsonl file",
}
PIECE_CHARACTERS = 1 << 16  # tokenizers slow down on megabytes in one string


def default_texts() -> list[str]:
    """Prose that every CPython carries: the language reference as `help()` shows it, about 700 kB of English."""
    from pydoc_data.topics import topics

    return [topics[key] for key in sorted(topics)]


def documents(source: str) -> Iterator[str | list[dict[str, str]]]:
    """Texts and conversations of one source."""
    path = Path(source).expanduser()
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".ndjson") and path.is_file():
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        row = json.loads(line)
                    except ValueError as error:  # UnicodeDecodeError is one
                        raise LrqatError(f"{source}:{number}: not JSON ({error})") from None
                    yield _document(row, f"{source}:{number}")
    elif path.is_file():
        if suffix in OTHERS:
            raise LrqatError(f"{source}: {suffix} is read neither as text nor as rows; {OTHERS[suffix]}")
        try:
            yield path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise LrqatError(f"{source}: not UTF-8 text ({error}); use .txt, .jsonl or a hub dataset") from None
    else:
        for number, row in enumerate(_hub_rows(source)):
            yield _document(row, f"{source} row {number}")


def _document(row: Any, where: str) -> str | list[dict[str, str]]:
    match row:
        case {"text": str(text)}:
            return text
        case {"messages": [_, *_] as messages} if all(_is_message(message) for message in messages):
            return messages
        case {"prompt": str(prompt), "response": str(response)}:
            return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
    raise LrqatError(
        f"{where}: expected text, messages ([{{role, content}}, ...]), or prompt and response, all strings; got {found}"
    )


def _is_message(message: Any) -> bool:
    match message:
        case {"role": str(), "content": str()}:
            return True
    return False


def _hub_rows(source: str) -> Iterator[Any]:
    name, _, split = source.partition("@")
    name, _, config = name.partition(":")
    if "." in Path(source).suffix or (source.count("/") > 1 and not Path(name).is_dir()):
        raise LrqatError(f"{source}: no such file")
    try:
        from datasets import load_dataset
    except ImportError:
        raise LrqatError(f"{source}: no such file; to read it as a hub dataset: pip install 'lrqat[hub]'") from None
    try:
        yield from load_dataset(name, config or None, split=split or "train", streaming=True)
    except Exception as error:  # the hub client raises whatever its HTTP library raises
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise LrqatError(f"{source}: no such file, and as a dataset it cannot be read ({reason})") from None


def token_stream(source: str | None, tokenizer: Any) -> Iterator[list[int]]:
    """Token ids of one source (None: the default text), piece by piece."""
    for document in default_texts() if source is None else documents(source):
        if isinstance(document, str):
            yield from _text_ids(document, tokenizer)
        else:
            needs_template(tokenizer, source)
            yield tokenizer.apply_chat_template(document, tokenize=True, return_dict=True)["input_ids"]


def needs_template(tokenizer: Any, source: str | None) -> None:
    """Refuse conversations where the tokenizer has no template for them."""
    if getattr(tokenizer, "chat_template", None) is None:
        raise LrqatError(f"{source}: conversations need a chat template, and the tokenizer has none; give plain text")


def _text_ids(text: str, tokenizer: Any) -> Iterator[list[int]]:
    """Ids of one text, cut at line ends into pieces; special tokens of the tokenizer at the start, EOS at the end."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + PIECE_CHARACTERS)
        piece = text[start : end + 1 if end >= 0 else len(text)]
        yield tokenizer(piece, add_special_tokens=start == 0, verbose=False)["input_ids"]
        start += len(piece)
    if tokenizer.eos_token_id is not None:
        yield [tokenizer.eos_token_id]


def draw(blocks_NT: Tensor, count: int, seed: int, behind: int = 0) -> Tensor:
    """At most `count` of the blocks, in an order drawn from the seed; the first `behind` of that order come last."""
    order = torch.randperm(len(blocks_NT), generator=torch.Generator().manual_seed(seed))
    return blocks_NT[order.roll(-behind)[:count]]


def blocks(
    sources: Sequence[str], tokenizer: Any, length: int, limit: int | None = None, enough: int | None = None
) -> Tensor:
    """The sources' tokens in blocks, int64 [N, length].

    Args:
        sources: files and hub datasets; none for the default text.
        tokenizer: a transformers tokenizer.
        length: tokens of a block.
        limit: at most so many blocks.
        enough: at most so many blocks of any one hub dataset, which may be endless.

    Raises:
        LrqatError: a source cannot be read, or there is less than one block of text.
    """
    if length < 2 or (limit is not None and limit < 1):
        raise LrqatError(f"data: expected at least 1 block of at least 2 tokens, got {limit} of {length}")
    ids = array("i")
    named: list[str | None] = [*sources] or [None]
    for source in named:
        start = len(ids)
        for piece in token_stream(source, tokenizer):
            ids.extend(piece)
            if limit is not None and len(ids) >= limit * length:
                break
            if enough is not None and endless(source) and len(ids) - start >= enough * length:
                break
    count = len(ids) // length if limit is None else min(len(ids) // length, limit)
    if count == 0:
        raise LrqatError(f"data: {len(ids)} tokens are less than one block of {length}; give more text or --seq-len")
    return torch.frombuffer(ids, dtype=torch.int32)[: count * length].long().view(count, length)


def endless(source: str | None) -> bool:
    """A hub dataset, which may have no end."""
    return source is not None and not Path(source).expanduser().is_file()
