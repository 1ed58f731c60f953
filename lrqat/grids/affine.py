"""Affine grids: evenly spaced levels.

    zero "midpoint"   w = s * (q - 2^(b-1))       `w4g32`        symmetric
    zero "integer"    w = s * (q - z)             `w4g32-asym`   z a code
    zero "minimum"    w = s * q + m               `w4g32-min`    s and m fp16: ggml's Q4_1 and Q5_1

A symmetric grid's scales may be negative (`lrqat.grids.search`). s is stored with "portable" precision (exact in
fp16 and bf16) or "fp16" (`lrqat.grids.wire`). |q - z| < 2^8 and the 11 significant bits of s need at most 19 of
float32's 24, so s * q - s * z is the very number s * (q - z).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lrqat.errors import LrqatError
from lrqat.grid import Affine, EvenGrid, Part, Parts
from lrqat.grids import search
from lrqat.grids.wire import MAX_SCALE, keep_zero, to_fp16, to_integer, to_wire

ZEROS = {"midpoint": "", "integer": "-asym", "minimum": "-min"}  # with the ending of their spelling
GGML = {  # affine block types of ggml, by their own names
    "q4_0": "w4g32-fp16",
    "q4_1": "w4g32-min",
    "q5_0": "w5g32-fp16",
    "q5_1": "w5g32-min",
    "q8_0": "w8g32-fp16",
    "q2_0": "w2g64-fp16",
}
_SPELLING = re.compile(r"w([2-8])(?:g(\d+))?(-asym|-min)?(-fp16)?")


@dataclass(frozen=True)
class AffineGrid(EvenGrid):
    """An affine grid.

    Attributes:
        bits: width of a code, 2 to 8.
        group_size: columns that share a scale; -1 means the whole row ("per channel").
        zero: "midpoint", "integer" or "minimum".
        scale_precision: "portable" (exact in fp16 and bf16) or "fp16"; with a minimum always "fp16".
    """

    bits: int
    group_size: int = -1
    zero: str = "midpoint"
    scale_precision: str = "portable"

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise LrqatError(f"grid: bits must lie in 2..8, got {self.bits}")
        if self.group_size != -1 and self.group_size < 1:
            raise LrqatError(f"grid: group_size must be -1 (per channel) or positive, got {self.group_size}")
        for name, allowed in (("zero", ZEROS), ("scale_precision", MAX_SCALE)):
            if getattr(self, name) not in allowed:
                raise LrqatError(f"grid: {name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.zero == "minimum" and self.scale_precision != "fp16":
            raise LrqatError("grid: a grid with a minimum has fp16 scales")

    @classmethod
    def spelled(cls, text: str) -> AffineGrid | None:
        """The grid of this spelling, if it is an affine one."""
        match = _SPELLING.fullmatch(GGML.get(text, text))
        if match is None or match[2] == "0":
            return None
        bits, group, ending, fp16 = match.groups()
        zero = next(zero for zero, end in ZEROS.items() if end == (ending or ""))
        return cls(int(bits), int(group or -1), zero, "fp16" if fp16 or zero == "minimum" else "portable")

    def __str__(self) -> str:
        group = "" if self.group_size == -1 else f"g{self.group_size}"
        fp16 = "-fp16" if self.scale_precision == "fp16" and self.zero != "minimum" else ""
        return f"w{self.bits}{group}{ZEROS[self.zero]}{fp16}"

    @property
    def symmetric(self) -> bool:
        """No zeros and no minimums are stored."""
        return self.zero == "midpoint"

    @property
    def midpoint(self) -> int:
        """The zero of a symmetric grid, 2^(bits-1)."""
        return 1 << (self.bits - 1)

    @property
    def first(self) -> int:
        """The level of code 0."""
        return -self.midpoint if self.symmetric else 0

    def columns_per_group(self, columns: int, name: str = "weight") -> int:
        """Group size in columns; refuses what does not divide."""
        if self.group_size == -1:
            return columns
        if columns % self.group_size:
            fitting = [replace(self, group_size=g) for g in (128, 64, 32, 16) if columns % g == 0][:2]
            remedy = " or ".join(map(str, [*fitting, replace(self, group_size=-1)]))
            raise LrqatError(
                f"{name}: group_size {self.group_size} does not divide in_features {columns}; "
                f"use --grid {remedy} (per channel)"
            )
        return self.group_size

    def parts(self, rows: int, columns: int, name: str = "weight") -> dict[str, Part]:
        """`scales` fp16 [O, G]; `zeros` uint8 or `minimums` fp16 likewise."""
        shape = (rows, columns // self.columns_per_group(columns, name))
        parts = {"scales": Part(torch.float16, shape)}
        if self.zero == "integer":
            parts["zeros"] = Part(torch.uint8, shape, 0, self.codes - 1)
        elif self.zero == "minimum":
            parts["minimums"] = Part(torch.float16, shape)
        return parts

    @property
    def learned(self) -> tuple[str, ...]:
        """Scales and minimums."""
        return ("scales", "minimums") if self.zero == "minimum" else ("scales",)

    @property
    def learned_beneath(self) -> tuple[str, ...]:
        """Integer zeros: one that moved would shift levels of its group by a step."""
        return ("zeros",) if self.zero == "integer" else ()

    def affine(self, parts: Parts) -> Affine:
        """(s, nothing), (s, -s * z) or (s, m)."""
        scales = parts["scales"].float()
        if self.zero == "midpoint":
            return Affine(scales, None)
        return Affine(scales, -scales * parts["zeros"].float() if self.zero == "integer" else parts["minimums"].float())

    def fit(self, weight_KI: Tensor, p: float | None) -> dict[str, Tensor]:
        """Symmetric: the search over scales; otherwise over the ends of the range."""
        rows, columns = weight_KI.shape
        groups = weight_KI.reshape(-1, self.columns_per_group(columns))
        if self.symmetric:
            found = search.scale(groups, *self.ends, self.nearest, self.wire, p)
            return {"scales": found.view(rows, -1)}
        top = self.codes - 1
        if self.zero == "minimum":
            s, m = search.scale_and_offset(groups, top, lambda s, m: (self.wire(s), to_fp16(m)), p, False)
            return {"scales": s.view(rows, -1), "minimums": m.view(rows, -1)}

        def integer(s: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
            s = self.wire(s)
            return s, -s * (-m / s).round_().clamp_(0, top)

        s, m = search.scale_and_offset(groups, top, integer, p, True)
        return {"scales": s.view(rows, -1), "zeros": (-m / s).round_().view(rows, -1)}

    def learn(self, start: Parts, gains: Parts) -> dict[str, Tensor]:
        """wire(s0 * gain); a minimum or zero moves by gain - 1 of the levels up to the middle one."""
        parts = dict(start)
        if "scales" in gains:
            parts["scales"] = keep_zero(start["scales"], self.wire(start["scales"] * gains["scales"]))
        if "minimums" in gains:
            parts["minimums"] = to_fp16(start["minimums"] + start["scales"] * (gains["minimums"] - 1) * self.midpoint)
        if "zeros" in gains:
            zeros = start["zeros"].float() + (gains["zeros"] - 1) * self.midpoint
            parts["zeros"] = to_integer(zeros, 0, self.codes - 1)
        return parts

    def scaled(self, parts: Parts, share: float | Tensor) -> dict[str, Tensor]:
        """Scales and minimums; zeros are codes."""
        found = {**parts, "scales": self.wire(parts["scales"] * share)}
        if "minimums" in parts:
            found["minimums"] = to_fp16(parts["minimums"] * share)
        return found

    def wire(self, scales: Tensor) -> Tensor:
        """Nearest scales that the wire can store."""
        return to_wire(scales, self.scale_precision)
