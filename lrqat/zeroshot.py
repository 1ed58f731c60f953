"""Zero-shot tasks through lm-eval, on local files: of a model here, or of an exported one through its server.

    PIQA, ARC-easy      piqa.jsonl, arc_easy.jsonl      {"query": "Question: ...", "choices": [...], "gold": 0}
    HellaSwag           hellaswag.jsonl (the same), or hellaswag_val_full.txt[.bz2]: six lines an item, context,
                        gold and four endings
    LAMBADA             lambada_openai.jsonl            {"text": ...}, of which the last word is asked for

The files are those of mosaicml/llm-foundry (scripts/eval/local_data), klosax/hellaswag_text_data and EleutherAI's
lambada_openai; prompts, choices and metrics are those of lm-eval's tasks of the same names. Nothing is downloaded.

`lrqat.zeroshot_here` scores the fake-quant model, rounding beside its weights what its training did; what a server is
asked, `lrqat.zeroshot_server` says.
"""

from __future__ import annotations

import bz2
import contextlib
import json
import logging
import math
import re
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lrqat.errors import LrqatError

Score = tuple[float, bool]  # nats of a continuation; whether each of its tokens is the likeliest
Pair = tuple[Sequence[int], Sequence[int]]  # context and continuation

CHOICES = {
    "output_type": "multiple_choice",
    "doc_to_target": "gold",
    "doc_to_choice": "choices",
    "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")],
}
LAST_WORD = {
    "output_type": "loglikelihood",
    "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
    "doc_to_target": "{{' '+text.split(' ')[-1]}}",
    "metric_list": [
        {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
    ],
}
ASKED = {**CHOICES, "doc_to_text": "{{query.strip()}}\nAnswer:"}
TASKS: dict[str, dict[str, Any]] = {
    "piqa": ASKED,
    "arc_easy": ASKED,
    "hellaswag": {**CHOICES, "doc_to_text": "{{query}}"},
    "lambada_openai": LAST_WORD,
}
MAIN = {"piqa": "acc", "arc_easy": "acc", "hellaswag": "acc_norm", "lambada_openai": "acc"}  # what is averaged
FILES = {"hellaswag": ("hellaswag.jsonl", "hellaswag_val_full.txt", "hellaswag_val_full.txt.bz2")}
HELLASWAG_LINES = 6
FRAGMENT = re.compile(r"(?<=[.!?] )[a-z][^.!?]*$")  # of a sentence, at the end
INSTALL = "pip install 'lrqat[lm-eval]'"
BOOTSTRAP = 1000  # of perplexity's standard error; accuracies have theirs in closed form


def parse_tasks(texts: Sequence[str]) -> dict[str, int | None]:
    """["piqa", "hellaswag:1000"] -> {"piqa": None, "hellaswag": 1000}: all rows, or the first so many."""
    found: dict[str, int | None] = {}
    for text in texts:
        name, _, first = text.partition(":")
        if name not in TASKS or (first and not (first.isdecimal() and int(first) > 0)) or name in found:
            raise LrqatError(f"--tasks {text}: expected each of {', '.join(TASKS)} at most once, or NAME:FIRST")
        found[name] = int(first) if first else None
    return found


def rows_of(task: str, folder: Path, first: int | None = None) -> list[dict[str, Any]]:
    """A task's rows from the user's folder.

    Raises:
        LrqatError: no such file, or rows that are none of this task.
    """
    names = FILES.get(task, (f"{task}.jsonl",))
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        raise LrqatError(f"{folder}: no {' or '.join(names)}, which task {task} reads; name another --tasks-dir")
    rows = six_lines(path) if ".txt" in path.suffixes else json_lines(path)
    wanted = {"text": str} if task == "lambada_openai" else {"query": str, "choices": list, "gold": int}
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or any(not isinstance(row.get(key), kind) for key, kind in wanted.items()):
            raise LrqatError(f"{path}: row {number} is none of task {task}, which have {', '.join(wanted)}")
    return [{key: row[key] for key in wanted} for row in rows[:first]]


def json_lines(path: Path) -> list[Any]:
    """Every line's JSON."""
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise LrqatError(f"{path}:{number}: not JSON ({error})") from None
    return rows


def six_lines(path: Path) -> list[dict[str, Any]]:
    """HellaSwag as text: context, gold, four endings."""
    try:
        content = bz2.decompress(path.read_bytes()) if path.suffix == ".bz2" else path.read_bytes()
        lines = content.decode("utf-8").strip("\n").split("\n")
        items = [lines[start : start + HELLASWAG_LINES] for start in range(0, len(lines), HELLASWAG_LINES)]
        return [{"query": capitalized(query), "choices": ends, "gold": int(gold)} for query, gold, *ends in items]
    except (OSError, ValueError) as error:
        raise LrqatError(f"{path}: expected {HELLASWAG_LINES} lines an item ({error})") from None


def capitalized(query: str) -> str:
    """ "... on a roof. he" -> "... on a roof. He", as lm-eval's hellaswag does with what the endings go on from."""
    return FRAGMENT.sub(lambda found: found[0].capitalize(), query)


def make_tasks(wanted: Mapping[str, int | None], folder: Path) -> list[Any]:
    """lm-eval's task objects."""
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    made = []
    for name, first in wanted.items():
        rows = rows_of(name, folder, first)
        if len(rows) < 2:
            raise LrqatError(f"--tasks {name}: {len(rows)} rows; a standard error takes 2")
        content = partial(_splits, Dataset.from_list(rows))
        config = {**TASKS[name], "task": name, "test_split": "test", "custom_dataset": content, "num_fewshot": 0}
        made.append(ConfigurableTask(config=config))
    return made


def _splits(dataset: Any, **_: Any) -> dict[str, Any]:
    return {"test": dataset}


def cut(context: Sequence[int], continuation: Sequence[int], length: int) -> Pair:
    """At most `length` tokens of both, the context's first ones being left out."""
    return context[max(0, len(context) + len(continuation) - length) :], continuation


def check_installed() -> None:
    """Refuse in one line where lm-eval is missing."""
    try:
        import lm_eval  # noqa: F401

        logging.getLogger("lm_eval").setLevel(logging.ERROR)  # of its warnings none is about what is done here
    except ImportError:
        raise LrqatError(f"zeroshot: needs lm-eval; {INSTALL}") from None


def measure(model: Any, tasks: list[Any], limit: int | None) -> dict[str, Any]:
    """{task: {rows, metric, metric's standard error, ...}} and the mean of the main accuracies."""
    from lm_eval.evaluator import evaluate

    named = {task.config.task: task for task in tasks}
    with contextlib.redirect_stdout(sys.stderr):  # it prints progress; results alone go to stdout
        found = evaluate(model, named, limit=limit, bootstrap_iters=BOOTSTRAP, log_samples=False)
    table: dict[str, Any] = {}
    for task in tasks:
        name = task.config.task
        scores = found["results"][name]
        row = {"rows": found["n-samples"][name]["effective"]}
        for key, value in scores.items():
            metric, _, rest = key.partition(",")
            if rest == "none" and isinstance(value, int | float):
                row[metric] = float(value)
        table[name] = row
    return table


def average(table: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The mean of the tasks' main accuracies, with the standard error of independent tasks: sqrt(sum e^2) / n."""
    values = [row[MAIN[name]] for name, row in table.items()]
    errors = [row[f"{MAIN[name]}_stderr"] for name, row in table.items()]
    return {
        "acc": sum(values) / len(values),
        "acc_stderr": math.sqrt(sum(error * error for error in errors)) / len(errors),
    }


def as_text(table: Mapping[str, Mapping[str, float]], mean: Mapping[str, float]) -> str:
    """The table for a terminal."""
    lines = [f"{'task':16}{'rows':>7}{'acc':>17}{'acc_norm':>17}{'perplexity':>12}"]

    def cell(row: Mapping[str, float], metric: str) -> str:
        return f"{row[metric]:.4f} ± {row[f'{metric}_stderr']:.4f}" if metric in row else ""

    for name, row in table.items():
        perplexity = f"{row['perplexity']:.2f}" if "perplexity" in row else ""
        lines.append(f"{name:16}{row['rows']:>7}{cell(row, 'acc'):>17}{cell(row, 'acc_norm'):>17}{perplexity:>12}")
    which = ", ".join(f"{MAIN[name]} of {name}" for name in table)
    lines.append(f"{'average':16}{'':7}{cell(mean, 'acc'):>17}  ({which})")
    return "\n".join(lines)
