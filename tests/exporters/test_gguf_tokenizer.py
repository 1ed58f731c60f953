"""tokenizer.json -> tokenizer.ggml.*: its structure, and the ids that llama.cpp then gives."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from exporters import gguf
from exporters.gguf_tokenizer import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    TokenizerFields,
    tokenizer_fields,
)
from lrqat.errors import LrqatError
from lrqat.fused import FusedCheckpoint, SafetensorsDirectory, Spec, read_assets, read_json
from lrqat.pretokenizers import GPT4O, LLAMA3, PRE_TOKENIZERS, QWEN2, TEKKEN

Change = Callable[[dict[str, Any]], None]

HARD_TEXT = (
    "Numbers 1234567890 and 3.14159, don't we'll I'm; CAPS, ünïcödé ﬁ Ǆ, 日本語 العربية हिन्दी, "
    "emoji 🤖\U0001f469\u200d\U0001f467\U0001f3fd e\u0301, Ⅷ ½ ² x² \u00a0\u2003\u200b,\n"
    "\tdef f(x):\n\n\n        return {'a': x**2}  # tabs\t\tand   runs     of spaces \r\n"
    "<|im_start|>user\n <|im_end|><|endoftext|>  end  "
)
# Words that a pre-tokenizer splits, or not, where small letters become capitals.
CASES = (
    "camelCase HTTPServer McDonald iPhone ABCdef XMLHttpRequest2 don'T IT'S ÀÉÎõü ÖsterReich ЖуковСКИЙ 大文字ABC ǅemal"
)
SPACES = "hello the  the    hello<s> the</s><tool>hello a         b <tool>  the <|user|> hello \n <|end|>\n\n the <b>t"


def translate(directory: Path, change: Change = lambda tokenizer: None, **config: Any) -> TokenizerFields:
    """The fields of a directory's tokenizer, with a change to its tokenizer.json."""
    assets = read_assets(directory)
    tokenizer = json.loads(assets["tokenizer.json"])
    change(tokenizer)
    changed = {**assets, "tokenizer.json": json.dumps(tokenizer).encode()}
    return tokenizer_fields(changed, {**read_json(directory / "config.json"), **config})


def byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def split(regex: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


def test_a_byte_level_tokenizer_keeps_its_tokens_merges_and_ids(tiny_model_dir: Path, tiny_tokenizer: Any) -> None:
    fields = translate(tiny_model_dir)
    size = len(tiny_tokenizer)
    assert (fields.model, fields.pre, fields.scores) == ("gpt2", "smollm", None)
    assert fields.tokens[:size] == tiny_tokenizer.convert_ids_to_tokens(range(size))
    assert fields.tokens[size:] == [f"[PAD{i}]" for i in range(size, 448)]
    assert set(fields.types[:3]) == {CONTROL} and set(fields.types[3:size]) == {NORMAL}
    assert set(fields.types[size:]) == {UNUSED}
    assert fields.ids == {"bos": 1, "eos": 2, "unk": 0, "pad": 2}
    assert fields.merges is not None and all(len(merge.split(" ")) == 2 for merge in fields.merges)
    assert fields.chat_template is not None and fields.chat_template.startswith("{% for message")


@pytest.mark.parametrize(
    ("pre_tokenizer", "ignore_merges", "normalizer", "name"),
    [
        (byte_level(True), False, None, "gpt-2"),
        (sequence({"type": "Digits", "individual_digits": True}, byte_level(True)), False, None, "smollm"),
        (sequence(split(LLAMA3), byte_level(False)), True, None, "llama-bpe"),
        (sequence(split(LLAMA3), byte_level(False)), False, None, "dbrx"),
        (sequence({**split(LLAMA3), "behavior": "Removed", "invert": True}, byte_level(False)), False, None, "dbrx"),
        (sequence(split(QWEN2), byte_level(False)), False, {"type": "NFC"}, "qwen2"),
        (sequence(split(TEKKEN), byte_level(False)), True, None, "tekken"),
        (sequence(split(GPT4O), byte_level(False)), False, None, "gpt-4o"),
    ],
)
def test_the_pre_tokenizers_structure_gives_llama_cpps_name(
    tiny_model_dir: Path, pre_tokenizer: Any, ignore_merges: bool, normalizer: Any, name: str
) -> None:
    def change(tokenizer: dict[str, Any]) -> None:
        tokenizer.update(pre_tokenizer=pre_tokenizer, normalizer=normalizer)
        tokenizer["model"]["ignore_merges"] = ignore_merges

    assert translate(tiny_model_dir, change).pre == name


def _set(*path: Any, value: Any) -> Change:
    def change(tokenizer: dict[str, Any]) -> None:
        for key in path[:-1]:
            tokenizer = tokenizer[key]
        tokenizer[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (_set("pre_tokenizer", value=None), "has no known name in llama.cpp"),
        (_set("pre_tokenizer", value=sequence(split("x+"), byte_level(False))), "has no known name in llama.cpp"),
        (_set("pre_tokenizer", value={**byte_level(True), "add_prefix_space": True}), "has no known name in llama.cpp"),
        (_set("model", "ignore_merges", value=True), "ignore_merges True, but llama.cpp's smollm has False"),
        (_set("normalizer", value={"type": "NFKC"}), "normalizer NFKC"),
        (_set("model", "type", value="Unigram"), "model Unigram; GGUF export knows BPE"),
        (_set("model", "dropout", value=0.1), "BPE with dropout"),
        (_set("added_tokens", 0, "rstrip", value=True), "<|endoftext|> strips its neighbours"),
        (_set("model", "vocab", "zzz", value=448), "token id 448 is beyond config.json's vocab_size 448"),
        (_set("model", "vocab", "<|im_end|>", value=447), "token '<|im_end|>' has two ids"),
        (_set("model", "vocab", "a\0", value=447), "token 'a\\x00' holds a NUL"),
        (_set("post_processor", value={"type": "BertProcessing"}), "post_processor BertProcessing"),
    ],
)
def test_what_llama_cpp_would_tokenize_otherwise_is_refused(tiny_model_dir: Path, change: Change, line: str) -> None:
    with pytest.raises(LrqatError, match=r"^[^\n]*$") as refused:
        translate(tiny_model_dir, change)
    assert line in str(refused.value)


def test_a_missing_or_broken_tokenizer_is_one_line(tiny_model_dir: Path) -> None:
    assets, config = read_assets(tiny_model_dir), read_json(tiny_model_dir / "config.json")
    with pytest.raises(LrqatError, match=r"tokenizer\.json: missing"):
        tokenizer_fields({}, config)
    with pytest.raises(LrqatError, match=r"tokenizer\.json: not JSON"):
        tokenizer_fields({**assets, "tokenizer.json": assets["tokenizer.json"][:100]}, config)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [([], [], (False, False)), (["<|im_start|>"], [], (True, False)), (["<|im_start|>"], ["<|im_end|>"], (True, True))],
)
def test_bos_and_eos_are_added_where_the_post_processor_adds_them(
    tiny_model_dir: Path, before: list[str], after: list[str], expected: tuple[bool, bool]
) -> None:
    single = [{"SpecialToken": {"id": t, "type_id": 0}} for t in before]
    single += [{"Sequence": {"id": "A", "type_id": 0}}]
    single += [{"SpecialToken": {"id": t, "type_id": 0}} for t in after]
    template = {"type": "TemplateProcessing", "single": single}
    nested = {"type": "Sequence", "processors": [byte_level(True), template]}
    fields = translate(tiny_model_dir, _set("post_processor", value=nested))
    assert (fields.add_bos, fields.add_eos) == expected


