"""The tokenizer in GGUF: `tokenizer.ggml.*` from a Hugging Face tokenizer.json.

llama.cpp does not read a pre-tokenizer, it is told the name of one that it has compiled in. A wrong name tokenizes
wrongly without a word, so the name is chosen from the pre-tokenizer's own structure, and what has no name is refused.

    byte-level BPE ("gpt2")      tokens in GPT-2's byte alphabet, merges, and `pre`:
      ByteLevel                                       gpt-2
      Digits(individual), ByteLevel                   smollm
      Split(LLAMA3), ByteLevel(no regex)              llama-bpe    with ignore_merges (Llama 3, SmolLM3); else dbrx
                                                                   (OLMo 2, Phi 4)
      Split(QWEN2), ByteLevel(no regex)               qwen2        (llama.cpp skips its NFC: text is NFC as a rule)
      Split(TEKKEN), ByteLevel(no regex)              tekken       with ignore_merges (Mistral)
      Split(GPT4O), ByteLevel(no regex)               gpt-4o       (Phi 4 mini)
        llama.cpp approximates the last two: combining marks (of Hindi, say) are no letters to it, and it does not
        split at capitals beyond ASCII, over which merges hardly ever reach. Elsewhere ids are the same.
    SentencePiece BPE ("llama")  tokens with U+2581 for a space, <0x00>..<0xFF>, and scores instead of merges:
      llama.cpp joins the pair whose result has the highest score, so score = -(rank of the first merge to make it).
      That is the same order only if every pair of tokens that forms a token is a merge, and all merges that make
      one token stand together: true for converted SentencePiece models, checked here. Runs of spaces may stand
      otherwise (Gemma's do), as long as both algorithms let the first space grow to the right before all else.

Phi 3's special tokens take the whitespace to their right with them. llama.cpp does so for files whose general.name
contains "phi-3" or "phi3", and for no others: `model_name` sees to both.

Ids that no token has are filled with unused [PADi] up to config.json's vocab_size. BOS and EOS are added exactly where
the post-processor adds them.

Source: LLAMA_VOCAB_PRE_TYPE_* in ggml-org/llama.cpp src/llama-vocab.cpp; get_vocab_base in conversion/base.py.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lrqat.errors import LrqatError
from lrqat.pretokenizers import PRE_TOKENIZERS

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # llama_token_type
UNSCORED = -1e6  # below every rank: no merge makes this token
SPACE = "\u2581"
# llama.cpp lets every special token of a Phi 3 strip, with these exceptions: no, and yes.
PHI3_KEEPING, PHI3_END = frozenset({"<unk>", "<s>", "<|endoftext|>"}), "</s>"


@dataclass(frozen=True)
class TokenizerFields:
    """What GGUF stores of a tokenizer.

    Attributes:
        model: "gpt2" (byte-level BPE) or "llama" (SentencePiece BPE).
        pre: llama.cpp's pre-tokenizer; "default" for SentencePiece.
        tokens: by id, up to the model's vocabulary size.
        types: llama_token_type of each.
        scores: of each, SentencePiece only.
        merges: "left right", byte-level only.
        ids: bos, eos, unk, pad -> id, those that exist.
        add_bos: a BOS is put before every text.
        add_eos: an EOS is put after every text.
        add_space_prefix: a space is put before every text.
        strips: special tokens take the whitespace to their right with them, as Phi 3's do.
        chat_template: Jinja, or None.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None
    merges: list[str] | None
    ids: dict[str, int]
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    strips: bool
    chat_template: str | None

    def model_name(self, name: str) -> str:
        """`name`, changed where llama.cpp would take it for a Phi 3, or would not."""
        if not self.strips:
            return re.sub("(phi)-?(3)", r"\1 \2", name, flags=re.IGNORECASE)
        return name if re.search("phi-?3", name, re.IGNORECASE) else f"phi-3 {name}"

    def add_to(self, writer: Any) -> None:
        """Write the keys to a gguf.GGUFWriter."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.scores is not None:
            writer.add_token_scores(self.scores)
        if self.merges is not None:
            writer.add_token_merges(self.merges)
        add_id = {
            "bos": writer.add_bos_token_id,
            "eos": writer.add_eos_token_id,
            "unk": writer.add_unk_token_id,
            "pad": writer.add_pad_token_id,
        }
        for kind, token_id in self.ids.items():
            add_id[kind](token_id)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(self.add_eos)
        writer.add_add_space_prefix(self.add_space_prefix)
        if self.chat_template is not None:
            writer.add_chat_template(self.chat_template)


def tokenizer_fields(assets: Mapping[str, bytes], config: Mapping[str, Any]) -> TokenizerFields:
    """Translate a tokenizer; refuses what llama.cpp would tokenize differently.

    Args:
        assets: the tokenizer files by name, as in a fused checkpoint.
        config: config.json.
    """
    if "tokenizer.json" not in assets:
        raise LrqatError("tokenizer.json: missing; save the fast tokenizer with transformers and fuse again")
    tokenizer = _json(assets, "tokenizer.json")
    settings = {**_json(assets, "special_tokens_map.json"), **_json(assets, "tokenizer_config.json")}
    model = tokenizer["model"]
    if model.get("type") != "BPE":
        raise LrqatError(f"tokenizer.json: model {model.get('type')}; GGUF export knows BPE")
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise LrqatError(f"tokenizer.json: BPE with {option}, which llama.cpp does not have")
    sentencepiece = bool(model.get("byte_fallback"))
    tokens, types = _vocabulary(tokenizer, config["vocab_size"], settings, sentencepiece)
    merges = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    ids = _special_ids(settings, config, tokens)
    add_bos, add_eos = _added_around(tokenizer.get("post_processor"), ids, tokens)
    if sentencepiece:
        pre, space_prefix = "default", _space_prefix(tokenizer)
        scores = _scores(tokens, types, merges)
    else:
        pre, space_prefix, scores = _pre_tokenizer(tokenizer), False, None
    return TokenizerFields(
        model="llama" if sentencepiece else "gpt2",
        pre=pre,
        tokens=tokens,
        types=types,
        scores=scores,
        merges=None if sentencepiece else [" ".join(pair) for pair in merges],
        ids=ids,
        add_bos=add_bos,
        add_eos=add_eos,
        add_space_prefix=space_prefix,
        strips=_strips(tokenizer, tokens, types),
        chat_template=_chat_template(assets, settings),
    )


def _json(assets: Mapping[str, bytes], name: str) -> dict[str, Any]:
    try:
        content = json.loads(assets.get(name, b"{}"))
    except ValueError as error:
        raise LrqatError(f"{name}: not JSON ({error}); copy the base model's tokenizer files again") from None
    if not isinstance(content, dict):
        raise LrqatError(f"{name}: expected a JSON object; copy the base model's tokenizer files again")
    return content


def _vocabulary(
    tokenizer: dict[str, Any], size: int, settings: dict[str, Any], sentencepiece: bool
) -> tuple[list[str], list[int]]:
    """Tokens and their types by id."""
    vocab: dict[str, int] = tokenizer["model"]["vocab"]
    added = {token["id"]: token for token in tokenizer.get("added_tokens", [])}
    # Gemma 3 has a token for images beyond the embedding; text never holds it.
    added = {token_id: token for token_id, token in added.items() if token_id < size or not token.get("special")}
    by_id = {token_id: token for token, token_id in vocab.items()}
    by_id.update({token_id: token["content"] for token_id, token in added.items()})
    if by_id and max(by_id) >= size:
        raise LrqatError(
            f"tokenizer.json: token id {max(by_id)} is beyond config.json's vocab_size {size}; they differ"
        )
    unknown = tokenizer["model"].get("unk_token") if sentencepiece else None
    tokens, types = [], []
    for token_id in range(size):
        token = by_id.get(token_id)
        tokens.append(f"[PAD{token_id}]" if token is None else token)
        if token is None:
            types.append(UNUSED)
        elif sentencepiece and token == unknown:
            types.append(UNKNOWN)
        elif token_id in added and not (sentencepiece and set(token) == {SPACE}):  # merged, and printed, as spaces
            types.append(CONTROL if added[token_id].get("special") else USER_DEFINED)
        else:
            types.append(BYTE if sentencepiece and _is_byte(token) else NORMAL)
    if ended := [token for token in tokens if "\0" in token]:
        raise LrqatError(f"tokenizer.json: token {ended[0]!r} holds a NUL, at which llama.cpp ends it")
    if twice := [token for token, count in Counter(tokens).items() if count > 1]:
        raise LrqatError(f"tokenizer.json: token {twice[0]!r} has two ids, on which llama.cpp aborts")
    return tokens, types


def _strips(tokenizer: dict[str, Any], tokens: list[str], types: list[int]) -> bool:
    """Whether special tokens strip the text to their right, all of those that llama.cpp lets."""
    added = tokenizer.get("added_tokens", [])
    stripping = {token["content"] for token in added if token.get("rstrip")}
    expected = {t for t, kind in zip(tokens, types, strict=True) if kind in (CONTROL, USER_DEFINED, UNKNOWN)}
    if strange := [token["content"] for token in added if token.get("lstrip") or token.get("single_word")]:
        raise LrqatError(f"tokenizer.json: {strange[0]} strips its neighbours, which GGUF cannot express")
    named = {PHI3_END, *PHI3_KEEPING} <= set(tokens)
    if stripping and not (named and stripping == (expected | {PHI3_END}) - PHI3_KEEPING):
        raise LrqatError(f"tokenizer.json: {min(stripping)} strips its neighbours, which GGUF cannot express")
    return bool(stripping)


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _steps(pre_tokenizer: dict[str, Any] | None) -> tuple[tuple[object, ...], ...]:
    """What a pre-tokenizer does, step by step, without what does not change the tokens."""
    if pre_tokenizer is None:
        return ()
    kind = pre_tokenizer["type"]
    if kind == "Sequence":
        return tuple(step for part in pre_tokenizer["pretokenizers"] for step in _steps(part))
    if kind == "ByteLevel":
        return ((kind, pre_tokenizer["add_prefix_space"], pre_tokenizer.get("use_regex", True)),)
    if kind == "Digits":
        return ((kind, pre_tokenizer["individual_digits"]),)
    if kind == "Split":
        regex, behavior = pre_tokenizer["pattern"].get("Regex"), (pre_tokenizer["behavior"], pre_tokenizer["invert"])
        # What the regexes of the table match, laid end to end, is the whole text: all but the matches removed.
        return ((kind, regex, *(("Isolated", False) if behavior == ("Removed", True) else behavior)),)
    return ((kind,),)


def _pre_tokenizer(tokenizer: dict[str, Any]) -> str:
    """llama.cpp's name for the pre-tokenizer."""
    steps = _steps(tokenizer.get("pre_tokenizer"))
    known = {n: p for n, p in PRE_TOKENIZERS.items() if tuple(s for part in p.steps for s in _steps(part)) == steps}
    if not known:
        raise LrqatError(
            f"tokenizer.json: pre_tokenizer {json.dumps(tokenizer.get('pre_tokenizer'))[:200]} has no known name in "
            f"llama.cpp (known: {', '.join(PRE_TOKENIZERS)}); export with --format gptq"
        )
    ignore_merges = bool(tokenizer["model"].get("ignore_merges"))
    name = next((n for n, p in known.items() if p.ignore_merges == ignore_merges), None)
    if name is None:
        raise LrqatError(
            f"tokenizer.json: ignore_merges {ignore_merges}, but llama.cpp's {min(known)} has {not ignore_merges}"
        )
    normalizer = (tokenizer.get("normalizer") or {}).get("type")
    if normalizer is not None and (name, normalizer) != ("qwen2", "NFC"):
        raise LrqatError(f"tokenizer.json: normalizer {normalizer}, which llama.cpp's {name} does not have")
    return name


