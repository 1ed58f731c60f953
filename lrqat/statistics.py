"""What training changed, counted while start and result are both at hand: RUN/layers.json.

    weights     per weight: its grid, its shape, how many of its codes moved
    histograms  per grid, over all its weights, before and after training:
                  codes         how often each code occurs
                  weights       s * level + m, in units of the weight matrix's root mean square before training
                  scales        log2 |s|
                  scale_change  s after / s before - 1

Counts are integers; what lies outside of a histogram's range is in its first or last bin. "Before" is what training
began with: the start's codes; of EfficientQAT's histograms, what Block-AP left. Heads and embeddings are not trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lrqat.grid import dequantize
from lrqat.layers import quantizers
from lrqat.methods.gains import GainQuantizer

VERSION = 1


@dataclass(frozen=True)
class Bins:
    """Equal bins between two ends."""

    low: float
    high: float
    count: int

    def histogram(self, values: Tensor) -> Tensor:
        """int64 [count], on the CPU; values beyond the ends are in the bins at the ends."""
        values = values.detach().flatten().float().clamp(self.low, self.high)
        return torch.histc(values, self.count, self.low, self.high).cpu().to(torch.int64)


WEIGHTS = Bins(-5.0, 5.0, 100)
SCALES = Bins(-16.0, 2.0, 144)  # eighths of an octave
SCALE_CHANGE = Bins(-0.25, 0.25, 500)
BINS = {"weights": WEIGHTS, "scales": SCALES, "scale_change": SCALE_CHANGE}


class Before:
    """A trained quantizer's start: the same interface of levels and (s, m) as the quantizer itself has."""

    def __init__(self, quantizer: GainQuantizer) -> None:
        self.affine = quantizer.grid.affine(dict(quantizer.start.named_buffers()))
        self.levels = quantizer.started


@torch.no_grad()
def statistics(model: Any) -> dict[str, Any]:
    """What layers.json holds, of a swapped and trained model."""
    weights: dict[str, dict[str, Any]] = {}
    histograms: dict[str, dict[str, Any]] = {}
    for name, quantizer in trained(model).items():
        grid = str(quantizer.grid)
        weights[name] = {"grid": grid, "shape": list(quantizer.shape), "moved": quantizer.moved()}
        found = histograms.setdefault(grid, {})
        for key, counts in weight_histograms(quantizer).items():
            found[key] = found[key] + counts if key in found else counts
        quantizer.release()
    return {
        "format": "lrqat-layers",
        "version": VERSION,
        "weights": weights,
        "histograms": {grid: _nested(found) for grid, found in histograms.items()},
    }


def trained(model: Any) -> dict[str, GainQuantizer]:
    """The quantizers that training changes, by the name of their weight."""
    return {name: q for name, q in quantizers(model).items() if isinstance(q, GainQuantizer)}


def moved_codes(model: Any) -> float:
    """Share of the trained weights whose code differs from the start's, of a live model."""
    moved = total = 0
    for quantizer in trained(model).values():
        moved += quantizer.moved()
        total += quantizer.shape[0] * quantizer.shape[1]
        quantizer.release()
    return moved / total


def moved_share(weights: Mapping[str, Mapping[str, Any]]) -> float:
    """`moved_codes` of layers.json's `weights`."""
    total = sum(w["shape"][0] * w["shape"][1] for w in weights.values())
    return float(sum(w["moved"] for w in weights.values()) / total)


def weight_histograms(quantizer: GainQuantizer) -> dict[str, Tensor]:
    """Counts of one weight: "codes.before", "codes.after", and so on; built row tile by row tile."""
    grid, before, now = quantizer.grid, Before(quantizer), quantizer.affine()
    old_OG, new_OG = before.affine.scale_OG, now.scale_OG
    known = old_OG != 0  # a K-quant's sub-scale may be zero
    found = {
        "scales.before": SCALES.histogram(old_OG.abs().log2()),
        "scales.after": SCALES.histogram(new_OG.abs().log2()),
        "scale_change": SCALE_CHANGE.histogram(new_OG[known] / old_OG[known] - 1),
    }
    rms = _rms(quantizer, before)
    for rows in quantizer.tiles(now):
        both = {"before": (before.levels(rows), before.affine), "after": (quantizer.levels(rows, now), now)}
        for when, (levels_KI, affine) in both.items():
            weight_KI = dequantize(levels_KI, affine.rows(rows)) / rms
            counts = {
                "codes": torch.bincount(grid.encode(levels_KI).flatten(), minlength=grid.codes).cpu(),
                "weights": WEIGHTS.histogram(weight_KI),
            }
            for key, values in counts.items():
                label = f"{key}.{when}"
                found[label] = found[label] + values if label in found else values
    return found


def _rms(quantizer: GainQuantizer, before: Before) -> float:
    """Root mean square of the weight at the start; 1 where all of it is zero."""
    squares = 0.0
    for rows in quantizer.tiles(before.affine):
        squares += float(dequantize(before.levels(rows), before.affine.rows(rows)).square().sum(dtype=torch.float64))
    return (squares / (quantizer.shape[0] * quantizer.shape[1])) ** 0.5 or 1.0


def _nested(found: Mapping[str, Tensor]) -> dict[str, Any]:
    """{"codes.before": t} -> {"codes": {"before": [..]}}, with each histogram's range."""
    nested: dict[str, Any] = {}
    for key, counts in found.items():
        kind, _, when = key.partition(".")
        bins = BINS.get(kind)
        entry = nested.setdefault(kind, {} if bins is None else {"low": bins.low, "high": bins.high})
        entry[when or "counts"] = counts.tolist()
    return nested
