"""Score one model against the full-precision one on a text, in a process of its own; one JSON line.

    python benchmarks/quality/score.py MODEL REFERENCE TEXT --seq-len 1024 --blocks 12 --states FILE

`lrqat.evaluate` in float32, on the reference's tokens. The reference's final hidden states are read from FILE if they
are there, so that only MODEL runs. They are written when MODEL is REFERENCE, which comes first.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch

from lrqat.command import run
from lrqat.data import blocks
from lrqat.errors import LrqatError
from lrqat.evaluate import Remembered, load_any, read_states, score, words_of
from lrqat.jsonfile import read_json
from lrqat.losses import body_and_head
from lrqat.safestream import tensor_bytes
from lrqat.teacher import cache_teacher


def figures(source: str, reference: str, text: str, seq_len: int, count: int, states: Path, model_key: str) -> Any:
    """What `lrqat.evaluate.Scores` holds, for JSON."""
    other, tokenizer = load_any(reference, torch.float32)[:2]
    blocks_NT = blocks([text], tokenizer, seq_len, count)
    if len(blocks_NT) < count:
        raise LrqatError(f"{text}: has {len(blocks_NT)} blocks of {seq_len} tokens, expected {count}; name fewer")
    key = f"{model_key} {hashlib.sha256(tensor_bytes(blocks_NT)).hexdigest()}"
    if source == reference:
        states.parent.mkdir(parents=True, exist_ok=True)
        body, head = body_and_head(other)
        cache_teacher(states, body, blocks_NT, head.weight_VH.shape[1], torch.float32, key)
    if (stamp := states.with_suffix(".json")).is_file() and read_json(stamp).get("key") == key:
        known: Any = Remembered(body_and_head(other)[1], read_states(states, torch.float32))
    else:
        known = other
    model = other if source == reference else load_any(source, torch.float32)[0]
    return score(model, blocks_NT, known, words_of(blocks_NT, tokenizer)).to_dict()


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("reference")
    parser.add_argument("text")
    parser.add_argument("--seq-len", type=int, required=True)
    parser.add_argument("--blocks", type=int, required=True)
    parser.add_argument("--states", type=Path, required=True)
    parser.add_argument("--model-key", required=True, help="tells one REFERENCE from another")
    args = parser.parse_args()
    found = figures(args.model, args.reference, args.text, args.seq_len, args.blocks, args.states, args.model_key)
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
