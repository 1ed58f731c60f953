"""Pre-tokenizers that have a name in GGUF, and their structure in a Hugging Face tokenizer.json.

GGUF stores a byte-level BPE's merges but of its pre-tokenizer (what is split before merging) only a name. Both
directions need the same table: a GGUF base model's tokenizer gets its pre-tokenizer back (transformers gives every
one plain GPT-2 splitting: SmolLM2's then no longer splits digits as in its training), and the GGUF exporter finds
the name.

Source: LLAMA_VOCAB_PRE_TYPE_* in ggml-org/llama.cpp src/llama-vocab.cpp.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from lrqat.errors import LrqatError

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
AFTER_DIGITS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + AFTER_DIGITS
QWEN2 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + AFTER_DIGITS
# A word also ends where a capital follows a small letter.
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
NO_LETTER = r"[^\r\n\p{L}\p{N}]?"
AFTER_CASED = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN = f"{NO_LETTER}{UPPER}*{LOWER}+|{NO_LETTER}{UPPER}+{LOWER}*" + r"|\p{N}" + AFTER_CASED
GPT4O = (
    f"{NO_LETTER}{UPPER}*{LOWER}+{CONTRACTIONS}?|{NO_LETTER}{UPPER}+{LOWER}*{CONTRACTIONS}?"
    + r"|\p{N}{1,3}"
    + AFTER_CASED
)


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


@dataclass(frozen=True)
class PreTokenizer:
    """Steps as tokenizer.json has them, and whether a whole word that is a token is taken unmerged."""

    steps: tuple[dict[str, Any], ...]
    ignore_merges: bool = False


PRE_TOKENIZERS = {
    "gpt-2": PreTokenizer((_byte_level(True),)),
    "smollm": PreTokenizer(({"type": "Digits", "individual_digits": True}, _byte_level(True))),
    "llama-bpe": PreTokenizer((_split(LLAMA3), _byte_level(False)), ignore_merges=True),
    "dbrx": PreTokenizer((_split(LLAMA3), _byte_level(False))),
    "qwen2": PreTokenizer((_split(QWEN2), _byte_level(False))),
    "tekken": PreTokenizer((_split(TEKKEN), _byte_level(False)), ignore_merges=True),
    "gpt-4o": PreTokenizer((_split(GPT4O), _byte_level(False))),
}


def restore(tokenizer: Any, name: str) -> None:
    """Give a transformers tokenizer that came from a GGUF file the pre-tokenizer that the file names.

    Raises:
        LrqatError: a name that is not in the table.
    """
    if name not in PRE_TOKENIZERS:
        raise LrqatError(
            f"GGUF pre-tokenizer {name!r} is unknown (known: {', '.join(PRE_TOKENIZERS)}); "
            "use the model's Hugging Face directory"
        )
    from tokenizers import Tokenizer

    found = PRE_TOKENIZERS[name]
    content = {"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}, "added_tokens": []}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": list(found.steps)}
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = Tokenizer.from_str(json.dumps(content)).pre_tokenizer
    if backend.model.ignore_merges != found.ignore_merges:
        backend.model.ignore_merges = found.ignore_merges
