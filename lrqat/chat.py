"""Conversations through the chat template, and which of their tokens are the assistant's.

    <|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHi there.<|im_end|>\n
                                                            ^^^^^^^^^^^^^^^^^^^     answers

Answers are what the model will have to write itself: the content and the token that ends the turn, but neither the
header nor what the template puts behind the end. Where the template marks them ({% generation %}), transformers tells.
Most do not; then the span of turn i is found by rendering prefixes as text,

    from  len(render(turns before i, with the generation prompt))   to  len(render(turns up to and with i))

each of which must be a prefix of the whole conversation's text, character by character. Templates that render earlier
turns in another way than the last one (some drop their reasoning) fail that, and are refused.

Tokens are always those of the whole conversation; a token is an answer if it begins inside of a span.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from lrqat.data import documents, endless, needs_template
from lrqat.errors import LrqatError
from lrqat.models import first_line
from lrqat.packing import Marked, Packed, pack

GENERATION = re.compile(r"\{%-?\s*generation\b")
Conversation = list[dict[str, str]]


def answer_blocks(sources: Sequence[str], tokenizer: Any, length: int, enough: int | None = None) -> Packed:
    """The sources' conversations, packed whole (`lrqat.packing`); no block is without an answer.

    Args:
        sources: files and hub datasets of conversations.
        tokenizer: a transformers tokenizer with a chat template.
        length: tokens of a block.
        enough: at most so many blocks of any one hub dataset, which may be endless.

    Raises:
        LrqatError: a source cannot be read; answers cannot be told apart, or there are none.
    """

    def conversations() -> Iterator[Marked]:
        for source in sources:
            tokens = 0
            for found in answer_stream(source, tokenizer):
                yield found
                tokens += min(len(found), length)
                if enough is not None and endless(source) and tokens >= enough * length:
                    break

    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    packed = pack(conversations(), length, 0 if pad is None else pad)
    if not len(packed.ids_NT):
        raise LrqatError(
            f"data: no turn is the assistant's within {length} tokens, so there are no answers; raise --seq-len, or "
            "leave --answers-only out"
        )
    return packed


def answer_stream(source: str, tokenizer: Any) -> Iterator[Marked]:
    """Each conversation of a source.

    Raises:
        LrqatError: a row is plain text, there is no chat template, or it does not tell answers apart.
    """
    for number, document in enumerate(documents(source), 1):
        if isinstance(document, str):
            raise LrqatError(
                f"{source}: document {number} is plain text, which has no answers; give rows of messages, or of prompt "
                "and response, or leave --answers-only out"
            )
        needs_template(tokenizer, source)
        yield answered(document, tokenizer, f"{source}: conversation {number}")


def answered(messages: Conversation, tokenizer: Any, where: str) -> Marked:
    """One conversation's tokens, and which of them are answers."""
    if GENERATION.search(str(tokenizer.chat_template)):
        found = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return list(zip(found["input_ids"], map(bool, found["assistant_masks"]), strict=True))
    if not getattr(tokenizer, "is_fast", False):
        raise LrqatError(f"{where}: --answers-only needs a fast tokenizer (tokenizer.json), got a slow one")
    text = render(messages, tokenizer, where)
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, begins = found["input_ids"], [begin for begin, _ in found["offset_mapping"]]
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    marks = [False] * len(ids)
    for start, end in spans(messages, text, tokenizer, where):
        inside = [i for i, begin in enumerate(begins) if start <= begin < end]
        last = next((i for i in reversed(inside) if ids[i] in special), None)  # what follows it, nobody generates
        for i in inside:
            marks[i] = last is None or i <= last
    return list(zip(ids, marks, strict=True))


def spans(messages: Conversation, text: str, tokenizer: Any, where: str) -> Iterator[tuple[int, int]]:
    """(start, end) of each of the assistant's turns, in characters of the conversation's text."""
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render(messages[:number], tokenizer, where, prompt=True)
        after = render(messages[: number + 1], tokenizer, where)
        if not (len(before) < len(after) and after.startswith(before) and text.startswith(after)):
            raise LrqatError(
                f"{where}: the chat template renders turn {number + 1} in another way inside of the conversation than "
                "at its end, so its answer cannot be told apart; cut the conversations after their first answer, or "
                "leave --answers-only out"
            )
        yield len(before), len(after)


def render(messages: Conversation, tokenizer: Any, where: str, prompt: bool = False) -> str:
    """The template's text, with the header of an answer to come if asked for."""
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    except Exception as error:  # templates raise what they like
        raise LrqatError(f"{where}: the chat template refuses it ({first_line(error)})") from None
    return text
