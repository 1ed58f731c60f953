"""A model's own text is drawn from its own distribution, and reads as training text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from lrqat.cli import main
from lrqat.data import blocks
from lrqat.errors import LrqatError
from lrqat.generate import SHORTEST, beginning, documents, draw, generate_corpus

COUNT = 4096  # draws

Written = Callable[..., Path]


@pytest.fixture
def written(trained_model_dir: Path, tmp_path: Path) -> Written:
    """Write a small corpus, with some settings changed."""

    def write(name: str = "own.jsonl", **changed: Any) -> Path:
        settings: dict[str, Any] = {
            "tokens": 1000, "length": 40, "batch_size": 5, "temperature": 1.0, "seed": 0, "dtype": "float32",
        }  # fmt: skip
        generate_corpus(str(trained_model_dir), tmp_path / name, **settings | changed)
        return tmp_path / name

    return write


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_first_token_is_drawn_from_the_softmax_whatever_the_model_is_configured_for(
    trained_model_dir: Path, temperature: float
) -> None:
    model = AutoModelForCausalLM.from_pretrained(trained_model_dir).eval()
    with torch.no_grad():
        p_V = (model(torch.tensor([[0]])).logits[0, -1] / temperature).softmax(0)
    model.generation_config = GenerationConfig(
        do_sample=False, top_k=3, top_p=0.5, repetition_penalty=5.0, eos_token_id=int(p_V.argmax()), max_length=2
    )
    torch.manual_seed(0)
    drawn = torch.tensor(draw(model, 0, COUNT, 2, temperature))
    assert drawn.shape == (COUNT, 2)
    seen_V = torch.bincount(drawn[:, 0], minlength=len(p_V)) / COUNT
    # E |seen - p| <= sqrt(p (1 - p) / COUNT) for each token; its sum over all tokens hardly varies.
    assert (seen_V - p_V).abs().sum() < 1.1 * (p_V * (1 - p_V) / COUNT).sqrt().sum()


def test_text_reads_as_blocks_of_training_text(written: Written, trained_model_dir: Path) -> None:
    rows = [json.loads(line) for line in written().read_text(encoding="utf-8").splitlines()]
    assert len(rows) >= 25 and all(set(row) == {"text"} and row["text"].strip() for row in rows)
    assert len(blocks([str(written())], AutoTokenizer.from_pretrained(trained_model_dir), 64)) >= 10


def test_a_seed_tells_the_text(written: Written) -> None:
    one, same, other = written("a.jsonl"), written("b.jsonl"), written("c.jsonl", seed=1)
    assert one.read_text() == same.read_text() != other.read_text()


@given(st.lists(st.integers(0, 9)))
def test_documents_are_what_lies_between_special_tokens(sequence: list[int]) -> None:
    found = documents(sequence, frozenset({0, 1}))
    text = "".join(map(str, sequence))
    assert ["".join(map(str, each)) for each in found] == [
        part for part in text.replace("1", "0").split("0") if len(part) >= SHORTEST
    ]


def test_a_document_begins_behind_endoftext_where_there_is_one(tiny_tokenizer: Any) -> None:
    class Other:
        bos_token, eos_token = "<s>", "</s>"

        def get_vocab(self) -> dict[str, int]:
            return {"<s>": 7, "</s>": 8}

        def convert_tokens_to_ids(self, token: str) -> int:
            return self.get_vocab()[token]

    assert beginning(tiny_tokenizer, "m") == tiny_tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert beginning(Other(), "m") == 7
    Other.bos_token = Other.eos_token = None  # type: ignore[assignment]
    with pytest.raises(LrqatError, match="no token that begins or ends a text"):
        beginning(Other(), "m")


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"tokens": 0}, "--tokens: expected at least 1, got 0"),
        ({"length": 3}, "--length: expected at least 8, got 3"),
        ({"length": 512}, "--length: expected at most 511 of this model, got 512"),
        ({"batch_size": 0}, "--batch-size: expected at least 1"),
        ({"temperature": 0.0}, "--temperature: expected more than 0"),
        ({"temperature": float("nan")}, "--temperature: expected more than 0"),
        ({"name": "nowhere/own.jsonl"}, "expected a file in a folder that is there"),
    ],
)
def test_what_cannot_be_drawn_is_refused_and_nothing_is_left(
    written: Written, tmp_path: Path, changed: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(LrqatError, match=complaint):
        written(**changed)
    assert not list(tmp_path.iterdir())


def test_the_command_says_what_it_has_written(
    trained_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "own.jsonl"
    flags = ["--tokens", "200", "--length", "20", "--batch-size", "10", "--dtype", "float32", "--json"]
    assert main(["generate", str(trained_model_dir), "--out", str(out), *flags]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["documents"] == len(out.read_text(encoding="utf-8").splitlines()) and said["tokens"] <= 200
