"""Is a trained model as fast as an ordinary one? Paired, interleaved measurements of exported models of one runtime.

All models are served at once, each by a server of its own, and the first by two: the second of them shows what the
measurement itself is worth. In every round each server gets, in an order drawn anew, the same prompt of `prompt_tokens`
for one token, and then the same short prompt for `generated_tokens`. An idle server may poll: the others are stopped
meanwhile (SIGSTOP), and the one that is asked has rested until it no longer does (`RESTED`). A round is a pair (of each
model with the first), so what the machine does meanwhile meets both sides.

Where a model lies in memory makes it faster or slower by several percent, for as long as it lies there: two servers
that map one file share its pages, a copy of that file has others (docs/log.md). So there are several sittings: each
loads every model again, another one first each time, a file from a copy of its own. vLLM reads weights into memory of
its own anyway.

Ratios are first / other: of all rounds' the geometric mean without the least and the greatest fifth, since now and then
one costs half as much again. Intervals come from resampling sittings, and rounds within them.

    ttft_s         seconds until the first token of the long prompt
    itl_s          seconds between two generated tokens
    prompt_cpu_s   CPU time of the server for the long prompt
    token_cpu_s    CPU time of the server per generated token, its short prompt included
    load_s         seconds until the server is ready;     load_cpu_s   CPU time until then
    peak_bytes     most resident memory of the server, mapped files included

The result (JSON; what is not measured is null):

    {"format": "lrqat-bench", "version": 2, "runtime": "llama.cpp", "first": LABEL, "noise": LABEL,
     "models":  {LABEL: {"path", "file_bytes", "tensor_bytes", "dtypes": {DTYPE: {"tensors", "bytes"}},
                         "sha256": {FILE: HASH}, "medians": {METRIC: number},
                         "prompt_tokens_per_s", "tokens_per_s", "prompt_tokens_per_cpu_s", "tokens_per_cpu_s",
                         "samples": {METRIC: [[number, one a round], one a sitting]}}},
     "layouts": {LABEL: {"same", "names", "shapes", "dtypes", "bytes", "file_bytes_difference", "differing": [..]}},
     "ratios":  {LABEL: {METRIC: {"ratio", "low", "high", "samples", "sittings": [ratio, one a sitting]}}},
     "verdicts": {LABEL: "equal" | "faster" | "slower" | "unclear"},        of the first against LABEL
     "judged_by": [METRIC, METRIC],                                         CPU times; ttft_s and itl_s if on a GPU
     "limit": 0.03, "confidence": 0.95, "settings": {...}, "machine": {...}}

`models` has the noise label too; `layouts`, `ratios` and `verdicts` have every label but the first's.

Refuses: one model, models of two runtimes or with other vocabularies, prompts beyond the model's context.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lrqat import client
from lrqat.console import log
from lrqat.errors import LrqatError, at_least
from serve import meter
from serve.certificate import file_hashes, machine
from serve.launch import examine, has_cuda
from serve.layout import Layout, compare, layout, sentence
from serve.running import Server, start

VERSION = 2
LIMIT = 0.03  # a ratio of CPU times whose interval lies within 1 +- LIMIT is equal
CONFIDENCE = 0.95
RESAMPLES = 10_000
MIN_SAMPLES = 5  # below, an interval would only be the range
WARM_UP = 2  # rounds that are not counted: page faults, lazy initialization
SHORT_PROMPT = 16  # tokens before those that are generated
SPARE = 16  # positions of the context that are left over
RESTED = {"vllm": 1.5}  # seconds since its last answer; vllm/distributed/device_communicators/shm_broadcast.py polls 1
SETTLE = 0.02  # seconds until a server has put away what it answered
INSTANT = 1e-6  # seconds: of two tokens that came in one packet
NOISE = " (again)"
TRIMMED = 0.2  # of the rounds, at both ends
GPU_MEMORY = 0.9  # of it, for all servers together
CPU, WALL = ("prompt_cpu_s", "token_cpu_s"), ("ttft_s", "itl_s")
PER_ROUND = (*WALL, *CPU)

Samples = dict[str, list[list[float]]]  # metric -> sittings -> rounds


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        prompt_tokens: of the long prompt.
        generated_tokens: after the short one.
        rounds: of a sitting, that count.
        sittings: how often each model is loaded, into other memory.
        threads: CPU threads of each server. Of several, those that wait for the others spin, and spinning is CPU time.
        seed: of prompts and of the order.
        python: vLLM: an interpreter that has it.
        dtype: vLLM: to serve in.
    """

    prompt_tokens: int = 128
    generated_tokens: int = 32
    rounds: int = 10
    sittings: int = 5
    threads: int = 1
    seed: int = 0
    python: str | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        for name, least in (("prompt_tokens", SHORT_PROMPT), ("generated_tokens", 2), ("rounds", 1), ("sittings", 1)):
            at_least(f"--{name.replace('_', '-')}", getattr(self, name), least)

    @property
    def context(self) -> int:
        """Positions that a server must have."""
        return max(self.prompt_tokens + 1, SHORT_PROMPT + self.generated_tokens) + SPARE