def test_a_post_processor_that_adds_another_token_is_refused(tiny_model_dir: Path) -> None:
    single = [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    template = {"type": "TemplateProcessing", "single": single}
    with pytest.raises(LrqatError, match="post_processor adds"):
        translate(tiny_model_dir, _set("post_processor", value=template))


def sentencepiece(tokenizer: dict[str, Any]) -> None:
    """Turn a tokenizer.json into a SentencePiece BPE: <unk>, <s>, </s>, 256 bytes, then pieces in order of score."""
    pieces = ["▁", "a", "b", "c", "h", "e", "l", "o", "t", "▁t", "he", "▁the", "ll", "llo", "hello", "▁▁", "▁▁▁▁"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *pieces]
    merges = [[p[:i], p[i:]] for p in pieces for i in range(1, len(p)) if p[:i] in pieces and p[i:] in pieces]
    tokenizer["model"] = {
        "type": "BPE",
        "unk_token": "<unk>",
        "fuse_unk": True,
        "byte_fallback": True,
        "vocab": {token: i for i, token in enumerate(tokens)},
        "merges": merges,
    }
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    tokenizer["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]}
    tokenizer["pre_tokenizer"] = None
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [(i, tokens[i], True) for i in range(3)] + [(len(tokens), "<tool>", False)]
    tokenizer["added_tokens"] = [{"id": i, "content": token, "special": s, **flags} for i, token, s in added]
    tokenizer["post_processor"] = None


def test_a_sentencepiece_tokenizer_gets_scores_in_the_order_of_its_merges(tiny_model_dir: Path) -> None:
    fields = translate(tiny_model_dir, sentencepiece)
    ids = {token: i for i, token in enumerate(fields.tokens)}
    assert (fields.model, fields.pre, fields.merges, fields.add_space_prefix) == ("llama", "default", None, True)
    kinds = [fields.types[ids[t]] for t in ("<unk>", "<s>", "<0x0A>", "hello", "<tool>", "[PAD300]")]
    assert kinds == [UNKNOWN, CONTROL, BYTE, NORMAL, USER_DEFINED, UNUSED]
    assert fields.scores is not None
    ranked = [fields.scores[ids[token]] for token in ("▁t", "he", "▁the", "ll", "llo", "hello", "▁▁", "▁▁▁▁", "a")]
    assert ranked == sorted(ranked, reverse=True) and len(set(ranked)) == len(ranked)


def test_merges_that_scores_cannot_express_are_refused(tiny_model_dir: Path) -> None:
    def apart(tokenizer: dict[str, Any]) -> None:
        sentencepiece(tokenizer)
        tokenizer["model"]["vocab"]["th"] = 300
        tokenizer["model"]["merges"] += [["▁t", "he"]]

    def incomplete(tokenizer: dict[str, Any]) -> None:
        sentencepiece(tokenizer)
        tokenizer["model"]["merges"].remove(["l", "l"])

    with pytest.raises(LrqatError, match="merges to '▁the' are apart"):
        translate(tiny_model_dir, apart)
    with pytest.raises(LrqatError, match=r"\('l', 'l'\) is no merge"):
        translate(tiny_model_dir, incomplete)


def test_a_space_after_special_tokens_only_at_the_start_is_refused(tiny_model_dir: Path) -> None:
    def metaspace(scheme: str) -> Change:
        def change(tokenizer: dict[str, Any]) -> None:
            sentencepiece(tokenizer)
            tokenizer["normalizer"] = None
            tokenizer["pre_tokenizer"] = {
                "type": "Metaspace",
                "replacement": "▁",
                "prepend_scheme": scheme,
                "split": False,
            }

        return change

    assert translate(tiny_model_dir, metaspace("always")).add_space_prefix
    assert not translate(tiny_model_dir, metaspace("never")).add_space_prefix
    with pytest.raises(LrqatError, match="scheme 'first'"):
        translate(tiny_model_dir, metaspace("first"))


def with_bos(tokenizer: dict[str, Any]) -> None:
    """A post-processor that puts a BOS before every text."""
    texts = [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}]
    bos = {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}
    special = {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}}
    template = {"single": [bos, texts[0]], "pair": [bos, *texts], "special_tokens": special}
    tokenizer["post_processor"] = {"type": "TemplateProcessing", **template}


def with_pre_tokenizer(*steps: dict[str, Any], ignore_merges: bool = False, train: bool = False) -> Change:
    def change(tokenizer: dict[str, Any]) -> None:
        tokenizer["pre_tokenizer"] = sequence(*steps)
        tokenizer["model"]["ignore_merges"] = ignore_merges
        if train:
            trained(tokenizer)

    return change


