"""benchmarks/quality: rows are run once, resumed where they were stopped, scored alike, and told in one table.

Slow are the tests that run rows: a dozen child processes.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from benchmarks.quality import plan, rows, table
from benchmarks.quality.__main__ import main
from benchmarks.quality.children import Children
from benchmarks.quality.plots import apart
from lrqat.errors import LrqatError
from lrqat.evaluate import evaluate_files
from lrqat.jsonfile import read_json, write_json
from lrqat.ptq import CALIBRATION_SEED
from lrqat.trainer import read_metrics

STEPS = 60
PLAN: dict[str, Any] = {
    "grids": ["w3g32"],
    "train": {"steps": STEPS, "batch_size": 1, "seq_len": 32, "save_every": 20, "rank": 4},
    "rows": [{"name": "rtn", "ptq": {"range_p": 2}}, {"name": "lrqat", "train": {"method": "lrqat"}}],
}
COST = {"seconds": 60.0, "cpu_seconds": 90.0, "peak_memory_gb": 1.5}
MACHINE = {"processor": "A", "gflops": 54.6}
PEER = {"tool": "other", "version": "1", "method": "m", "grid": "q3", "settings": "s", "bits_per_weight": 3.4}
PEER |= {"megabytes": 1.0, **COST, "machine": MACHINE}
SIZE = ["--blocks", "2", "--seq-len", "32"]


class Bench:
    """A directory of results on the tiny model, and the commands that fill it."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.out = folder / "out"
        self.model = model
        self.plan = folder / "plan.yaml"
        self.data, self.valid, self.test = (folder / f"{name}.txt" for name in ("data", "valid", "test"))
        for number, path in enumerate((self.data, self.valid, self.test)):
            path.write_text(
                "".join(f"The {i}th row says that {i} and {i % 7} are numbers.\n" for i in range(number, 200))
            )
        self.write(PLAN)

    def write(self, content: dict[str, Any]) -> None:
        self.plan.write_text(yaml.safe_dump(content))

    def run(self, *more: str) -> int:
        words = ["run", str(self.plan), "--model", str(self.model), "--data", str(self.data), "--out", str(self.out)]
        return main([*words, "--valid", str(self.valid), *SIZE, "--threads", "1", *more])

    def folder(self, label: str) -> Path:
        return self.out / "rows" / label

    def result(self, label: str) -> dict[str, Any]:
        return read_json(self.folder(label) / "result.json")

    def run_and_stop_after(self, metrics: Path) -> int:
        """`run`, with a SIGTERM as soon as a step of a row was logged."""
        done = threading.Event()

        def stop() -> None:
            while not done.is_set() and not read_metrics(metrics):
                time.sleep(0.01)
            if not done.is_set():
                os.kill(os.getpid(), signal.SIGTERM)

        watcher = threading.Thread(target=stop)
        watcher.start()
        try:
            return self.run()
        finally:
            done.set()
            watcher.join()


