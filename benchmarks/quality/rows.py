"""Do the rows of a plan: each command as a user would give it, one or more at a time, resumed where it was stopped.

What a row costs is what its process has used (`children`), summed over the attempts that it went on from. Scoring comes
after and is not counted.

A row whose settings have changed is run again, and its old result dropped: the plan is what its author wants, and a
refusal would stop a night's work. Another model or other training text would drop every row: that is refused.
The version of lrqat is written down, not compared: remove a row's directory to have it run again.
"""

from __future__ import annotations

import fcntl
import math
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import yaml

import lrqat
from benchmarks.peers.shared import machine
from benchmarks.quality.children import Children, Stopped
from benchmarks.quality.plan import SPENT, Row, chosen
from lrqat.console import log
from lrqat.errors import LrqatError
from lrqat.fused import FusedCheckpoint, SafetensorsDirectory
from lrqat.hashing import sha256
from lrqat.jsonfile import read_json, write_json

REFERENCE = "reference"  # label of the full-precision model


@dataclass(frozen=True)
class Text:
    """A text that models are scored on: the first `blocks` of `seq_len` tokens."""

    kind: str  # valid or test
    path: Path
    identity: dict[str, Any]

    @classmethod
    def make(cls, kind: str, path: Path, seq_len: int, blocks: int) -> Text:
        """Refuses a file that is not there, and no blocks."""
        if seq_len < 2 or blocks < 1:
            raise LrqatError(f"--blocks, --seq-len: expected at least 1 of at least 2, got {blocks} of {seq_len}")
        if not path.is_file():
            raise LrqatError(f"--{kind} {path}: no such file")
        return cls(kind, path, {"text": path.name, "sha256": sha256([path]), "seq_len": seq_len, "blocks": blocks})

    def is_of(self, figures: Mapping[str, Any] | None) -> bool:
        """The figures are of this text."""
        return figures is not None and all(figures.get(key) == value for key, value in self.identity.items())


@dataclass(frozen=True)
class Hands:
    """Rows at a time, and CPU threads of each."""

    jobs: int
    threads: int

    def __post_init__(self) -> None:
        if self.jobs < 1 or self.threads < 1:
            raise LrqatError(f"--jobs, --threads: expected at least 1, got {self.jobs} and {self.threads}")


@dataclass
class Done:
    """What came of it: rows that have a result, and why others have none."""

    finished: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    stopped: bool = False


@dataclass(frozen=True)
class Bench:
    """A directory of results, and what all of its rows share."""

    out: Path
    model: str
    model_sha256: str
    data: list[str]
    lock: int
    machine: dict[str, Any] = field(default_factory=dict)

    @classmethod
    @contextmanager
    def begin(cls, out: Path, model: Path, data: Sequence[str]) -> Iterator[Bench]:
        """The directory, made or found; refuses one that is of another model or other training text."""
        weights = sorted(model.glob("*.safetensors"))
        if not weights:
            raise LrqatError(f"--model {model}: no safetensors file; expected a Hugging Face directory")
        if missing := [name for name in data if not Path(name).is_file()]:
            raise LrqatError(f"--data {missing[0]}: no such file")
        said: dict[str, Any] = {"model": str(model.resolve()), "model_sha256": sha256(weights)}
        said |= {"data": [str(Path(name).resolve()) for name in data], "data_sha256": sha256(map(Path, data))}
        out.mkdir(parents=True, exist_ok=True)
        path = out / "bench.json"
        before = read_json(path) if path.is_file() else said
        for key, flag in (("model_sha256", "model"), ("data_sha256", "data")):
            if before.get(key) != said[key]:
                raise LrqatError(f"{out}: holds results of another --{flag} ({before.get(flag)}); name another --out")
        with locked(out) as lock:
            write_json(path, said)
            yield cls(out, said["model"], said["model_sha256"], said["data"], lock, machine())

    @classmethod
    @contextmanager
    def open(cls, out: Path) -> Iterator[Bench]:
        """The directory as `begin` has left it."""
        said = read_json(out / "bench.json")
        with locked(out) as lock:
            yield cls(out, said["model"], said["model_sha256"], said["data"], lock)

    def source(self, result: Mapping[str, Any]) -> Path:
        """Where a result's model is; the full-precision one's says none, so that no path of a machine stands in it."""
        return self.out / result["source"] if "source" in result else Path(self.model)

    def results(self) -> list[str]:
        """Labels of the rows that have a result."""
        return sorted(path.parent.name for path in (self.out / "rows").glob("*/result.json"))