def gemma(tokenizer: dict[str, Any]) -> None:
    """Gemma's: no space before the text; runs of spaces and tags added; merges in the order of its converter."""
    sentencepiece(tokenizer)
    vocab = tokenizer["model"]["vocab"]
    pieces = ["▁" * n for n in range(2, 9)] + ["\n", "\n\n", "<b>"]
    for piece in pieces:
        vocab.setdefault(piece, len(vocab))
    merges = [["▁" * n, "▁" * m] for n in range(1, 8) for m in range(1, 9 - n)]
    merges.sort(key=lambda pair: (len(pair[0]), len(pair[1])), reverse=True)
    tokenizer["model"]["merges"] = merges + [m for m in tokenizer["model"]["merges"] if "▁▁" not in "".join(m)]
    flags = {"special": False, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    tokenizer["added_tokens"][-1]["id"] = len(vocab)
    tokenizer["added_tokens"] += [{"id": vocab[piece], "content": piece, **flags} for piece in pieces]
    tokenizer["added_tokens"] += [{"id": 448, "content": "<image>", **flags, "special": True}]
    tokenizer["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    tokenizer["pre_tokenizer"] = {
        "type": "Split",
        "pattern": {"String": " "},
        "behavior": "MergedWithPrevious",
        "invert": False,
    }


def phi3(tokenizer: dict[str, Any]) -> None:
    """Phi 3's: Llama's, with special tokens that strip what is to their right."""
    sentencepiece(tokenizer)
    tokenizer["added_tokens"][-1]["rstrip"] = True
    flags = {"single_word": False, "lstrip": False, "normalized": False}
    more = [("<|endoftext|>", True, False), ("<|user|>", True, True), ("<|end|>", True, True)]
    first = len(tokenizer["model"]["vocab"]) + 1
    tokenizer["added_tokens"] += [
        {"id": first + i, "content": token, "special": special, "rstrip": strips, **flags}
        for i, (token, special, strips) in enumerate(more)
    ]
    tokenizer["added_tokens"][2].update(rstrip=True, special=False)


def test_gemmas_spaces_are_merged_and_printed_as_spaces(tiny_model_dir: Path) -> None:
    fields = translate(tiny_model_dir, gemma)
    ids = {token: i for i, token in enumerate(fields.tokens)}
    assert not fields.add_space_prefix and "<image>" not in ids
    assert [fields.types[ids[token]] for token in ("▁▁", "\n\n", "<b>")] == [NORMAL, USER_DEFINED, USER_DEFINED]


def test_merges_of_spaces_that_scores_cannot_express_are_refused(tiny_model_dir: Path) -> None:
    def shortest_first(tokenizer: dict[str, Any]) -> None:
        gemma(tokenizer)
        tokenizer["model"]["merges"].sort(key=lambda pair: len(pair[0]))

    with pytest.raises(LrqatError, match=r"merges to '▁+' are apart"):
        translate(tiny_model_dir, shortest_first)


def test_the_name_of_the_file_tells_llama_cpp_whether_special_tokens_strip(tiny_model_dir: Path) -> None:
    stripping, plain = translate(tiny_model_dir, phi3), translate(tiny_model_dir, sentencepiece)
    assert stripping.strips and not plain.strips
    assert [stripping.model_name(n) for n in ("mine", "My-Phi-3-q4", "phi3")] == ["phi-3 mine", "My-Phi-3-q4", "phi3"]
    assert [plain.model_name(n) for n in ("mine", "My-Phi-3-q4", "phi3")] == ["mine", "My-Phi 3-q4", "phi 3"]


EXACT = [name for name in PRE_TOKENIZERS if name not in ("tekken", "gpt-4o")]


def trained(tokenizer: dict[str, Any]) -> None:
    """Vocabulary and merges in which nearly every word of the hard text is one token: wrong splits show at once."""
    from tokenizers import Tokenizer, pre_tokenizers, trainers

    tokenizer["model"] = {
        "type": "BPE",
        "vocab": {},
        "merges": [],
        "ignore_merges": tokenizer["model"]["ignore_merges"],
    }
    added, tokenizer["added_tokens"] = tokenizer["added_tokens"], []
    fresh = Tokenizer.from_str(json.dumps(tokenizer))
    special = [token["content"] for token in added]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    fresh.train_from_iterator(
        [HARD_TEXT, CASES] * 2,
        trainers.BpeTrainer(vocab_size=1000, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    content = json.loads(fresh.to_str())
    content["model"]["ignore_merges"] = tokenizer["model"]["ignore_merges"]
    tokenizer.update(content)


@pytest.mark.parametrize(
    "change",
    [
        lambda tokenizer: None,
        with_bos,
        sentencepiece,
        gemma,
        phi3,
        *(
            with_pre_tokenizer(*p.steps, ignore_merges=p.ignore_merges, train=True)
            for name, p in PRE_TOKENIZERS.items()
            if name in EXACT
        ),
    ],
    ids=["as it is", "bos", "sentencepiece", "gemma", "phi-3", *EXACT],
)
def test_llama_cpp_gives_the_same_ids_as_the_hugging_face_tokenizer(
    tiny_model_dir: Path, tmp_path: Path, change: Change
) -> None:
    texts = [HARD_TEXT, HARD_TEXT[::-1], CASES, SPACES, "", " ", *HARD_TEXT.split(), *CASES.split()]
    for text, theirs, ours in ids_of(tiny_model_dir, tmp_path, change, texts):
        assert ours == theirs, text


@pytest.mark.parametrize("name", ["tekken", "gpt-4o"])
def test_where_llama_cpps_regex_is_an_approximation_ids_differ_at_combining_marks_only(
    tiny_model_dir: Path, tmp_path: Path, name: str
) -> None:
    found = PRE_TOKENIZERS[name]
    change = with_pre_tokenizer(*found.steps, ignore_merges=found.ignore_merges, train=True)
    plain = "".join(c for c in HARD_TEXT if not unicodedata.category(c).startswith("M"))
    same = [plain, plain[::-1], CASES, SPACES, "", " ", *plain.split(), *CASES.split()]
    for text, theirs, ours in ids_of(tiny_model_dir, tmp_path, change, same):
        assert ours == theirs, text
    ((_, theirs, ours),) = ids_of(tiny_model_dir, tmp_path, change, ["हिन्दी"])
    assert ours != theirs


def ids_of(
    tiny_model_dir: Path, tmp_path: Path, change: Change, texts: list[str]
) -> Iterator[tuple[str, list[int], list[int]]]:
    """Each text, with the ids of the Hugging Face tokenizer and of llama.cpp."""
    pytest.importorskip("xllamacpp", reason="pip install 'lrqat[llamacpp]'")
    from transformers import PreTrainedTokenizerFast

    from serve.llamacpp import LlamaCpp

    assets, files = read_assets(tiny_model_dir), SafetensorsDirectory(tiny_model_dir)
    tokenizer = json.loads(assets["tokenizer.json"])
    change(tokenizer)
    assets["tokenizer.json"] = json.dumps(tokenizer).encode()
    (tmp_path / "tokenizer.json").write_bytes(assets["tokenizer.json"])
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    size = max(448, len(theirs.get_vocab()) if "<image>" not in theirs.get_vocab() else 0)
    embedding = {"model.embed_tokens.weight": torch.zeros(size, 256)}
    dense = {name: files.get(name) for name in files.specs} | embedding
    specs = {name: Spec(tensor.dtype, tuple(tensor.shape)) for name, tensor in dense.items()}
    config = {**read_json(tiny_model_dir / "config.json"), "vocab_size": size}
    checkpoint = FusedCheckpoint({}, dense, {}, specs, config, assets)
    with LlamaCpp(gguf.write(checkpoint, tmp_path / "dense.gguf"), n_ctx=32) as runtime:
        for text in texts:
            yield text, theirs(text)["input_ids"], runtime.tokenize(text, add_special=True)