@pytest.fixture(scope="module")
def bench(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Stopped in training, and finished."""
    found = Bench(tmp_path_factory.mktemp("quality"), tiny_model_dir)
    row = found.folder("w3g32-lrqat-s0")
    assert found.run_and_stop_after(row / "run" / "metrics.jsonl") == 130
    assert not (row / "result.json").exists() and (row / "run" / "checkpoints").is_dir()
    assert 1 <= len(read_metrics(row / "run" / "metrics.jsonl")) < STEPS
    assert found.run() == 0
    return found


@pytest.fixture
def copy(bench: Bench, tmp_path: Path) -> Bench:
    """The same, to be changed."""
    shutil.copytree(bench.out, tmp_path / "out")
    found = Bench(tmp_path, bench.model)
    assert found.data.read_bytes() == bench.data.read_bytes()
    return found


@pytest.mark.slow
def test_a_stopped_row_goes_on_and_costs_what_all_its_attempts_took(bench: Bench) -> None:
    folder = bench.folder("w3g32-lrqat-s0")
    attempts = read_json(folder / "row.json")["attempts"]
    assert len(attempts) == 2 and "--resume" in (folder / "log.txt").read_text()
    result = bench.result("w3g32-lrqat-s0")
    assert result["cpu_seconds"] == sum(a["cpu_seconds"] for a in attempts) > 0
    assert result["core_minutes"] == result["cpu_seconds"] / 60 and not result["cost_is_a_lower_bound"]
    assert 0.1 < result["peak_memory_gb"] == max(a["peak_memory_gb"] for a in attempts) < 4
    assert [m["step"] for m in read_metrics(folder / "run" / "metrics.jsonl")] == list(range(1, STEPS + 1))
    assert not (folder / "run" / "checkpoints").exists()
    assert 0 < result["codes_moved"] < 1 and result["bits_per_weight"] == 3.5
    stored = sum(file.stat().st_size for file in (folder / "run" / "fused").glob("*.safetensors"))
    assert 0.5 < result["megabytes"] * 1e6 / stored < 1  # the file has a byte a code


@pytest.mark.slow
def test_bits_are_of_the_layers_alone(copy: Bench) -> None:
    copy.write({**PLAN, "rows": [{"name": "head", "ptq": {"override": ["embed_tokens=w8g32"]}}]})
    assert copy.run() == 0
    found, plain = copy.result("w3g32-head"), copy.result("w3g32-rtn")
    assert found["bits_per_weight"] == plain["bits_per_weight"] == 3.5 and found["megabytes"] < plain["megabytes"]


@pytest.mark.slow
def test_scores_are_those_of_lrqat_eval(bench: Bench) -> None:
    found = bench.result("w3g32-rtn")["valid"]
    text = [str(bench.valid)]
    run = str(bench.folder("w3g32-rtn") / "run")
    direct = evaluate_files(run, str(bench.model), text, 32, 2, "float32").to_dict()
    assert found["kl"] == pytest.approx(direct["kl"], rel=1e-4) and found["kl"] > 1e-4  # threads sum in other orders
    assert {**found, "kl": 0, "perplexity": 0, "word_perplexity": 0}.items() >= {
        **direct, "kl": 0, "perplexity": 0, "word_perplexity": 0
    }.items()  # fmt: skip
    assert found["perplexity"] == pytest.approx(direct["perplexity"], rel=1e-5)
    reference = bench.result("reference")
    assert reference["valid"]["kl"] == 0 and reference["grid"] == "fp32" and reference["bits_per_weight"] == 32


@pytest.mark.slow
def test_finished_rows_are_not_run_again(bench: Bench) -> None:
    before = {path: path.stat().st_mtime_ns for path in bench.out.glob("rows/*/*")}
    assert bench.run() == 0
    assert before == {path: path.stat().st_mtime_ns for path in bench.out.glob("rows/*/*")}
    assert any(path.name == "log.txt" for path in before)


@pytest.mark.slow
def test_a_changed_setting_runs_that_row_again_and_no_other(copy: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    before = {label: copy.result(label) for label in ("w3g32-rtn", "w3g32-lrqat-s0")}
    copy.write({**PLAN, "rows": [{"name": "rtn", "ptq": {"range_p": 0}}, PLAN["rows"][1]]})
    assert copy.run() == 0
    assert "w3g32-rtn: range_p was 2, is 0; runs again" in capsys.readouterr().err
    assert copy.result("w3g32-lrqat-s0") == before["w3g32-lrqat-s0"]
    assert copy.result("w3g32-rtn")["settings"]["range_p"] == 0
    assert copy.result("w3g32-rtn")["valid"]["kl"] != before["w3g32-rtn"]["valid"]["kl"]


@pytest.mark.slow
def test_the_test_text_is_scored_once(copy: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["test", "--test", str(copy.test), "--out", str(copy.out), "--only", "rtn", "--threads", "1"]
    assert main([*words, *SIZE]) == 0
    found = copy.result("w3g32-rtn")
    assert found["test"]["text"] == "test.txt" and found["test"]["kl"] != found["valid"]["kl"] > 0
    assert "test" not in copy.result("w3g32-lrqat-s0")
    stamp = (copy.folder("w3g32-rtn") / "result.json").stat().st_mtime_ns
    assert main([*words, *SIZE]) == 0
    assert (copy.folder("w3g32-rtn") / "result.json").stat().st_mtime_ns == stamp
    capsys.readouterr()
    assert main([*words, "--blocks", "1", "--seq-len", "32"]) == 2
    assert "scored once" in capsys.readouterr().err


@pytest.mark.slow
def test_a_row_is_not_tested_again_under_other_settings(copy: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["test", "--test", str(copy.test), *SIZE, "--threads", "1", "--out", str(copy.out), "--only", "rtn"]
    assert main(words) == 0
    changed = copy.result("w3g32-rtn")
    del changed["test"]
    changed["settings"]["range_p"] = 4
    write_json(copy.folder("w3g32-rtn") / "result.json", changed)
    assert main(words) == 2 and "under other settings" in capsys.readouterr().err
    for only, told in (("no such row", "none of 2 finished rows"), ("w3-(", "no regular expression")):
        assert main([*words[:-1], only]) == 2 and told in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("what", ["model", "data"])
def test_results_of_another_model_or_text_are_not_dropped(
    copy: Bench, what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if what == "data":
        copy.data.write_text("something else")
    else:
        copy.model = tmp_path / "other"
        copy.model.mkdir()
        (copy.model / "model.safetensors").write_bytes(b"another")
    assert copy.run() == 2
    assert f"holds results of another --{what}" in capsys.readouterr().err
    assert copy.result("w3g32-rtn")["valid"]["kl"] > 0


@pytest.mark.slow
def test_two_benchmarks_do_not_work_in_one_directory(copy: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    with rows.locked(copy.out):
        assert copy.run() == 2
    assert "another benchmark" in capsys.readouterr().err


@pytest.mark.slow
def test_a_peer_costs_what_its_account_says(copy: Bench) -> None:
    peer = copy.out / "peers" / "other"
    shutil.copytree(copy.model, peer / "model")
    write_json(peer / "cost.json", PEER)
    copy.write({"rows": [{"name": "Q3", "grid": "w3g32", "peer": "peers/other"}]})
    (row,) = plan.read(copy.plan, copy.out)
    with rows.Bench.open(copy.out) as opened, Children(1, opened.lock) as children:
        rows.obtain(opened, row, children)
    result = copy.result("w3g32-Q3")
    assert {key: result[key] for key in (*COST, "core_minutes", "tool")} == {
        **COST,
        "core_minutes": 1.5,
        "tool": "other",
    }
    assert result["source"] == "peers/other/model" and result["settings"]["grid"] == "q3"
    assert result["machines"] == [MACHINE]


@pytest.mark.slow
def test_the_table_has_means_over_seeds_and_the_plots_are_written(
    copy: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    from matplotlib.image import imread

    first = copy.result("w3g32-lrqat-s0")
    second = json.loads(json.dumps(first))
    second["seed"] = second["settings"]["seed"] = 1
    second["valid"]["kl"] += 0.5
    copy.folder("w3g32-lrqat-s1").mkdir()
    write_json(copy.folder("w3g32-lrqat-s1") / "result.json", second)
    assert main(["table", "--out", str(copy.out)]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "benchmark": "quality",
        "path": str(copy.out / "quality.json"),
        "rows": 3,
    }
    found = read_json(copy.out / "quality.json")
    assert next(row["name"] for row in found["rows"]) == "fp32" and found["sorted_by"] == "valid"
    line = next(row for row in found["rows"] if row["name"] == "lrqat")
    kl = first["valid"]["kl"]
    assert line["seeds"] == [0, 1] and line["test"] is None
    assert line["valid"]["kl"] == {"mean": pytest.approx(kl + 0.25), "low": kl, "high": kl + 0.5, "runs": 2}
    text = (copy.out / "quality.md").read_text()
    assert f"| {kl + 0.25:.4f} ({kl:.4f} to {kl + 0.5:.4f}) |" in text and "| w3g32 | rtn | lrqat" in text
    for name in ("kl-minutes.png", "kl-bits.png"):
        image = imread(copy.out / name)
        assert min(image.shape[:2]) > 300 and image.std() > 0.01


@pytest.mark.slow
def test_zero_shot_accuracies_are_asked_once_of_the_chosen_rows_and_the_full_precision_model(
    copy: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval")
    tasks = copy.out.parent / "tasks"
    tasks.mkdir()
    asked = {"query": "Question: Which is a number?", "choices": ["seven", "a house"], "gold": 0}
    for name in ("piqa", "arc_easy", "hellaswag"):
        (tasks / f"{name}.jsonl").write_text("".join(json.dumps({**asked, "gold": i % 2}) + "\n" for i in range(4)))
    (tasks / "lambada_openai.jsonl").write_text((json.dumps({"text": "numbers and numbers"}) + "\n") * 4)
    words = ["zeroshot", "--tasks-dir", str(tasks), "--limit", "3", "--only", "rtn", "--out", str(copy.out)]
    assert main(words) == 0
    found = copy.result("w3g32-rtn")["zeroshot"]
    assert found["tasks"]["piqa"]["rows"] == 3 and 0 <= found["average"]["acc"] <= 1
    assert "zeroshot" in copy.result("reference") and "zeroshot" not in copy.result("w3g32-lrqat-s0")
    times = [(copy.folder(label) / "log.txt").stat().st_mtime_ns for label in ("w3g32-rtn", "reference")]
    assert main(words) == 0
    assert times == [(copy.folder(label) / "log.txt").stat().st_mtime_ns for label in ("w3g32-rtn", "reference")]
    table.write(copy.out)
    text = (copy.out / "quality.md").read_text()
    assert f"| {found['average']['acc']:.4f} ± {found['average']['acc_stderr']:.4f} |" in text
    assert "piqa (3), arc_easy (3), hellaswag (3), lambada_openai (3)" in text
    assert main([*words[:3], "--out", str(copy.out)]) == 2  # all rows of the tasks, beside 3 of each
    assert "limit 3" in capsys.readouterr().err


@pytest.mark.slow
def test_seeds_under_different_settings_are_not_averaged(copy: Bench) -> None:
    other = copy.result("w3g32-lrqat-s0")
    other["seed"], other["settings"]["rank"] = 1, 8
    copy.folder("w3g32-lrqat-s1").mkdir()
    write_json(copy.folder("w3g32-lrqat-s1") / "result.json", other)
    table.write(copy.out)
    found = [row for row in read_json(copy.out / "quality.json")["rows"] if row["name"] == "lrqat"]
    assert [row["seeds"] for row in found] in ([[0], [1]], [[1], [0]])


@pytest.mark.slow
def test_figures_on_different_texts_are_no_table(copy: Bench) -> None:
    other = copy.result("w3g32-rtn")
    other["valid"]["blocks"] = 3
    write_json(copy.folder("w3g32-rtn") / "result.json", other)
    with pytest.raises(LrqatError, match="different valid text"):
        table.write(copy.out)


@pytest.mark.slow
def test_a_row_that_fails_is_told_and_the_others_go_on(copy: Bench) -> None:
    done: list[int] = []

    def fail() -> None:
        raise LrqatError("no")

    with rows.locked(copy.out) as lock, Children(1, lock) as children:
        found = rows.in_turn({"bad": fail, "good": lambda: done.append(1)}, 1, children)
    assert found.failed == {"bad": "no"} and found.finished == 1 and done == [1]


def test_a_row_of_several_grids_is_shown_beside_a_name(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    flags = {"grid": "q5_0", "override": ["down_proj=q4_k"]}
    path.write_text(yaml.safe_dump({"rows": [{"name": "a", "grid": "q4_k_m", "ptq": flags}]}))
    (row,) = plan.read(path, tmp_path)
    plan.check([row], [])
    assert row.label == "q4_k_m-a" and row.recipe([]) == flags


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": [{"name": "a", "train": {"stepz": 3}}]}, "unrecognized arguments: --stepz"),
        (
            {"rows": [{"name": "a", "train": {"method": "scales", "rank": 3}}]},
            "w3g32-a-s0: rank: method scales has none",
        ),
        ({"rows": [{"name": "a", "grid": "x9", "ptq": {}}]}, "x9"),
        ({"rows": [{"name": "a", "ptq": {"grid": "x9"}}]}, "x9"),
        ({"rows": [{"name": "a", "ptq": {"like": "x.gguf"}}]}, "like is not for a row"),
        ({"rows": [{"name": "a", "ptq": {}, "seeds": [1]}]}, "seeds"),
        ({"rows": [{"name": "a", "ptq": {}, "train": {}}]}, "one of peer, train and ptq"),
        ({"rows": [{"name": "a", "ptq": {"out": "x"}}]}, "out is not for a row"),
        ({"rows": [{"name": "a", "peer": "nowhere"}]}, "no cost.json"),
        ({"rows": [{"name": "a", "ptq": {}}, {"name": "a", "ptq": {}}]}, "there twice"),
        ({"rows": [{"name": "a", "ptq": {}}], "step": 3}, "unknown key step"),
        ({"rows": []}, "rows: expected"),
    ],
)
def test_a_plan_that_cannot_be_run_is_one_line_and_nothing_is_made(
    tmp_path: Path, tiny_model_dir: Path, change: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = Bench(tmp_path, tiny_model_dir)
    bench.write({**PLAN, **change})
    assert bench.run() == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and message in errors[0]
    assert not bench.out.exists()


def test_the_plan_that_comes_with_it_is_sound() -> None:
    path = Path(__file__).resolve().parent.parent / "benchmarks" / "quality.yaml"
    found = plan.read(path, Path("."))
    plan.check(found, ["text.txt"])
    assert len(found) == 45 and len({row.label for row in found}) == 45
    trained = {row.grid for row in found if row.name == "lrqat rotated"}
    assert trained == {row.grid for row in found if row.name == "rtn"}


def test_the_plan_of_the_claim_has_three_seeds_of_each_method() -> None:
    found = plan.read(Path(__file__).resolve().parent.parent / "benchmarks" / "claim.yaml", Path("."))
    plan.check(found, ["text.txt"])
    seeds: dict[str, set[int | None]] = {}
    for row in found:
        seeds.setdefault(row.name.split()[0], set()).add(row.seed)
    assert seeds == {"scales": {0, 1, 2}, "lrqat": {0, 1, 2}, "lsq": {0, 1, 2}}


def test_peers_are_calibrated_on_the_tokens_that_lrqat_is(tiny_model_dir: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from benchmarks.peers import shared
    from lrqat.data import blocks, draw

    rows = [f"Row {i} is one of many rows.\nIts number is {i * i}." for i in range(40)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    (tmp_path / "b.txt").write_text("\n\n".join(f"Line {i}\nof a book." for i in range(60)))
    files = [tmp_path / "a.jsonl", tmp_path / "b.txt"]
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    ours = draw(blocks([str(file) for file in files], tokenizer, 24), 8, CALIBRATION_SEED)
    assert torch.equal(shared.blocks(tokenizer, files, 8, 24), ours)


def test_labels_are_moved_apart_and_keep_their_order() -> None:
    found = apart([0.5, 0.49, 0.48, 0.0], 0.05)
    assert found == pytest.approx([0.5, 0.45, 0.4, 0.0])
    assert apart([0.02, 0.01], 0.05) == pytest.approx([0.05, 0.0])


def test_a_table_of_rows_from_several_machines_says_which_is_whose() -> None:
    scores = {"kl": 0.1, "perplexity": 20.0, "word_perplexity": 50.0, "top1": 0.9}
    shared = {"grid": "w3", "tool": "lrqat", "version": "0", "method": "rtn", "bits_per_weight": 3.0, "settings": {}}
    shared |= {"megabytes": 70.2, "seed": None, "valid": scores, "core_minutes": 2.0, "peak_memory_gb": 1.0}
    slow, fast = ({"processor": name, "gflops": speed} for name, speed in (("A", 54.6), ("B", 120.0)))
    text = {"text": "x", "sha256": "", "seq_len": 8, "blocks": 1}

    def written(*machines: dict[str, Any]) -> str:
        results = [{**shared, "name": str(place), "machines": [one]} for place, one in enumerate(machines)]
        found = {"model": "m", "valid": text, "test": None, "zeroshot": None, **table.lines(results)}
        return table.markdown(found)

    assert "of one thread of A at 55 GFLOP/s" in written(slow) and "| of |" not in written(slow)
    assert "of one thread of A at 55 to 60 GFLOP/s" in written(slow, {**slow, "gflops": 60.0})
    assert "(a) A at 30 GFLOP/s; (b) A at 55 GFLOP/s" in written(slow, {**slow, "gflops": 30.0})
    both = written(slow, fast)
    assert "(a) A at 55 GFLOP/s; (b) B at 120 GFLOP/s" in both
    assert "| 3.00 | 70 | 1 |" in both and "| 2 | a | 1.00 |" in both and "| 2 | b | 1.00 |" in both