def bench(paths: Sequence[Path], settings: Settings, text: str) -> dict[str, Any]:
    """Measure; the first model against all others.

    Args:
        paths: exported models of one runtime; a directory may also be an unquantized model.
        settings: see there.
        text: that prompts are cut from.
    """
    runtime, labels = _names(paths)
    layouts = {label: layout(path) for label, path in labels.items()}
    first, noise = next(iter(labels)), next(iter(labels)) + NOISE
    for label in [*labels][1:]:
        log(f"{label} against {first}: {sentence(compare(layouts[first], layouts[label]))}")
    hashes = {label: file_hashes(path) for label, path in labels.items()}  # and the files are in memory now
    served = {first: labels[first], noise: labels[first], **labels}
    gpu = runtime == "vllm" and has_cuda(settings.python or sys.executable)
    share = GPU_MEMORY / len(served) if gpu else None
    offloads = gpu or (runtime == "llama.cpp" and shutil.which("llama-server") is not None)  # which may have a GPU
    judged_by = WALL if offloads else CPU  # what a GPU computes is no CPU time
    samples: dict[str, Samples] = {label: {} for label in served}
    rng = np.random.default_rng(settings.seed)
    for number in range(settings.sittings):
        log(f"sitting {number + 1}/{settings.sittings}")
        turn = number % len(served)
        order = [*served][turn:] + [*served][:turn]
        for label, found in _sit({label: served[label] for label in order}, settings, text, rng, share).items():
            for metric, values in found.items():
                samples[label].setdefault(metric, []).append(values)
    ratios = {label: _ratios(samples[first], samples[label]) for label in served if label != first}
    layouts[noise] = layouts[first]
    hashes[noise] = hashes[first]
    return {
        "format": "lrqat-bench",
        "version": VERSION,
        "runtime": runtime,
        "first": first,
        "noise": noise,
        "models": {
            label: _model(path, layouts[label], hashes[label], samples[label], settings)
            for label, path in served.items()
        },
        "layouts": {label: compare(layouts[first], layouts[label]) for label in ratios},
        "ratios": ratios,
        "verdicts": {label: verdict([found[metric] for metric in judged_by]) for label, found in ratios.items()},
        "judged_by": list(judged_by),
        "limit": LIMIT,
        "confidence": CONFIDENCE,
        "settings": {**asdict(settings), "warm_up": WARM_UP, "short_prompt": SHORT_PROMPT},
        "machine": machine(),
    }


