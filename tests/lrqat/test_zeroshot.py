"""Zero-shot tasks: the user's files become lm-eval's items, and its scores are what the model's logits say."""

from __future__ import annotations

import bz2
import json
import math
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lrqat import zeroshot, zeroshot_here, zeroshot_server
from lrqat.cli import main
from lrqat.client import call
from lrqat.errors import LrqatError
from lrqat.kv import round_kv
from lrqat.zeroshot import average, capitalized, parse_tasks, rows_of

BATCHED = 0.01  # nats; llama.cpp sums several tokens' products in another order, which flips int8 roundings: .0015 seen
INT8 = 0.05  # llama.cpp rounds activations to int8 before a 4-bit matrix
FLOAT32 = 1e-4  # nats; sums of float32 log-probabilities, padded or not
ROWS = [
    {"query": "Question: Which is a number?\n", "choices": ["seven and a half", "house", "the"], "gold": 0},
    {"query": "Question: Which is no number?\n", "choices": ["7", "a tree or a house"], "gold": 1},
    {"query": "Question: Which of both?\n", "choices": ["this one", "that"], "gold": 1},
]
WORDS = [{"text": "A row says that it is a row"}, {"text": "numbers and numbers and numbers"}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files of the four tasks."""
    for name in ("piqa", "arc_easy"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({**row, "more": 1}) + "\n" for row in ROWS))
    (tmp_path / "lambada_openai.jsonl").write_text("".join(json.dumps(row) + "\n" for row in WORDS))
    items = ["A man: he", "2", "sits.", "stands.", "says a word.", "is.", "Two: they", "0", "go.", "a", "b", "c"]
    (tmp_path / "hellaswag_val_full.txt.bz2").write_bytes(bz2.compress("\n".join(items).encode() + b"\n"))
    return tmp_path


def test_files_of_every_task_are_read_and_cut_to_the_first_rows(folder: Path) -> None:
    assert rows_of("piqa", folder) == ROWS and rows_of("arc_easy", folder, 2) == ROWS[:2]
    assert rows_of("lambada_openai", folder) == WORDS
    first, second = rows_of("hellaswag", folder)
    assert first == {"query": "A man: he", "choices": ["sits.", "stands.", "says a word.", "is."], "gold": 2}
    assert rows_of("hellaswag", folder, 1) == [first] and second["gold"] == 0
    (folder / "hellaswag.jsonl").write_text(json.dumps(ROWS[0]))
    assert rows_of("hellaswag", folder) == ROWS[:1]


@pytest.mark.parametrize(
    ("task", "name", "content", "named"),
    [
        ("piqa", "piqa.jsonl", b'{"query": "x", "choices": []}', r"piqa\.jsonl: row 1"),
        ("piqa", "piqa.jsonl", b'{"query": "x"\n', r"piqa\.jsonl:1: not JSON"),
        ("lambada_openai", "lambada_openai.jsonl", b'{"txt": "x"}', "row 1"),
        ("hellaswag", "hellaswag_val_full.txt", b"a\nb\nc\nd\ne\nf", "6 lines an item"),
        ("hellaswag", "hellaswag_val_full.txt.bz2", b"no bzip2", "6 lines an item"),
        ("arc_easy", "other", b"", r"no arc_easy\.jsonl"),
    ],
)
def test_a_file_that_is_none_of_a_task_is_one_line(
    tmp_path: Path, task: str, name: str, content: bytes, named: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(LrqatError, match=rf"^[^\n]*{named}[^\n]*$"):
        rows_of(task, tmp_path)


@pytest.mark.parametrize(
    ("query", "asked"),
    [
        ("Roofs: A man is sitting on a roof. he", "Roofs: A man is sitting on a roof. He"),
        ("Jerk: She grabs the pole. the lady in Red", "Jerk: She grabs the pole. The lady in red"),  # str.capitalize
        ("Rings: He can take it off.", "Rings: He can take it off."),
        ("Cake: a fragment without a sentence", "Cake: a fragment without a sentence"),
    ],
)
def test_hellaswags_endings_go_on_from_a_capital_as_in_lm_eval(query: str, asked: str) -> None:
    assert capitalized(query) == asked


@pytest.mark.parametrize("words", [["boolq"], ["piqa:0"], ["piqa:x"], ["piqa", "piqa:3"]])
def test_unknown_tasks_are_one_line(words: list[str]) -> None:
    with pytest.raises(LrqatError, match=r"^--tasks [^\n]*lambada_openai[^\n]*$"):
        parse_tasks(words)
    assert parse_tasks(["piqa", "hellaswag:1000"]) == {"piqa": None, "hellaswag": 1000}


def test_the_average_is_of_the_main_accuracies_with_their_common_error() -> None:
    table = {
        "piqa": {"acc": 0.6, "acc_stderr": 0.03, "acc_norm": 0.1, "acc_norm_stderr": 0.9},
        "hellaswag": {"acc": 0.9, "acc_stderr": 0.9, "acc_norm": 0.4, "acc_norm_stderr": 0.04},
    }
    assert average(table) == {"acc": 0.5, "acc_stderr": pytest.approx(math.hypot(0.03, 0.04) / 2)}


def test_without_lm_eval_the_remedy_is_named(
    folder: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["zeroshot", str(tiny_model_dir), "--tasks-dir", str(folder)]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "pip install 'lrqat[lm-eval]'" in errors[0]


def test_one_row_has_no_standard_error_and_is_refused(
    folder: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["zeroshot", str(tiny_model_dir), "--tasks-dir", str(folder)]
    assert main([*words, "--limit", "1"]) == 2
    assert "--limit: expected at least 2, got 1" in capsys.readouterr().err
    pytest.importorskip("lm_eval", reason=zeroshot.INSTALL)
    assert main([*words, "--tasks", "piqa:1"]) == 2
    assert "--tasks piqa: 1 rows; a standard error takes 2" in capsys.readouterr().err


def nats(model: Any, tokenizer: Any, context: str, continuation: str) -> tuple[float, bool]:
    """log p(continuation | context), and whether every token of it is the most likely one."""
    whole = tokenizer(context + continuation)["input_ids"]
    known = len(tokenizer(context)["input_ids"])
    with torch.no_grad():
        log_p_TV = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    picked = [log_p_TV[t - 1, whole[t]].item() for t in range(known, len(whole))]
    greedy = all(int(log_p_TV[t - 1].argmax()) == whole[t] for t in range(known, len(whole)))
    return sum(picked), greedy


def test_scores_are_those_of_the_models_own_logits(
    folder: Path, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval", reason=zeroshot.INSTALL)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    words = ["zeroshot", str(tiny_model_dir), "--tasks-dir", str(folder), "--json", "--batch-size", "3"]
    out = tmp_path / "scores.json"
    assert main([*words, "--tasks", "piqa", "hellaswag", "lambada_openai", "--out", str(out)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads(out.read_text()) and found["tasks"].keys() == {"piqa", "hellaswag", "lambada_openai"}
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)

    for task, rows in (("piqa", ROWS), ("hellaswag", rows_of("hellaswag", folder))):
        right, right_norm = 0, 0
        for row in rows:
            context = f"{row['query'].strip()}\nAnswer:" if task == "piqa" else row["query"]
            sums = [nats(model, tokenizer, context, f" {choice}")[0] for choice in row["choices"]]
            per_letter = [value / len(choice) for value, choice in zip(sums, row["choices"], strict=True)]
            right += sums.index(max(sums)) == row["gold"]
            right_norm += per_letter.index(max(per_letter)) == row["gold"]
        assert found["tasks"][task]["acc"] == pytest.approx(right / len(rows))
        assert found["tasks"][task]["acc_norm"] == pytest.approx(right_norm / len(rows))
        assert found["tasks"][task]["rows"] == len(rows)

    last = [nats(model, tokenizer, *(lambda a, b: (a, f" {b}"))(*row["text"].rsplit(" ", 1))) for row in WORDS]
    assert found["tasks"]["lambada_openai"]["acc"] == sum(greedy for _, greedy in last) / 2
    perplexity = math.exp(-sum(value for value, _ in last) / 2)
    assert found["tasks"]["lambada_openai"]["perplexity"] == pytest.approx(perplexity, rel=FLOAT32 * 10)


@pytest.mark.parametrize("batch_size", [1, 4, 32])
@pytest.mark.parametrize("kv", [None, 8])
def test_a_context_read_once_gives_each_continuation_the_score_of_a_row_of_its_own(
    tiny_model_dir: Path, kv: int | None, batch_size: int
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()
    if kv is not None:
        round_kv(model, kv)
    pairs = [
        ([7, 8, 9], [1]),
        ([5], [6, 7]),  # one token: nothing to keep
        ([7, 8, 9], [1, 2, 3, 4]),
        ([7, 8, 10], [11, 12]),  # as long, other tokens
        ([7, 8, 10], [1, 2, 3]),
        ([7, 8, 9], [1]),  # again
        ([5], [9]),
        ([9, 8, 7, 6], [5]),
        *(([20, 21, 22, 23, 24], [token, token]) for token in range(7)),
    ]
    found = zeroshot_here.scores(model, pairs, batch_size)
    for (context, continuation), (value, greedy) in zip(pairs, found, strict=True):
        ids = torch.tensor([[*context, *continuation]])
        with torch.no_grad():
            log_p_TV = model(ids).logits[0, len(context) - 1 : -1].log_softmax(1)
        each = log_p_TV.gather(1, ids[0, len(context) :, None])[:, 0]
        assert value == pytest.approx(each.sum().item(), abs=FLOAT32)
        assert greedy == (log_p_TV.argmax(1) == ids[0, len(context) :]).all()


def test_batches_hold_contexts_of_one_length_and_no_more_continuations_than_asked_for() -> None:
    pairs = [([1] * length, [2] * more) for length in (3, 1, 3, 2) for more in range(1, 6)]
    pairs += [([1, place], [2]) for place in range(9)]
    found = zeroshot_here.batches(pairs, 4)
    assert sorted(place for places in found for place in places) == list(range(len(pairs)))
    for places in found:
        assert len(places) <= 4
        contexts = [tuple(pairs[place][0]) for place in places]
        assert len({len(context) for context in contexts}) == 1 and len(set(Counter(contexts).values())) == 1
        assert contexts == sorted(contexts, key=contexts.index)  # one context's stand side by side


@pytest.fixture
def llamacpp(tiny_model_dir: Path, tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A fused checkpoint, and the address of llama.cpp's server with its GGUF file."""
    pytest.importorskip("xllamacpp", reason="pip install 'lrqat[llamacpp]'")
    from exporters import gguf
    from lrqat.fused import FusedCheckpoint
    from serve.running import start

    assert main(["ptq", str(tiny_model_dir), "--grid", "w4g32", "--out", str(tmp_path / "run")]) == 0
    exported = gguf.write(FusedCheckpoint.load(tmp_path / "run"), tmp_path / "tiny.gguf")
    with start(exported, threads=1, ctx=256) as running:
        yield tmp_path / "run", running.url


def test_llamacpp_scores_a_forced_continuation_as_its_own_listed_probabilities(llamacpp: tuple[Path, str]) -> None:
    address = llamacpp[1]
    name = call(address, "/v1/models")["data"][0]["id"]
    everything = {"model": name, "max_tokens": 1, "temperature": 0, "logprobs": 448, "cache_prompt": False}

    def listed(context: list[int], continuation: list[int]) -> tuple[float, bool]:
        nats, greedy = 0.0, True
        for place, wanted in enumerate(continuation):
            request = {**everything, "prompt": context + continuation[:place]}
            [said] = call(address, "/v1/completions", request)["choices"][0]["logprobs"]["content"]
            nats += next(entry["logprob"] for entry in said["top_logprobs"] if entry["id"] == wanted)
            greedy &= said["id"] == wanted
        return nats, greedy

    first = call(address, "/v1/completions", {**everything, "prompt": [7, 8, 9]})
    likeliest, second = first["choices"][0]["logprobs"]["content"][0]["top_logprobs"][:2]
    assert likeliest["logprob"] - second["logprob"] > 2 * BATCHED  # else which of them is greedy depends on the batch
    pairs = [([7, 8, 9], [likeliest["id"]]), ([5, 6, 7], [8, 9]), ([5, 6, 7], [8, 10, 11]), ([300], [2, 2])]
    found = zeroshot_server.all_forced(address, name, pairs, 4)
    expected = [listed(*pair) for pair in pairs]
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected] and found[0][1]
    assert [nats for nats, _ in found] == pytest.approx([nats for nats, _ in expected], abs=BATCHED)


