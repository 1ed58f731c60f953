"""The grid: which weights a storage format can represent.

One equation, everywhere in this project:

    w = s * (q - z),    q unsigned in [0, 2^b - 1],  one (s, z) per row and group of columns

A symmetric grid fixes z = 2^(b-1). Scales `s` may be negative (that puts the one spare negative code on
the side that needs it, as llama.cpp's Q4_0 does) and always have the exact value that the wire stores:

    portable   8 significant bits, 2^-14 <= |s| <= 65280: exact in fp16 *and* in bf16, so that a runtime
               may serve in either dtype without touching a scale
    fp16       11 significant bits, 2^-14 <= |s| <= 65504

Refuses: bits outside 2..8, group sizes that do not divide the columns.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lrqat.errors import LrqatError

if TYPE_CHECKING:
    from torch import Tensor

MIN_SCALE = 2.0**-14  # smallest normal fp16; below it fp16 loses significant bits
MAX_SCALE = {"portable": 65280.0, "fp16": 65504.0}  # largest bf16 value below fp16's maximum; fp16's maximum

_SPELLING = re.compile(r"w([2-8])(?:g(\d+))?(-asym)?(-fp16)?")


@dataclass(frozen=True)
class Grid:
    """An affine grid.

    Attributes:
        bits: width of a code, 2 to 8.
        group_size: columns that share a scale; -1 means the whole row ("per channel").
        symmetric: z is fixed at 2^(bits-1); otherwise every group has an integer zero of its own.
        scale_precision: "portable" (exact in fp16 and bf16) or "fp16".
    """

    bits: int
    group_size: int = -1
    symmetric: bool = True
    scale_precision: str = "portable"

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise LrqatError(f"grid: bits must lie in 2..8, got {self.bits}")
        if self.group_size != -1 and self.group_size < 1:
            raise LrqatError(f"grid: group_size must be -1 (per channel) or positive, got {self.group_size}")
        if self.scale_precision not in MAX_SCALE:
            raise LrqatError(
                f"grid: scale_precision must be one of {', '.join(MAX_SCALE)}, got {self.scale_precision!r}"
            )

    @classmethod
    def parse(cls, text: str) -> Grid:
        """Read `w4g32`, `w3g64-asym`, `w2` (per channel), `w4g32-fp16`."""
        match = _SPELLING.fullmatch(text)
        if match is None or match[2] == "0":
            raise LrqatError(
                f"grid {text!r}: expected w<bits 2-8>[g<group size>][-asym][-fp16], for example w4g32 or w3"
            )
        bits, group, asym, fp16 = match.groups()
        return cls(int(bits), int(group or -1), asym is None, "fp16" if fp16 else "portable")

    def __str__(self) -> str:
        group = "" if self.group_size == -1 else f"g{self.group_size}"
        asym = "" if self.symmetric else "-asym"
        return f"w{self.bits}{group}{asym}{'-fp16' if self.scale_precision == 'fp16' else ''}"

    @property
    def levels(self) -> int:
        """Number of codes, 2^bits."""
        return 1 << self.bits

    @property
    def midpoint(self) -> int:
        """The zero of a symmetric grid, 2^(bits-1)."""
        return 1 << (self.bits - 1)

    def columns_per_group(self, in_features: int, name: str = "weight") -> int:
        """Group size in columns for a matrix with `in_features` columns; refuses what does not divide."""
        if self.group_size == -1:
            return in_features
        if in_features % self.group_size:
            fitting = [g for g in (128, 64, 32, 16) if in_features % g == 0]
            remedy = " or ".join(f"{Grid(self.bits, g, self.symmetric, self.scale_precision)}" for g in fitting[:2])
            channel = Grid(self.bits, -1, self.symmetric, self.scale_precision)
            raise LrqatError(
                f"{name}: group_size {self.group_size} does not divide in_features {in_features}; "
                f"use --grid {remedy + ' or ' if remedy else ''}{channel} (per channel)"
            )
        return self.group_size

    def to_wire(self, scales: Tensor) -> Tensor:
        """Nearest scales that the wire can store, float32 in and out; sign kept, magnitude clamped."""
        import torch

        narrow = torch.bfloat16 if self.scale_precision == "portable" else torch.float16
        magnitude = scales.abs().clamp(MIN_SCALE, MAX_SCALE[self.scale_precision]).to(narrow).to(torch.float32)
        return torch.where(scales < 0, -magnitude, magnitude)


def expand_groups(per_group: Tensor, columns: int) -> Tensor:
    """[O, G] -> [O, columns], every entry repeated for its group's columns."""
    rows, groups = per_group.shape
    return per_group[:, :, None].expand(rows, groups, columns // groups).reshape(rows, columns)


def dequantize(codes_OI: Tensor, scales_OG: Tensor, zeros_OG: Tensor | int) -> Tensor:
    """w = s * (q - z), float32 [O, I]; the only place where codes become weights.

    Exact: |q - z| < 2^8 and 11 significant bits of s need at most 19 of float32's 24.

    Args:
        codes_OI: integers in any dtype, [O, I].
        scales_OG: wire scales, [O, G].
        zeros_OG: integers [O, G], or one number for a symmetric grid.
    """
    rows, columns = codes_OI.shape
    groups = scales_OG.shape[1]
    offset = codes_OI.float().view(rows, groups, columns // groups)
    if not isinstance(zeros_OG, int):
        offset = offset - zeros_OG.float()[:, :, None]
    elif zeros_OG:
        offset = offset - zeros_OG
    return (offset * scales_OG.float()[:, :, None]).view(rows, columns)