@contextmanager
def locked(out: Path) -> Iterator[int]:
    """Keep a second benchmark out; children inherit the lock, so that it holds while one of them outlives us."""
    lock = os.open(out / ".lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LrqatError(f"{out}: another benchmark, or a row that it has left, is at work there; end it") from None
        yield lock
    finally:
        os.close(lock)


def run(bench: Bench, planned: Sequence[Row], text: Text, hands: Hands) -> Done:
    """Every planned row to its result, scored on validation text."""
    dtype, size = full_precision(bench)
    reference = Row(dtype, dtype, REFERENCE, size)
    with Children(hands.threads, bench.lock) as children:

        def do(row: Row) -> None:
            obtain(bench, row, children)
            score(bench, label_of(row), text, children)

        done = in_turn({REFERENCE: partial(do, reference)}, 1, children)  # its states serve all others
        if done.failed:
            return done
        return in_turn({row.label: partial(do, row) for row in planned}, hands.jobs, children)


def test(bench: Bench, text: Text, hands: Hands, only: str) -> Done:
    """All results that have no figures on the test text get them."""
    labels = finished(bench, only)
    ledger = bench.out / "tested.json"
    tested: dict[str, Any] = read_json(ledger) if ledger.is_file() else {}
    for label in [REFERENCE, *labels]:
        result = read_json(bench.out / "rows" / label / "result.json")
        found = result.get(text.kind)
        if found is not None and not text.is_of(found):
            raise LrqatError(
                f"{label}: was scored on {found['text']}, {found['blocks']} x {found['seq_len']}; the test text is "
                "scored once: name the same"
            )
        if tested.setdefault(label, result["settings"]) != result["settings"]:
            raise LrqatError(
                f"{label}: the test text was scored under other settings; looking again would choose settings by it; "
                "leave the row out by --only, or rename it in the plan"
            )
    write_json(ledger, tested)
    with Children(hands.threads, bench.lock) as children:
        done = in_turn({REFERENCE: partial(score, bench, REFERENCE, text, children)}, 1, children)
        if done.failed:
            return done
        return in_turn({label: partial(score, bench, label, text, children) for label in labels}, hands.jobs, children)


def finished(bench: Bench, only: str) -> list[str]:
    """Labels of the rows that have a result, the full-precision model's apart; refuses an `only` that none has."""
    labels = [label for label in bench.results() if label != REFERENCE]
    return chosen(labels, only, f"{bench.out}: none of {len(labels)} finished rows")


def zeroshot(bench: Bench, folder: Path, hands: Hands, only: str, limit: int | None = None) -> Done:
    """The full-precision model and all results chosen get `lrqat zeroshot`'s accuracies, unless they have them."""
    identity: dict[str, Any] = {"sha256": sha256(sorted(filter(Path.is_file, folder.iterdir()))), "limit": limit}
    words = ["--tasks-dir", folder.resolve(), "--json", *(() if limit is None else ("--limit", limit))]
    labels = finished(bench, only)
    for label in bench.results():
        found = read_json(bench.out / "rows" / label / "result.json").get("zeroshot")
        if found is not None and any(found[key] != value for key, value in identity.items()):
            raise LrqatError(f"{label}: was asked other rows (limit {found['limit']}); name the same, or another --out")
    with Children(hands.threads, bench.lock) as children:

        def do(label: str) -> None:
            path, log_file = bench.out / "rows" / label / "result.json", bench.out / "rows" / label / "log.txt"
            result = read_json(path)
            if "zeroshot" in result:
                return
            command = [sys.executable, "-m", "lrqat.cli", "zeroshot", bench.source(result), *words]
            said = children.answer(children.run(command, log_file), log_file)
            told = {**identity, "tasks": said["tasks"], "average": said["average"]}
            write_json(path, {**read_json(path), "zeroshot": told})
            log(f"{label}: zero-shot {said['average']['acc']:.4f} +- {said['average']['acc_stderr']:.4f}")

        return in_turn({label: partial(do, label) for label in (REFERENCE, *labels)}, hands.jobs, children)


def in_turn(tasks: Mapping[str, Callable[[], None]], jobs: int, children: Children) -> Done:
    """Tasks by label, `jobs` at a time; one that fails does not stop the others."""
    done = Done()

    def do(label: str) -> None:
        if children.stopping:
            return
        try:
            tasks[label]()
            done.finished += 1
        except Stopped:
            pass
        except (LrqatError, OSError) as error:
            done.failed[label] = str(error)
            log(f"{label}: {error}")

    with ThreadPoolExecutor(jobs) as pool:
        for future in [pool.submit(do, label) for label in tasks]:
            future.result()
    done.stopped = children.stopping
    return done


def label_of(row: Row) -> str:
    """Name of a row's directory."""
    return REFERENCE if row.command == REFERENCE else row.label


def obtain(bench: Bench, row: Row, children: Children) -> None:
    """A row's result.json, made unless it is there under the same settings."""
    folder = bench.out / "rows" / label_of(row)
    what = {"command": row.command, "settings": row.settings if row.peer else row.flags}
    if row.peer:
        what["model_sha256"] = sha256(sorted((row.peer / "model").glob("*.safetensors")))
    stamp = folder / "row.json"
    if folder.is_dir() and (before := read_json(stamp) if stamp.is_file() else {}).get("what") != what:
        log(f"{row.label}: {difference(before.get('what', {}), what)}; runs again")
        shutil.rmtree(folder)
    if (folder / "result.json").is_file():
        return
    attempts = read_json(stamp)["attempts"] if stamp.is_file() else []
    folder.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"name": row.name, "grid": row.grid, "seed": row.seed, "settings": what["settings"]}
    if row.peer:
        cost = {key: row.settings[key] for key in SPENT}
        result |= {key: row.settings[key] for key in ("tool", "version", "method", "bits_per_weight", "megabytes")}
        result |= {"settings": {"grid": row.settings["grid"], "settings": row.settings["settings"]}}
        result |= {**cost, "source": os.path.relpath(row.peer / "model", bench.out)}
        result["machines"] = [result.pop("machine")]
        write_json(stamp, {"what": what, "attempts": [cost]})
    elif row.command == REFERENCE:
        result |= {"tool": None, "method": None, **row.settings, "settings": {}}
        write_json(stamp, {"what": what, "attempts": []})
    else:
        result |= execute(bench, row, folder, what, attempts, children)
    if "cpu_seconds" in result:
        result["core_minutes"] = result["cpu_seconds"] / 60
    write_json(folder / "result.json", result)
    shutil.rmtree(folder / "run" / "checkpoints", ignore_errors=True)  # of LSQ, 2.5 GB for 106 million weights


