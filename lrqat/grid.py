"""The grid: which weights a storage format can represent.

One equation, everywhere in this project:

    w = s * level(q) + m        q a code; one scale s and offset m per row and group of columns

    affine grids   level(q) = q - 2^(b-1), m = 0         symmetric: `w4g32`
                   level(q) = q,           m = -s * z    integer zero z: `w4g32-asym`
                   level(q) = q,           m free        minimum as ggml's Q4_1 stores it: `w4g32-min`
    K-quants       s = d * sc, m = -dmin * mn            small integers sc, mn under a super-block's fp16 d, dmin
    codebooks      level(q) = table[q], m = 0            IQ4_NL, MXFP4, ternary

What s and m are made of are the grid's *parts*, per weight [O, ...], in the values that the wire stores. In
training they are float32 and learn by gains, passed through wire precision straight-through; fused, they are in
the wire's dtypes. `Grid.affine` makes s and m of them in the order of operations that runtimes use; every product
is exact in float32, so s * level + m rounds once, whoever computes it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from lrqat.errors import LrqatError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

INSIDE = 2.0**-8  # of a piece of the fixed point
FEWEST = 8  # pieces of a code, of which a quarter lie at its edges

Parts = Mapping[str, "Tensor"]
Rows: TypeAlias = "slice | Tensor"  # of a weight: a run of them, or their numbers, int64


class Affine(NamedTuple):
    """What turns levels into weights: float32 scale [O, G] and offset [O, G], or None where it is zero."""

    scale_OG: Tensor
    offset_OG: Tensor | None

    def rows(self, rows: Rows) -> Affine:
        """The same for some rows."""
        return Affine(self.scale_OG[rows], None if self.offset_OG is None else self.offset_OG[rows])


@dataclass(frozen=True)
class Part:
    """How the wire stores one part: its dtype, its shape, and the least and greatest integer."""

    dtype: torch.dtype
    shape: tuple[int, int]
    low: int | None = None
    high: int | None = None

    @property
    def bits(self) -> int:
        """Of a number; integers are packed in as few as their range takes."""
        if self.low is None or self.high is None:
            return 8 * self.dtype.itemsize
        return (self.high - self.low).bit_length()


class Grid(ABC):
    """Base of all grids; a value: equal when spelled alike.

    Attributes:
        bits: width of a stored code.
    """

    bits: int

    @staticmethod
    def parse(text: str) -> Grid:
        """Read `w4g32`, `w3g64-asym`, `w4g32-min`, `w2` (per channel), or a ggml type: `q4_k`, `iq4_nl`, `q4_0`."""
        from lrqat.grids import affine, codebook, kquant

        for kind in (affine.AffineGrid, kquant.KGrid, codebook.CodebookGrid):
            if found := kind.spelled(text):
                return found
        lattices = ", ".join([*kquant.LAYOUTS, *codebook.CODEBOOKS])
        raise LrqatError(
            f"grid {text!r}: expected w<bits 2-8>[g<group size>][-asym|-min][-fp16], for example w4g32 or w3, "
            f"or one of {lattices}"
        )

    @property
    @abstractmethod
    def codes(self) -> int:
        """Number of codes, at most 2^bits."""

    @property
    @abstractmethod
    def ends(self) -> tuple[float, float]:
        """The least and the greatest level."""

    @property
    @abstractmethod
    def step(self) -> float:
        """Mean distance of neighbouring levels."""

    @property
    @abstractmethod
    def bounds(self) -> tuple[float, float]:
        """Latents outside of them are clipped: half a step beyond the ends."""

    @property
    @abstractmethod
    def fixed_point(self) -> tuple[float, float]:
        """(begin, one): piece i of a latent, -128 to 127, is [i, i + 1) / one + begin."""

    def to_fixed(self, x: Tensor) -> Tensor:
        """Pieces, int8, of latents between the ends: those they lie in or, to keep a code, the next; overwrites x."""
        import torch

        begin, one = self.fixed_point
        levels = self.nearest(x.clone())
        fixed = x.sub_(begin).mul_(one).floor_().clamp_(-128, 127).to(torch.int8)
        back = levels.sub_(self.nearest(self.from_fixed(fixed))).sign_()
        return fixed.add_(back.to(torch.int8))

    def from_fixed(self, fixed: Tensor) -> Tensor:
        """The even one of a piece's two ends, just inside of it; its middle, where a code has few. Float32, exact.

        Where pieces begin at an edge of codes, those next to it lie at that edge, each on its own side: that is
        Q_b.(7-b) of LR-QAT's eq. 7 and a bit for the side.
        """
        begin, one = self.fixed_point
        if one * self.step < FEWEST:
            return fixed.float().add_(0.5).div_(one).add_(begin)
        return fixed.float().add_(fixed & 1, alpha=1 - 2 * INSIDE).div_(one).add_(begin + INSIDE / one)

    @abstractmethod
    def columns_per_group(self, columns: int, name: str = "weight") -> int:
        """Columns that share (s, m) in a row of `columns`; refuses what does not divide."""

    @abstractmethod
    def parts(self, rows: int, columns: int, name: str = "weight") -> dict[str, Part]:
        """What s and m of a weight [rows, columns] are stored as."""

    @abstractmethod
    def affine(self, parts: Parts) -> Affine:
        """s and m, exact; differentiable."""

    @abstractmethod
    def fit(self, weight_KI: Tensor, p: float | None) -> dict[str, Tensor]:
        """Parts with little sum |error|^p (None: min-max), float32, in wire values.

        Args:
            weight_KI: float32 rows; each row, and each group, is fitted alone.
            p: exponent of the search.
        """

    @abstractmethod
    def learn(self, start: Parts, gains: Parts) -> dict[str, Tensor]:
        """The parts after training: start * gain in wire values, straight-through; gains are shaped as their parts."""

    @abstractmethod
    def scaled(self, parts: Parts, share: float | Tensor) -> dict[str, Tensor]:
        """Parts for `share` times the weight, float32, in wire values: its codes under these are that product.

        Args:
            parts: float32.
            share: of all, or of each number [O, X] of the first part that learns and of all columns beneath it.
        """

    @abstractmethod
    def nearest(self, x: Tensor) -> Tensor:
        """The nearest levels, float32; may overwrite x. Nothing else in lrqat rounds a weight."""

    @abstractmethod
    def encode(self, levels: Tensor) -> Tensor:
        """Levels -> uint8 codes."""

    @abstractmethod
    def decode(self, codes: Tensor) -> Tensor:
        """Integer codes -> float32 levels."""

    @property
    def learned(self) -> tuple[str, ...]:
        """Parts that training may scale."""
        return ("scales",)

    @property
    def learned_beneath(self) -> tuple[str, ...]:
        """Parts that may move beneath a real weight, which stays, but not with levels on them."""
        return ()

    def bits_per_weight(self, rows: int, columns: int) -> float:
        """Stored bits, codes and parts, a weight."""
        stored = sum(part.bits * part.shape[0] * part.shape[1] for part in self.parts(rows, columns).values())
        return self.bits + stored / (rows * columns)


class EvenGrid(Grid):
    """A grid whose levels are the integers from `first` on: affine grids and K-quants."""

    @property
    @abstractmethod
    def first(self) -> int:
        """The level of code 0."""

    @property
    def codes(self) -> int:
        """2^bits."""
        return 1 << self.bits

    @property
    def ends(self) -> tuple[float, float]:
        """The levels of the first and the last code."""
        return float(self.first), float(self.first + self.codes - 1)

    @property
    def step(self) -> float:
        """1."""
        return 1.0

    @property
    def bounds(self) -> tuple[float, float]:
        """Half a step beyond the ends."""
        return self.first - 0.5, self.first + self.codes - 0.5

    @property
    def fixed_point(self) -> tuple[float, float]:
        """2^(8-b) pieces of a code, from the edge in the middle of the range."""
        return self.first + self.codes // 2 - 0.5, 2.0 ** (8 - self.bits)

    def nearest(self, x: Tensor) -> Tensor:
        """clip(round(x))."""
        return x.round_().clamp_(*self.ends)

    def encode(self, levels: Tensor) -> Tensor:
        """q = level - first."""
        import torch

        return (levels - self.first if self.first else levels).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """level = q + first."""
        levels = codes.float()
        return levels.add_(self.first) if self.first else levels


def dequantize(levels_OI: Tensor, affine: Affine) -> Tensor:
    """w = s * level + m, float32 [O, I]; the only place where levels become weights."""
    rows, columns = levels_OI.shape
    groups = affine.scale_OG.shape[1]
    weight = levels_OI.view(rows, groups, columns // groups) * affine.scale_OG[:, :, None]
    if affine.offset_OG is not None:
        weight += affine.offset_OG[:, :, None]
    return weight.view(rows, columns)


def to_latent(weight_OI: Tensor, affine: Affine) -> Tensor:
    """x = (w - m) / s, float32 [O, I]: the weight in units of levels, before rounding."""
    rows, columns = weight_OI.shape
    groups = affine.scale_OG.shape[1]
    latent = weight_OI.float().reshape(rows, groups, columns // groups)
    if affine.offset_OG is not None:
        latent = latent - affine.offset_OG[:, :, None]
    return (latent / affine.scale_OG[:, :, None]).view(rows, columns)


def to_levels(weight_OI: Tensor, affine: Affine, grid: Grid) -> Tensor:
    """nearest((w - m) / s), float32 [O, I]: what rounding makes of a weight."""
    return grid.nearest(to_latent(weight_OI, affine))
