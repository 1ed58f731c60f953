"""Requests to a running model server, as JSON over HTTP; what the server refuses becomes one line.

    call(url, "/v1/models")                     GET
    call(url, "/tokenize", {"content": ...})    POST
    complete(url, model, ids, count)            a completion that streams, timed from here

Proxies of the environment are not used: the servers are this machine's, or named by the user.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lrqat.errors import LrqatError

SECONDS = 600.0  # for one answer
EVENT, DONE = b"data: ", b"[DONE]"  # of server-sent events
MESSAGE = 300  # characters of a server's own message that are shown


@dataclass(frozen=True)
class Timing:
    """A completion, seen from outside.

    Attributes:
        first: seconds from the request to the first token.
        last: seconds to the last one.
        tokens: how many the server says it generated.
    """

    first: float
    last: float
    tokens: int


def call(url: str, path: str, body: dict[str, Any] | None = None) -> Any:
    """The JSON that the server answers with."""
    try:
        with _open(url, path, body) as answer:
            return json.load(answer)
    except ValueError:
        raise LrqatError(f"{url}{path}: the answer is not JSON; expected llama.cpp's or vLLM's server") from None
    except (OSError, http.client.HTTPException) as error:
        raise _lost(url, error) from None


def complete(url: str, model: str, token_ids: Sequence[int], count: int) -> Timing:
    """Generate `count` tokens after the prompt, the likeliest each, whatever they are; no prompt is cached."""
    body = {
        "model": model,
        "prompt": list(token_ids),
        "max_tokens": count,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        "cache_prompt": False,  # llama.cpp's; vLLM gets prompts that it has not seen
    }
    first = last = 0.0
    tokens = 0
    began = time.perf_counter()
    try:
        with _open(url, "/v1/completions", body) as answer:
            for line in answer:
                if not line.startswith(EVENT) or line[len(EVENT) :].strip() == DONE:
                    continue
                event = json.loads(line[len(EVENT) :])
                if "error" in event:
                    raise LrqatError(f"{url}: {_message(event)}")
                if event.get("choices"):  # one a token, its text may be empty: half a character
                    last = time.perf_counter() - began
                    first = first or last
                tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
    except (OSError, http.client.HTTPException) as error:
        raise _lost(url, error) from None
    if tokens != count:
        raise LrqatError(f"{url}: {tokens} tokens came where {count} were asked for; is the context too small?")
    return Timing(first, last, tokens)


def _open(url: str, path: str, body: dict[str, Any] | None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    try:
        request = urllib.request.Request(url + path, data, {"Content-Type": "application/json"})
        return urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=SECONDS)
    except urllib.error.HTTPError as error:
        text = error.read().decode(errors="replace")
        with contextlib.suppress(ValueError):
            text = _message(json.loads(text))
        raise LrqatError(f"{url}{path}: status {error.code}: {' '.join(text.split())[:MESSAGE]}") from None
    except ValueError:  # no URL at all
        raise LrqatError(f"{url}: not a URL; expected one as lrqat-serve prints it, http://127.0.0.1:8000") from None


def _message(answer: Any) -> str:
    """What went wrong, in llama.cpp's and vLLM's answers."""
    error = answer.get("error", answer) if isinstance(answer, dict) else answer
    return str(error.get("message", error) if isinstance(error, dict) else error)


def _lost(url: str, error: Exception) -> LrqatError:
    why = getattr(error, "reason", None) or error
    return LrqatError(f"{url}: {getattr(why, 'strerror', None) or why or type(why).__name__}; is the server running?")
