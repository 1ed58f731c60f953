"""Does a server hold out? Many clients at once for minutes: failed requests, memory over time; a table, a JSON line.

    python benchmarks/soak.py smollm2-q4_0.gguf --clients 100 --minutes 5
    python benchmarks/soak.py smollm2-gptq --python .venv-vllm/bin/python

Every client streams one chat after the other through the `openai` package, as an application would, but with one
attempt a request: what the server loses counts. Each request has a connection of its own (docs/deploy.md says why).
The server is started as lrqat-serve starts it. Memory is the resident set of the server and its children, every
second; it is called flat when the median of the last quarter lies within 5% of that of the second quarter: the first
one fills caches.

Exit status 1: a request failed, or memory was not flat, or the server ended.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from openai import AsyncOpenAI, OpenAIError

from serve.running import Server, start

FLAT = 0.05
SAMPLE_SECONDS = 1.0
TIMEOUT = 600.0  # of one request, most of which it may wait for its turn
ONE_REQUEST_A_CONNECTION = {"Connection": "close"}  # llama.cpp ends it after a stream, unannounced
TOPICS = ("bread", "rivers", "the moon", "a small dog", "trains", "winter", "music", "an old house", "maps", "bees")


@dataclass
class Tally:
    """What happened."""

    tokens: int = 0
    elapsed: float = 0.0
    seconds: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)


async def talk(client: AsyncOpenAI, server: Server, number: int, tokens: int, until: float, tally: Tally) -> None:
    """One client: chats until the time is over."""
    rng = random.Random(number)
    while time.monotonic() < until:
        began = time.monotonic()
        words = f"Tell me about {rng.choice(TOPICS)}, number {rng.randrange(10**6)}."
        try:
            stream = await client.chat.completions.create(
                model=server.model,
                messages=[{"role": "user", "content": words}],
                max_tokens=tokens,
                stream=True,
                stream_options={"include_usage": True},
            )
            finished = False
            async for chunk in stream:
                finished |= any(choice.finish_reason is not None for choice in chunk.choices)
                tally.tokens += chunk.usage.completion_tokens if chunk.usage else 0
            if not finished:
                tally.failures.append("the stream ended without a finish_reason")
        except OpenAIError as error:
            tally.failures.append(" ".join(f"{error} {error.__cause__!r}".split()))
        tally.seconds.append(time.monotonic() - began)


async def watch(server: Server, until: float, tally: Tally) -> None:
    """Memory of the server, second by second."""
    while time.monotonic() < until and not server.ended():
        process = psutil.Process(server.pid)
        tally.memory.append(sum(p.memory_info().rss for p in (process, *process.children(recursive=True))))
        await asyncio.sleep(SAMPLE_SECONDS)


async def soak(server: Server, clients: int, minutes: float, tokens: int) -> Tally:
    """All clients at once."""
    tally, began = Tally(), time.monotonic()
    until = began + 60 * minutes
    settings: dict[str, Any] = {"timeout": TIMEOUT, "max_retries": 0, "default_headers": ONE_REQUEST_A_CONNECTION}
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", **settings) as client:
        talking = [talk(client, server, number, tokens, until, tally) for number in range(clients)]
        await asyncio.gather(watch(server, until, tally), *talking)
    tally.elapsed = time.monotonic() - began  # the last answers come after the time is over
    return tally


def growth(memory: list[int]) -> float:
    """Median of the last quarter over that of the second, less 1."""
    quarter = max(1, len(memory) // 4)
    return statistics.median(memory[-quarter:]) / statistics.median(memory[quarter : 2 * quarter] or memory) - 1


def main() -> int:
    """Start, soak, tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("exported", type=Path)
    parser.add_argument("--clients", type=int, default=100, help="at once (100)")
    parser.add_argument("--minutes", type=float, default=5.0, help="(5)")
    parser.add_argument("--tokens", type=int, default=16, help="of an answer, at most (16)")
    parser.add_argument("--ctx", type=int, default=8192, help="positions of the server's context (8192)")
    parser.add_argument("--threads", type=int, help="of the server")
    parser.add_argument("--python", help="vllm: an interpreter that has it")
    args = parser.parse_args()
    with start(args.exported, ctx=args.ctx, threads=args.threads, python=args.python) as server:
        tally = asyncio.run(soak(server, args.clients, args.minutes, args.tokens))
        ended = server.ended()
        if ended:
            print(server.obituary(), file=sys.stderr)
    grown, seconds = growth(tally.memory), sorted(tally.seconds)
    result = {
        "benchmark": "soak",
        "runtime": server.runtime,
        "clients": args.clients,
        "minutes": args.minutes,
        "requests": len(seconds),
        "failed": len(tally.failures),
        "first_failure": tally.failures[0] if tally.failures else None,
        "tokens_per_s": tally.tokens / tally.elapsed,
        "median_s": statistics.median(seconds),
        "slowest_s": seconds[-1],
        "memory_start_mb": tally.memory[0] / 1e6,
        "memory_peak_mb": max(tally.memory) / 1e6,
        "memory_growth": grown,
        "passed": not tally.failures and not ended and grown <= FLAT,
    }
    for name, value in result.items():
        print(f"{name:16} {value:.4g}" if isinstance(value, float) else f"{name:16} {value}")
    print(json.dumps(result))
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
