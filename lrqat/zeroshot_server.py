"""Zero-shot tasks of an exported model, through its runtime's OpenAI-compatible server.

    vLLM        gives the log-probabilities of a prompt's own tokens (`echo` and `logprobs`): lm-eval's own client asks
    llama.cpp   gives none of a prompt, but that of each token that it generates, from before any `logit_bias`. So a
                continuation is generated, one request a token, the token wanted being forced by its bias. The server
                keeps the prompt before it, so each request computes one token

Source: llama.cpp tools/server/server-context.cpp (populate_token_probs: of raw logits, unless post_sampling_probs).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lrqat.client import call
from lrqat.console import bar
from lrqat.errors import LrqatError
from lrqat.zeroshot import Pair, Score, cut

LENGTH = 2048  # tokens of a prompt, where the server tells no limit
FORCE = 1e4  # added to a logit; they differ by tens
LEAST = -149 * math.log(2)  # float32's smallest probability; for a smaller one llama.cpp says -3e38


def model_there(source: str, server: str, batch_size: int) -> Any:
    """lm-eval's model for a server that speaks OpenAI's completions.

    Args:
        source: a directory that holds the model's tokenizer.
        server: its address, with or without /v1.
        batch_size: prompts that the server has at a time.
    """
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    class Forced(LocalCompletionsAPI):
        def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[Score]:
            pairs = [cut(context, continuation, self.max_length) for _, context, continuation in requests]
            return all_forced(address, name, pairs, batch_size)

    folder = Path(source).expanduser()
    folder = folder / "fused" if (folder / "fused" / "fused.json").is_file() else folder
    if not (folder / "tokenizer.json").is_file():
        raise LrqatError(f"{source}: no tokenizer.json; with --server, name the directory of the model that it serves")
    address = server.rstrip("/").removesuffix("/v1")
    served = call(address, "/v1/models")
    try:
        model = served["data"][0]
        name, llamacpp = str(model["id"]), model.get("owned_by") == "llamacpp"
        length = int(model.get("max_model_len") or (model.get("meta") or {}).get("n_ctx") or LENGTH)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        raise LrqatError(f"{server}: is no OpenAI-compatible server (no list of models under /v1/models)") from None
    if llamacpp:
        forced(address, name, [1, 2, 3], [4])
    else:
        check_echo(address, name)
    return (Forced if llamacpp else LocalCompletionsAPI)(
        base_url=f"{address}/v1/completions",
        model=name,
        tokenizer=str(folder),
        tokenizer_backend="huggingface",
        batch_size=batch_size,
        max_length=length,
    )


def check_echo(address: str, name: str) -> None:
    """Refuse a server that keeps the prompt's log-probabilities to itself."""
    prompt = [1, 2, 3, 4]
    request = {"model": name, "prompt": prompt, "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True}
    answer = call(address, "/v1/completions", request)
    try:
        found = answer["choices"][0]["logprobs"]["token_logprobs"]
        told = len(found) == len(prompt) + 1 and all(isinstance(value, float) for value in found[1:])
    except (KeyError, IndexError, TypeError):
        told = False
    if not told:
        raise LrqatError(
            f"{address}: does not give the log-probabilities of a prompt's tokens; serve with vLLM or llama.cpp, or "
            "judge the fused checkpoint: its weights are the same bits"
        )


def all_forced(address: str, name: str, pairs: Sequence[Pair], batch_size: int) -> list[Score]:
    """`forced` of every pair in their order, `batch_size` of them at a time."""
    with ThreadPoolExecutor(batch_size) as pool:
        try:
            scores = [pool.submit(forced, address, name, *pair) for pair in pairs]
            return [score.result() for score in bar(scores, "llama.cpp")]
        finally:
            pool.shutdown(cancel_futures=True)


def forced(address: str, name: str, context: Sequence[int], continuation: Sequence[int]) -> Score:
    """A continuation's log-probability, from llama.cpp's server.

    Args:
        address: the server's.
        name: the model's.
        context: tokens, at least one.
        continuation: tokens, at least one.
    """
    nats, greedy = 0.0, True
    for place, wanted in enumerate(continuation):
        request = {
            "model": name,
            "prompt": [*context, *continuation[:place]],
            "max_tokens": 1,
            "temperature": 0,
            "logprobs": 1,
            "logit_bias": [[wanted, FORCE]],
            "cache_prompt": True,
        }
        answer = call(address, "/v1/completions", request)
        try:
            [said] = answer["choices"][0]["logprobs"]["content"]
            found, likeliest, value = said["id"], said["top_logprobs"][0], float(said["logprob"])
            greedy &= likeliest["id"] == wanted
        except (KeyError, IndexError, TypeError, ValueError):
            found, value = None, math.nan
        if found != wanted or not value <= 0:
            raise LrqatError(
                f"{address}: expected token {wanted} and its log-probability, got {json.dumps(answer)[:200]}"
            )
        nats += max(value, LEAST)
    return nats, greedy
