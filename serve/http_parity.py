"""Is the model behind a URL the trained model? What a deployed server tells over HTTP is enough to say so.

    weights    every tensor of the exported bytes against the checkpoint, as always (the file, not the server's memory)
    tokens     the server's own tokens of a hard text, against the Hugging Face tokenizer's
    logits     its log-probabilities against the fake-quant model's, position by position:
                 vLLM        prompt_logprobs of a whole prompt: the 20 likeliest tokens and the actual one
                 llama.cpp   none for prompts, so one request a position, for one token, with the 100 likeliest;
                             the server keeps the prompt before it, so each costs one token
    negative   the same answers against the model re-rounded once more: must be told apart

There is no positive control: it would need other weights on the server. So this certificate says less than the one made
in process, and says so in its `url` and limits (`serve.compare.over_http`).

Source: vLLM's OpenAI-compatible server, "extra parameters" of completions; llama.cpp tools/server/README.md.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from exporters.formats import as_stored, detect
from exporters.verify import count_equal
from lrqat.client import call
from lrqat.console import log
from lrqat.data import blocks
from lrqat.errors import LrqatError
from lrqat.fused import FusedCheckpoint
from lrqat.models import fused_tokenizer
from serve import certificate as certificates
from serve.compare import Comparison, Limits, disturbed, over_http, within
from serve.parity import (
    HARD_TEXT,
    MIN_POSITIONS,
    TOLD_APART,
    Runtime,
    check_rounding,
    hashes,
    reference_logits,
    requantized,
)

VLLM_LISTED = 20  # what vLLM gives by default (--max-logprobs)
LLAMACPP_LISTED = 100
OWNERS = {"llamacpp": "llama.cpp", "vllm": "vllm"}


def certify_served(
    fused: Path,
    exported: Path,
    runtime: Runtime,
    url: str,
    *,
    texts: list[str],
    count: int,
    length: int,
    as_served: bool = False,
) -> dict[str, Any]:
    """The certificate of a deployed server; the same keys as `serve.parity.certify` writes, and `url`.

    Args:
        fused: the fused checkpoint's directory.
        exported: what the server serves.
        runtime: of that format; says what it rounds and within what limits.
        url: base address; the OpenAI endpoints lie below it at /v1.
        texts: sources as `lrqat.data.blocks` takes them; empty for the default text.
        count: sequences to compare on.
        length: tokens of each.
        as_served: the runtime need not round activations, keys and values as training did.
    """
    url = url.rstrip("/").removesuffix("/v1")
    checkpoint = FusedCheckpoint.load(fused)
    rounding = check_rounding(checkpoint, runtime, as_served)
    model = served_model(url, runtime.name)
    tokenizer = fused_tokenizer(checkpoint)
    tokens_equal = _tokens(url, runtime.name, model) == tokenizer(HARD_TEXT)["input_ids"]
    sequences = blocks(texts, tokenizer, length, count).tolist()
    log(f"server: {len(sequences)} x {length} tokens through {url}")
    listed = [logprobs(url, runtime.name, model, ids) for ids in sequences]
    log(f"weights: comparing {exported} with {fused}")
    equal, total, differing = count_equal(as_stored(checkpoint, detect(exported)), runtime.read(exported))
    with tempfile.TemporaryDirectory(prefix="lrqat-parity-") as folder:
        work = Path(folder)

        def measure(label: str, model: FusedCheckpoint, limits: Limits | None) -> tuple[dict[str, Any], Limits]:
            log(f"{label}: through transformers, float32")
            reference = reference_logits(model, sequences, work, runtime.int8_activations)
            figures = _compare(reference, listed, sequences)
            if limits is None:
                limits = over_http(_limits(model, reference, sequences, work, runtime), int(figures["positions"]))
            passed = within(figures, limits)
            return {"figures": figures, "limits": asdict(limits), "passed": passed}, limits

        logits, limits = measure("reference", checkpoint, None)
        negative, _ = measure("negative control", requantized(checkpoint), limits)
        negative["passed"] &= negative["figures"]["kl"] < TOLD_APART * logits["figures"]["kl"]
    passed = equal == total and not differing and tokens_equal and logits["passed"]
    passed &= not negative["passed"]
    proven = logits["figures"]["positions"] >= MIN_POSITIONS
    return certificates.clean(
        {
            "format": certificates.FORMAT,
            "version": certificates.VERSION,
            "verdict": "fail" if not passed else "pass" if proven else "unproven",
            "runtime": f"{runtime.name} over HTTP",
            "url": url,
            "weights": {"equal": equal, "total": total, "differing": differing},
            "token_ids_equal": tokens_equal,
            "rounding": rounding,
            "logits": logits,
            "controls": {"negative": negative},
            "hashes": hashes(checkpoint, fused, exported),
            "settings": {"sequences": len(sequences), "tokens": length, "texts": texts or ["CPython documentation"]},
            "machine": certificates.machine(),
        }
    )


def served_model(url: str, runtime: str) -> str:
    """The name of what the server serves; refused when another runtime answers."""
    answer = call(url, "/v1/models")
    models = answer.get("data") if isinstance(answer, dict) else None
    if not models:
        raise LrqatError(f"{url}: lists no model; expected {runtime}'s server, as lrqat-serve starts it")
    owner = OWNERS.get(str(models[0].get("owned_by")), str(models[0].get("owned_by")))
    if owner != runtime:
        raise LrqatError(f"{url}: {owner} answers, but this format is served by {runtime}; give the other URL or file")
    return str(models[0]["id"])


def logprobs(url: str, runtime: str, model: str, token_ids: Sequence[int]) -> list[dict[int, float]]:
    """For each token but the first: the likeliest tokens in its place, with their log-probabilities."""
    ids = list(token_ids)
    if runtime == "vllm":
        body = {"model": model, "prompt": ids, "max_tokens": 1, "temperature": 0, "prompt_logprobs": VLLM_LISTED}
        rows = call(url, "/v1/completions", body)["choices"][0]["prompt_logprobs"][1:]
        return [{int(token): float(entry["logprob"]) for token, entry in row.items()} for row in rows]
    found = []
    for length in range(1, len(ids)):
        body = {
            "prompt": ids[:length],
            "n_predict": 1,
            "temperature": 0,
            "n_probs": LLAMACPP_LISTED,
            "cache_prompt": True,
        }
        [place] = call(url, "/completion", body)["completion_probabilities"]
        found.append({int(entry["id"]): float(entry["logprob"]) for entry in place["top_logprobs"]})
    return found


def _tokens(url: str, runtime: str, model: str) -> list[int]:
    if runtime == "vllm":
        body: dict[str, Any] = {"model": model, "prompt": HARD_TEXT, "add_special_tokens": True}
    else:
        body = {"content": HARD_TEXT, "add_special": True, "parse_special": True}
    return list(call(url, "/tokenize", body)["tokens"])


def _compare(
    reference: Sequence[np.ndarray], listed: Sequence[Sequence[Mapping[int, float]]], sequences: list[list[int]]
) -> dict[str, float]:
    comparison = Comparison()
    for expected, found, ids in zip(reference, listed, sequences, strict=True):
        comparison.add_listed(expected, found, ids)
    return comparison.figures()


def _limits(
    checkpoint: FusedCheckpoint,
    reference: Sequence[np.ndarray],
    sequences: list[list[int]],
    work: Path,
    runtime: Runtime,
) -> Limits:
    """The runtime's own; with int8 activations, what a disturbance does to the reference."""
    if not runtime.int8_activations:
        return runtime.limits
    itself = Comparison()
    other = reference_logits(checkpoint, sequences, work, True, disturbance=1e-6)
    for expected, found, ids in zip(reference, other, sequences, strict=True):
        itself.add(expected, found, ids)
    return disturbed(itself.figures())