def test_the_end_is_scored_where_both_are_longer_than_the_context() -> None:
    assert zeroshot.cut([1, 2, 3], [4, 5], 4) == ([2, 3], [4, 5])
    assert zeroshot.cut([1, 2, 3], [4, 5], 9) == ([1, 2, 3], [4, 5])


def test_llamacpp_gives_the_tasks_the_scores_of_the_model_that_was_trained(
    folder: Path, llamacpp: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval", reason=zeroshot.INSTALL)
    words = ["zeroshot", str(llamacpp[0]), "--tasks-dir", str(folder), "--json", "--tasks", "piqa", "lambada_openai"]
    capsys.readouterr()
    results = []
    for more in ([], ["--server", llamacpp[1]]):
        assert main([*words, *more]) == 0
        results.append(json.loads(capsys.readouterr().out)["tasks"])
    here, there = results
    assert there["piqa"]["acc"] == here["piqa"]["acc"] and there["piqa"]["rows"] == len(ROWS)
    assert there["lambada_openai"]["acc"] == here["lambada_openai"]["acc"]
    assert there["lambada_openai"]["perplexity"] == pytest.approx(here["lambada_openai"]["perplexity"], rel=INT8)


def test_a_server_that_keeps_the_probabilities_to_itself_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zeroshot_server, "call", lambda url, path, body: {"choices": [{"text": " a"}]})
    with pytest.raises(LrqatError, match=r"^http://x: does not give the log-probabilities [^\n]*$"):
        zeroshot_server.check_echo("http://x", "x")
    with pytest.raises(LrqatError, match=r"^http://x: expected token 3 and its log-probability, got [^\n]*$"):
        zeroshot_server.forced("http://x", "x", [1, 2], [3])