def interval(first: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Ratio first / other of figures [sittings][rounds], with its bootstrap interval (percentiles).

    One sitting alone says nothing of where models lie in memory: its interval is that of its rounds.
    """
    logs_SR = np.log(np.asarray(first, dtype=np.float64) / np.asarray(other, dtype=np.float64))
    sittings, rounds = logs_SR.shape
    ratio = float(np.exp(trimmed_mean(logs_SR.ravel())))
    found: dict[str, Any] = {"ratio": ratio, "low": None, "high": None, "samples": logs_SR.size}
    if logs_SR.size >= MIN_SAMPLES:
        rng = np.random.default_rng(0)
        drawn_NS1 = rng.integers(0, sittings, (RESAMPLES, sittings, 1))
        drawn_NSR = rng.integers(0, rounds, (RESAMPLES, sittings, rounds))
        means_N = trimmed_mean(logs_SR[drawn_NS1, drawn_NSR].reshape(RESAMPLES, -1))
        tail = 50 * (1 - CONFIDENCE)
        low, high = np.exp(np.percentile(means_N, [tail, 100 - tail]))
        found |= {"low": float(low), "high": float(high)}
    return found | {"sittings": np.exp(trimmed_mean(logs_SR)).tolist()}


def trimmed_mean(values_XR: Any) -> Any:
    """Mean over the last axis, without the least and the greatest `TRIMMED` of it."""
    ordered_XR = np.sort(values_XR, axis=-1)
    count = ordered_XR.shape[-1]
    away = int(count * TRIMMED)
    return ordered_XR[..., away : count - away].mean(axis=-1)


def verdict(found: Sequence[dict[str, Any]]) -> str:
    """Of the first model, by the intervals of its ratios for prompt and generation."""
    if any(row["low"] is None for row in found):
        return "unclear"
    if all(row["low"] >= 1 - LIMIT and row["high"] <= 1 + LIMIT for row in found):
        return "equal"
    if any(row["low"] > 1 + LIMIT for row in found):
        return "slower"
    return "faster" if any(row["high"] < 1 - LIMIT for row in found) else "unclear"


def _names(paths: Sequence[Path]) -> tuple[str, dict[str, Path]]:
    """The runtime of all, and a short label for each."""
    if len(paths) < 2:
        raise LrqatError("lrqat-bench: expected at least two models, A B; to measure one, name it twice")
    runtimes = {examine(path, None, dense=True)[0]: path for path in paths}
    if len(runtimes) > 1:
        (one, first), (two, second) = runtimes.items()
        raise LrqatError(f"{first} is served by {one}, {second} by {two}; compare models of one runtime")
    names = [path.resolve().name.removesuffix(".gguf") for path in paths]
    if len(set(names)) < len(names):
        names = [f"{chr(ord('A') + number % 26)}:{name}" for number, name in enumerate(names)]
    return next(iter(runtimes)), dict(zip(names, paths, strict=True))


def _sit(
    served: dict[str, Path], settings: Settings, text: str, rng: np.random.Generator, gpu_share: float | None
) -> dict[str, dict[str, list[float]]]:
    """One sitting: label -> metric -> figures."""
    samples: dict[str, dict[str, list[float]]] = {label: {} for label in served}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lrqat-bench-")))
        servers = {}
        for number, (label, path) in enumerate(served.items()):
            if path.is_file():
                path = Path(shutil.copyfile(path, folder / f"{number}{path.suffix}"))
            servers[label] = stack.enter_context(_load(path, settings, samples[label], gpu_share))
        try:
            _measure(servers, settings, text, rng, samples)
            for label, server in servers.items():
                samples[label]["peak_bytes"] = [float(meter.peak_bytes(server.pid))]
        except LrqatError:
            for server in servers.values():
                if server.ended():
                    raise LrqatError(server.obituary()) from None
            raise
    return samples


@contextmanager
def _load(path: Path, settings: Settings, samples: dict[str, list[float]], gpu_share: float | None) -> Iterator[Server]:
    """A server; how long its start took is added to the samples."""
    options: dict[str, Any] = {}
    if path.is_dir():
        options = {"python": settings.python, "dtype": settings.dtype, "gpu_share": gpu_share}
    began = time.perf_counter()
    with start(path, threads=settings.threads, ctx=settings.context, dense=True, **options) as server:
        samples.setdefault("load_s", []).append(time.perf_counter() - began)
        samples.setdefault("load_cpu_s", []).append(meter.cpu_seconds(server.pid))
        yield server


def _measure(
    servers: dict[str, Server],
    settings: Settings,
    text: str,
    rng: np.random.Generator,
    samples: dict[str, dict[str, list[float]]],
) -> None:
    """All rounds of a sitting; adds to the samples."""
    ids = _token_ids(servers, text, settings)
    answered = dict.fromkeys(servers, 0.0)
    for number in range(-WARM_UP, settings.rounds):
        prompts = list(_cut(ids, rng, settings))
        found: dict[str, dict[str, float]] = {label: {} for label in servers}
        for prompt, count in prompts:
            for label in rng.permutation(list(servers)).tolist():
                rested = RESTED.get(servers[label].runtime, 0.0)
                time.sleep(max(0.0, answered[label] + rested - time.monotonic()))
                others = [server.pid for other, server in servers.items() if other != label]
                with meter.stopped(others):
                    timing, cpu = _ask(servers[label], prompt, count)
                answered[label] = time.monotonic()
                if count == 1:
                    found[label] |= {"ttft_s": timing.first, "prompt_cpu_s": cpu}
                else:
                    between = max(INSTANT, (timing.last - timing.first) / (count - 1))
                    found[label] |= {"itl_s": between, "token_cpu_s": cpu / count}
        if number >= 0:
            for label, row in found.items():
                for metric in PER_ROUND:
                    samples[label].setdefault(metric, []).append(row[metric])
        seconds = ", ".join(f"{found[label]['prompt_cpu_s'] * 1e3:.0f}" for label in servers)
        log(f"round {number + 1}/{settings.rounds}  prompt {seconds} CPU ms" if number >= 0 else "warming up")


def _ask(server: Server, prompt: list[int], count: int) -> tuple[client.Timing, float]:
    before = meter.cpu_seconds(server.pid)
    timing = client.complete(server.url, server.model, prompt, count)
    time.sleep(SETTLE)
    return timing, meter.cpu_seconds(server.pid) - before


def _token_ids(servers: dict[str, Server], text: str, settings: Settings) -> list[int]:
    """The text in tokens, which must be those of every model."""
    found: dict[str, list[int]] = {}
    for label, server in servers.items():
        body = {"model": server.model, "prompt": text, "add_special_tokens": False}
        answer = client.call(server.url, "/tokenize", body if server.runtime == "vllm" else {"content": text})
        found[label] = answer["tokens"]
    first, ids = next(iter(found.items()))
    for label, other in found.items():
        if other != ids:
            raise LrqatError(f"{label}: its tokens are not those of {first}; compare models of one tokenizer")
    if len(ids) < 2 * settings.prompt_tokens:
        raise LrqatError(f"--text: {len(ids)} tokens, expected at least {2 * settings.prompt_tokens}; give more text")
    return ids


def _cut(ids: list[int], rng: np.random.Generator, settings: Settings) -> Iterator[tuple[list[int], int]]:
    """A long prompt for one token, then a short one for many; from another place each time, so that none is cached."""
    for length, count in ((settings.prompt_tokens, 1), (SHORT_PROMPT, settings.generated_tokens)):
        at = int(rng.integers(0, len(ids) - length))
        yield ids[at : at + length], count


def _ratios(first: Samples, other: Samples) -> dict[str, dict[str, Any]]:
    return {metric: interval(values, other[metric]) for metric, values in first.items()}


def _model(path: Path, of: Layout, hashes: dict[str, str], samples: Samples, settings: Settings) -> dict[str, Any]:
    """A model's entry in the result."""
    medians = {metric: float(np.median(values)) for metric, values in samples.items()}
    return {
        "path": str(path),
        "file_bytes": of.file_bytes,
        "tensor_bytes": of.tensor_bytes,
        "dtypes": of.dtypes(),
        "sha256": hashes,
        "medians": medians,
        "prompt_tokens_per_s": settings.prompt_tokens / medians["ttft_s"],
        "tokens_per_s": 1 / medians["itl_s"],
        "prompt_tokens_per_cpu_s": settings.prompt_tokens / medians["prompt_cpu_s"],
        "tokens_per_cpu_s": 1 / medians["token_cpu_s"],
        "samples": samples,
    }
