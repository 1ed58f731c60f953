"""Data: every kind of source gives the documents it holds, and blocks cut as the module says."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lrqat import data
from lrqat.data import blocks, default_texts, documents, draw, token_stream
from lrqat.errors import LrqatError

EOS = 2


@pytest.fixture
def jsonl(tmp_path: Path) -> Any:
    """Write rows (or raw lines) as a .jsonl file."""

    def write(*rows: Any) -> str:
        path = tmp_path / "rows.jsonl"
        lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return str(path)

    return write


def ids_of(sources: list[str], tokenizer: Any) -> list[int]:
    """All tokens of the sources, in a row."""
    return [i for source in sources for piece in token_stream(source, tokenizer) for i in piece]


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\n\ntwo ✓\n", encoding="utf-8")
    assert list(documents(str(path))) == ["one\n\ntwo ✓\n"]


def test_rows_of_jsonl_are_texts_conversations_and_turns(jsonl: Any) -> None:
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "ü"}]
    source = jsonl({"text": "plain", "id": 3}, "", {"messages": messages}, {"prompt": "p", "response": "r"})
    turn = [{"role": "user", "content": "p"}, {"role": "assistant", "content": "r"}]
    assert list(documents(source)) == ["plain", messages, turn]


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({"content": "x", "id": 1}, "got content, id"),
        ({"text": 3}, "got text"),
        ({"prompt": "p"}, "got prompt"),
        ([1], "got list"),
        ("{broken", "not JSON"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(jsonl: Any, row: Any, found: str) -> None:
    source = jsonl({"text": "good"}, "", row)
    with pytest.raises(LrqatError, match=rf"^[^\n]*rows\.jsonl:3: [^\n]*{found}[^\n]*$"):
        list(documents(source))


@pytest.mark.parametrize(
    "messages", [["hello"], [{"role": "user"}], [{"content": "x"}], [{"role": "user", "content": 5}]]
)
def test_a_malformed_conversation_is_named_by_file_and_line(jsonl: Any, messages: Any, tiny_tokenizer: Any) -> None:
    source = jsonl({"text": "good"}, {"messages": messages})
    with pytest.raises(LrqatError, match=r"^[^\n]*rows\.jsonl:2: [^\n]*$"):
        ids_of([source], tiny_tokenizer)


def test_a_file_that_is_no_text_is_one_line(tmp_path: Path) -> None:
    for name in ("a.txt", "b.jsonl"):
        (tmp_path / name).write_bytes(b"\xff\xfe\x00abc")
        with pytest.raises(LrqatError, match=rf"^[^\n]*{name}[^\n]*$"):
            list(documents(str(tmp_path / name)))


@pytest.mark.parametrize("name", ["alpaca.json", "Rows.JSON", "rows.csv", "rows.parquet"])
def test_rows_in_another_format_are_no_text(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('[{"instruction": "a", "output": "b"}]')
    with pytest.raises(LrqatError, match=r"^[^\n]*is read neither as text nor as rows; [^\n]*\.jsonl[^\n]*$"):
        list(documents(str(tmp_path / name)))


@pytest.mark.parametrize("name", ["rows.JSONL", "rows.ndjson"])
def test_other_spellings_of_jsonl_are_rows(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"text": "a row"}\n')
    assert list(documents(str(tmp_path / name))) == ["a row"]


@pytest.mark.parametrize("source", ["missing.txt", "no/such/file.jsonl", "no/such/folder/", "/none/at/all"])
def test_a_missing_source_is_one_line(source: str) -> None:
    with pytest.raises(LrqatError, match=r"^[^\n]*no such file[^\n]*$"):
        list(documents(source))


def test_without_the_datasets_package_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(LrqatError, match=r"^wikitext: [^\n]*pip install 'lrqat\[hub\]'$"):
        list(documents("wikitext"))


def test_a_directory_of_rows_is_read_as_the_hub_reads_it(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    folder = tmp_path / "set"
    folder.mkdir()
    for split, word in (("train", "a"), ("test", "b")):
        rows = [{"text": f"{word}{i}"} for i in range(3)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert list(documents(str(folder))) == ["a0", "a1", "a2"]
    assert list(documents(f"{folder}@test")) == ["b0", "b1", "b2"]


@pytest.mark.parametrize("content", ['{"title": "x"}', '{"text": "a"}\n{"text": 3, "more": 4}', "{broken"])
def test_a_dataset_that_holds_no_text_or_breaks_off_is_one_line(tmp_path: Path, content: str) -> None:
    pytest.importorskip("datasets")
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text(content + "\n")
    with pytest.raises(LrqatError, match=r"^[^\n]*set[^\n]*$"):
        list(documents(str(folder)))


def test_a_split_that_a_dataset_does_not_have_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(LrqatError, match=r"^[^\n]*set@nosuch[^\n]*$"):
        list(documents(f"{tmp_path / 'set'}@nosuch"))


def test_documents_end_with_eos_and_are_joined_in_order(tmp_path: Path, jsonl: Any, tiny_tokenizer: Any) -> None:
    (tmp_path / "a.txt").write_text("first text")
    source = jsonl({"text": "second"}, {"text": "third"})
    expected: list[int] = []
    for text in ("first text", "second", "third"):
        expected += [*tiny_tokenizer(text)["input_ids"], EOS]
    assert ids_of([str(tmp_path / "a.txt"), source], tiny_tokenizer) == expected
    found = blocks([str(tmp_path / "a.txt"), source], tiny_tokenizer, 4)
    assert found.dtype == torch.int64 and found.shape == (len(expected) // 4, 4)
    assert found.flatten().tolist() == expected[: found.numel()]


def test_a_conversation_goes_through_the_chat_template_and_ends_itself(jsonl: Any, tiny_tokenizer: Any) -> None:
    source = jsonl({"prompt": "hello ", "response": "there"})
    assert ids_of([source], tiny_tokenizer) == tiny_tokenizer("hello there", add_special_tokens=False)["input_ids"]


def test_a_conversation_without_a_chat_template_is_one_line(
    jsonl: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny_tokenizer, "chat_template", None)
    with pytest.raises(LrqatError, match=r"^[^\n]*rows\.jsonl: [^\n]*chat template[^\n]*$"):
        blocks([jsonl({"prompt": "a", "response": "b"})], tiny_tokenizer, 4)


def test_a_long_text_loses_nothing_between_its_pieces(
    tmp_path: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "".join(f"line {i} of many, with ümläuts\n" for i in range(400)) + "no line end"
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    monkeypatch.setattr(data, "PIECE_CHARACTERS", 100)
    pieces = list(token_stream(str(tmp_path / "a.txt"), tiny_tokenizer))
    assert len(pieces) > 50 and pieces[-1] == [EOS]
    assert tiny_tokenizer.decode([i for piece in pieces[:-1] for i in piece]) == text


def test_no_source_means_the_prose_that_python_carries(tiny_tokenizer: Any) -> None:
    assert sum(map(len, default_texts())) > 300_000
    found = blocks([], tiny_tokenizer, 16, limit=3)
    start = tiny_tokenizer(default_texts()[0][:400])["input_ids"]
    assert found.flatten().tolist() == start[:48]


@pytest.mark.parametrize("limit", [1, 2, 7, None])
def test_a_limit_takes_the_first_blocks(tmp_path: Path, tiny_tokenizer: Any, limit: int | None) -> None:
    (tmp_path / "a.txt").write_text("words and words " * 50)
    everything = blocks([str(tmp_path / "a.txt")], tiny_tokenizer, 8)
    assert torch.equal(blocks([str(tmp_path / "a.txt")], tiny_tokenizer, 8, limit), everything[:limit])


def test_less_than_a_block_is_one_line(tmp_path: Path, tiny_tokenizer: Any) -> None:
    (tmp_path / "a.txt").write_text("short")
    with pytest.raises(LrqatError, match=r"^data: \d+ tokens are less than one block of 64; [^\n]*--seq-len$"):
        blocks([str(tmp_path / "a.txt")], tiny_tokenizer, 64)


def test_sources_follow_each_other_and_a_dataset_gives_no_more_than_enough(tmp_path: Path, tiny_tokenizer: Any) -> None:
    pytest.importorskip("datasets")
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"text": "a row of words"}\n' * 100)
    (tmp_path / "a.txt").write_text("the text that comes after")
    first, last = ids_of([str(folder)], tiny_tokenizer), ids_of([str(tmp_path / "a.txt")], tiny_tokenizer)
    whole = blocks([str(folder), str(tmp_path / "a.txt")], tiny_tokenizer, 4).flatten().tolist()
    assert whole == (first + last)[: len(whole)] and len(whole) > len(first)
    some = blocks([str(folder), str(tmp_path / "a.txt")], tiny_tokenizer, 4, enough=3).flatten().tolist()
    row = len(first) // 100
    assert len(some) <= 12 + row + len(last) and some[:12] == first[:12]
    assert tiny_tokenizer.decode(some).count("text that comes") == 1


@given(total=st.integers(1, 12), first=st.integers(0, 15), second=st.integers(1, 15), seed=st.integers(0, 3))
def test_two_draws_one_behind_the_other_meet_only_where_the_text_is_short(
    total: int, first: int, second: int, seed: int
) -> None:
    numbers_N1 = torch.arange(total)[:, None]
    one, other = (
        set(draw(numbers_N1, count, seed, behind).flatten().tolist()) for count, behind in ((first, 0), (second, first))
    )
    assert len(one) == min(first, total) and len(other) == min(second, total)
    assert len(one & other) == max(0, len(one) + len(other) - total)