def execute(
    bench: Bench, row: Row, folder: Path, what: dict[str, Any], attempts: list[Any], children: Children
) -> dict[str, Any]:
    """Run a row's command, or go on with it; what it says and has cost."""
    recipe, run_folder = folder / "recipe.yaml", folder / "run"
    recipe.write_text(yaml.safe_dump(row.recipe(bench.data), sort_keys=False), encoding="utf-8")
    words = [sys.executable, "-m", "lrqat.cli", row.command, bench.model, "--config", recipe, "--out", run_folder]
    resumes = (run_folder / "run.json").is_file()
    attempts = attempts if resumes else []  # nothing of them is used
    log(f"{row.label}: {'goes on' if resumes else 'starts'}")
    write_json(folder / "row.json", {"what": what, "attempts": [*attempts, None]})  # None: it was killed with us
    try:
        ended = children.run([*words, "--json", *(["--resume"] if resumes else [])], folder / "log.txt")
        attempts = [*attempts, {**ended.cost, "machine": bench.machine}]
    finally:
        write_json(folder / "row.json", {"what": what, "attempts": attempts})
    said = children.answer(ended, folder / "log.txt")
    known = [cost for cost in attempts if cost is not None]
    checkpoint = FusedCheckpoint.load(run_folder)
    counts = checkpoint.counts()
    specs = [spec for name, spec in checkpoint.specs.items() if ".layers." in name]  # not embeddings and head
    return {
        "tool": "lrqat",
        "version": lrqat.__version__,
        "code_sha256": sha256(sorted(Path(lrqat.__file__).parent.rglob("*.py"))),
        "method": said["method"],
        "bits_per_weight": sum(spec.bits for spec in specs) / sum(spec.weights for spec in specs),
        "megabytes": counts["bits_per_weight"] * (counts["quantized"] + counts["skipped"] + counts["dense"]) / 8e6,
        "seconds": sum(cost["seconds"] for cost in known),
        "cpu_seconds": sum(cost["cpu_seconds"] for cost in known),
        "peak_memory_gb": max(cost["peak_memory_gb"] for cost in known),
        "cost_is_a_lower_bound": len(known) < len(attempts),
        "threads": children.threads,
        "machines": [cost["machine"] for cost in known],
        "codes_moved": said.get("codes_moved"),
        "source": str(run_folder.relative_to(bench.out)),
    }


def score(bench: Bench, label: str, text: Text, children: Children) -> None:
    """A result's figures on a text, unless they are there."""
    folder = bench.out / "rows" / label
    path, log_file = folder / "result.json", folder / "log.txt"
    result = read_json(path)
    if text.is_of(result.get(text.kind)):
        return
    states = bench.out / "reference" / f"{text.kind}.npy"
    source = bench.source(result)
    words = [sys.executable, Path(__file__).with_name("score.py"), source, bench.model, text.path.resolve()]
    words += ["--seq-len", text.identity["seq_len"], "--blocks", text.identity["blocks"]]
    ended = children.run([*words, "--states", states, "--model-key", bench.model_sha256], log_file)
    figures = children.answer(ended, log_file)
    write_json(path, {**read_json(path), text.kind: {**text.identity, **figures}})
    log(f"{label}: {text.kind} KL {figures['kl']:.4f}, perplexity {figures['perplexity']:.2f}")


def full_precision(bench: Bench) -> tuple[str, dict[str, float]]:
    """(dtype of most weights, as bf16; {"bits_per_weight", "megabytes"}) of the model."""
    bits: Counter[str] = Counter()
    weights = 0
    for spec in SafetensorsDirectory(Path(bench.model)).specs.values():
        name = str(spec.dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "fp")
        bits[name] += 8 * spec.dtype.itemsize * math.prod(spec.shape)
        weights += math.prod(spec.shape)
    size = {"bits_per_weight": bits.total() / weights, "megabytes": bits.total() / 8e6}
    return bits.most_common(1)[0][0], size


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The first setting that has changed."""
    old, new = before.get("settings", {}), now["settings"]
    for key in sorted({*old, *new}):
        if old.get(key) != new.get(key):
            return f"{key} was {old.get(key)!r}, is {new.get(key)!r}"
    return "is not what was run before"