def _space_prefix(tokenizer: dict[str, Any]) -> bool:
    """Whether a SentencePiece tokenizer puts a space before the text; refuses what llama.cpp does otherwise."""
    normalizer, pre_tokenizer = tokenizer.get("normalizer"), tokenizer.get("pre_tokenizer")
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepend = {"type": "Prepend", "prepend": SPACE}
    gemma = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    if pre_tokenizer is None and normalizer == {"type": "Sequence", "normalizers": [prepend, replace]}:
        return True
    # Gemma splits at the spaces that its normalizer has just replaced: at none.
    if pre_tokenizer in (None, gemma) and normalizer in (replace, {"type": "Sequence", "normalizers": [replace]}):
        return False
    if normalizer is None and pre_tokenizer is not None and pre_tokenizer["type"] == "Metaspace":
        scheme = pre_tokenizer.get("prepend_scheme", "always")
        if scheme in ("always", "never") and not pre_tokenizer.get("split", True):
            return bool(scheme == "always")
    raise LrqatError(
        "tokenizer.json: it treats spaces otherwise than llama.cpp's SentencePiece (a Metaspace of scheme 'first' puts "
        "none after a special token); export with --format gptq"
    )


def _scores(tokens: list[str], types: list[int], merges: list[tuple[str, ...]]) -> list[float]:
    """-(rank) of the first merge that makes each token."""
    normal = {token for token, kind in zip(tokens, types, strict=True) if kind == NORMAL}
    # Added tokens are found in the text before anything is merged.
    made = [(rank, "".join(pair)) for rank, pair in enumerate(merges) if "".join(pair) in normal]
    pairs = {pair: rank for rank, pair in enumerate(merges)}
    ranks: dict[str, int] = {}
    previous = None
    for rank, token in made:
        if token != previous and token in ranks and not (set(token) == {SPACE} and _first_space_grows(made, pairs)):
            raise LrqatError(f"tokenizer.json: merges to {token!r} are apart; llama.cpp has one score for a token")
        ranks.setdefault(token, rank)
        previous = token
    for token in normal:
        for cut in range(1, len(token)):
            pair = (token[:cut], token[cut:])
            if pair[0] in normal and pair[1] in normal and pair not in pairs:
                raise LrqatError(f"tokenizer.json: {pair} is no merge, but llama.cpp's SentencePiece joins it")
    return [0.0 if kind != NORMAL else float(-ranks.get(t, -UNSCORED)) for t, kind in zip(tokens, types, strict=True)]


