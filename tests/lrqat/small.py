"""The small trained model of the tests: its weights, text cut for it, and how far a start of its weights is from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lrqat.data import blocks
from lrqat.evaluate import Scores, score
from lrqat.grid import Parts
from lrqat.plan import Plan
from lrqat.sites import checkpoint_tensors
from lrqat.starts.codes import rounded


def load(directory: Path) -> Any:
    """The model in float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory).eval().requires_grad_(False)


def cut(directory: Path, prose: Sequence[str], folder: Path, length: int, limit: int) -> list[Tensor]:
    """Tokens of each text: calibration and held-out ones."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    found = []
    for number, text in enumerate(prose):
        (folder / f"{number}.txt").write_text(text)
        found.append(blocks([str(folder / f"{number}.txt")], tokenizer, length, limit=limit))
    return found


def scored(model: Any, decided: Plan, parts: Mapping[str, Parts], blocks_NT: Tensor, reference: Any) -> Scores:
    """The model with its planned weights rounded."""
    weights = checkpoint_tensors(model)
    for name, grid in decided.grids.items():
        weights[name].copy_(rounded(weights[name], parts[name], grid).dequantize())
    return score(model, blocks_NT, reference)