def _first_space_grows(made: list[tuple[int, str]], pairs: dict[tuple[str, ...], int]) -> bool:
    """Whether a run of spaces is merged from the left, one by one, before a second pair of spaces is joined."""
    places = [place for place, (_, token) in enumerate(made) if set(token) == {SPACE}]
    runs = {made[place][1] for place in places}
    together = places[-1] - places[0] == len(places) - 1
    pair = pairs.get((SPACE, SPACE), -1)
    return together and all(pairs.get((run[1:], SPACE), pair) < pair for run in runs if len(run) > 2)


def _special_ids(settings: dict[str, Any], config: Mapping[str, Any], tokens: list[str]) -> dict[str, int]:
    """bos, eos, unk, pad as the tokenizer names them, else as config.json numbers them."""
    found = {}
    ids = {token: token_id for token_id, token in enumerate(tokens)}
    for kind in ("bos", "eos", "unk", "pad"):
        token = settings.get(f"{kind}_token")
        token = token.get("content") if isinstance(token, dict) else token
        token_id = ids.get(token) if isinstance(token, str) else config.get(f"{kind}_token_id")
        if isinstance(token_id, list):
            token_id = token_id[0]
        if token_id is not None and 0 <= token_id < len(tokens):
            found[kind] = token_id
    return found


def _added_around(post: dict[str, Any] | None, ids: dict[str, int], tokens: list[str]) -> tuple[bool, bool]:
    """Whether the post-processor puts a BOS before and an EOS after one text."""
    if post is None or post["type"] == "ByteLevel":
        return False, False
    if post["type"] == "Sequence":
        parts = [_added_around(part, ids, tokens) for part in post["processors"]]
        return any(bos for bos, _ in parts), any(eos for _, eos in parts)
    if post["type"] != "TemplateProcessing":
        raise LrqatError(f"tokenizer.json: post_processor {post['type']}, which llama.cpp does not have")
    names = [next(iter(piece.items())) for piece in post["single"]]
    added = ["" if kind == "Sequence" else piece["id"] for kind, piece in names]
    bos, eos = (tokens[ids[kind]] if kind in ids else None for kind in ("bos", "eos"))
    if added not in ([""], [bos, ""], ["", eos], [bos, "", eos]):
        raise LrqatError(f"tokenizer.json: post_processor adds {[a for a in added if a]}, llama.cpp BOS and EOS only")
    return added[0] != "", added[-1] != ""


def _chat_template(assets: Mapping[str, bytes], settings: dict[str, Any]) -> str | None:
    if "chat_template.jinja" in assets:
        return assets["chat_template.jinja"].decode("utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = next((t["template"] for t in template if t.get("name") == "default"), None)
    return template
