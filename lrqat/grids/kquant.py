"""K-quants: super-blocks of 256 columns whose scales are small integers under fp16 super-scales.

    q2_k   w = d * sc * q - dmin * mn    q 0..3     sub-blocks of 16   sc, mn  4 bits   2.625 bits a weight
    q3_k   w = d * sc * (q - 4)          q 0..7     16                 sc      6 bits   3.4375
    q4_k   w = d * sc * q - dmin * mn    q 0..15    32                 sc, mn  6 bits   4.5
    q5_k   w = d * sc * q - dmin * mn    q 0..31    32                 sc, mn  6 bits   5.5
    q6_k   w = d * sc * (q - 32)         q 0..63    16                 sc      8 bits   6.5625

sc of q3_k (-32..31) and q6_k (-128..127) is signed. Exact in float32: d has 11 significant bits, sc at most 8 with
its sign and a level at most 6, together at most 24; so has dmin * mn; the difference rounds once.

Nobody else trains on these lattices: d, dmin, sc and mn all learn here, by gains, through their own rounding.

Source: ggml-org/llama.cpp ggml/src/ggml-common.h (block_q2_K .. block_q6_K) and ggml-quants.c (dequantize_row_*).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lrqat.errors import LrqatError
from lrqat.grid import Affine, EvenGrid, Part, Parts
from lrqat.grids import search
from lrqat.grids.wire import keep_zero, to_fp16, to_integer, to_wire

SUPER_BLOCK = 256


@dataclass(frozen=True)
class KGrid(EvenGrid):
    """A K-quant; `LAYOUTS` has them all.

    Attributes:
        name: ggml's.
        bits: width of a code.
        block: columns of a sub-block.
        sub_bits: width of sc and mn.
        minimums: it has dmin and mn, and unsigned levels and sc; otherwise levels and sc are signed.
    """

    name: str
    bits: int = field(compare=False)
    block: int = field(compare=False)
    sub_bits: int = field(compare=False)
    minimums: bool = field(compare=False)

    @classmethod
    def spelled(cls, text: str) -> KGrid | None:
        """The grid of this name."""
        return LAYOUTS.get(text)

    def __str__(self) -> str:
        return self.name

    @property
    def first(self) -> int:
        """The level of code 0."""
        return 0 if self.minimums else -(1 << (self.bits - 1))

    @property
    def sub_range(self) -> tuple[int, int]:
        """Least and greatest sc."""
        half = 1 << (self.sub_bits - 1)
        return (0, 2 * half - 1) if self.minimums else (-half, half - 1)

    def columns_per_group(self, columns: int, name: str = "weight") -> int:
        """The sub-block; refuses columns that do not fill super-blocks."""
        if columns % SUPER_BLOCK:
            raise LrqatError(
                f"{name}: super-blocks of {SUPER_BLOCK} columns ({self}) do not divide in_features {columns}; "
                "give this weight a grid of blocks of 32 (--override)"
            )
        return self.block

    def parts(self, rows: int, columns: int, name: str = "weight") -> dict[str, Part]:
        """`super_scales` fp16 [O, S], `sub_scales` (u)int8 [O, G]; with minimums `super_minimums`, `sub_minimums`."""
        groups = (rows, columns // self.columns_per_group(columns, name))
        supers = (rows, columns // SUPER_BLOCK)
        integer = torch.uint8 if self.minimums else torch.int8
        parts = {"super_scales": Part(torch.float16, supers), "sub_scales": Part(integer, groups, *self.sub_range)}
        if self.minimums:
            parts["super_minimums"] = Part(torch.float16, supers)
            parts["sub_minimums"] = Part(torch.uint8, groups, *self.sub_range)
        return parts

    @property
    def learned(self) -> tuple[str, ...]:
        """All of them."""
        minimums = ("super_minimums", "sub_minimums") if self.minimums else ()
        return "super_scales", "sub_scales", *minimums

    def affine(self, parts: Parts) -> Affine:
        """s = d * sc and m = -(dmin * mn), [O, G]."""
        scale = _under(parts["super_scales"], parts["sub_scales"])
        return Affine(scale, -_under(parts["super_minimums"], parts["sub_minimums"]) if self.minimums else None)

    def fit(self, weight_KI: Tensor, p: float | None) -> dict[str, Tensor]:
        """Every sub-block by itself; then d and dmin so that the greatest of its super-block gets the greatest integer.

        sc is never zero: a sub-block without a scale could not learn.
        """
        rows, columns = weight_KI.shape
        groups = weight_KI.reshape(-1, self.columns_per_group(columns))
        low, high = self.sub_range
        if not self.minimums:
            s = search.scale(groups, *self.ends, self.nearest, lambda s: to_wire(s, "fp16"), p)
            s = s.view(rows, -1)
            d = self._super(s.abs())
            return {"super_scales": d, "sub_scales": _nonzero((s / _spread(d, s)).round_().clamp_(low, high), s)}

        def real(s: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
            return s.clamp_min(1e-12), m.clamp(max=0)

        s, m = search.scale_and_offset(groups, self.codes - 1, real, p, True)
        s, m = s.view(rows, -1), m.view(rows, -1)
        d, dmin = self._super(s), self._super(-m)
        return {
            "super_scales": d,
            "sub_scales": (s / _spread(d, s)).round_().clamp_(1, high),
            "super_minimums": dmin,
            "sub_minimums": (-m / _spread(dmin, m)).round_().clamp_(0, high),
        }

    def learn(self, start: Parts, gains: Parts) -> dict[str, Tensor]:
        """Start * gain: fp16 above, integers below; sc keeps its sign."""
        if not gains:
            return dict(start)
        low, high = self.sub_range
        sub = start["sub_scales"] * gains["sub_scales"]
        signed = sub.detach().round().clamp_(low, high)
        rounded = keep_zero(start["sub_scales"], _nonzero(signed, start["sub_scales"]))
        parts = {
            "super_scales": keep_zero(
                start["super_scales"], to_wire(start["super_scales"] * gains["super_scales"], "fp16")
            ),
            "sub_scales": to_integer(sub + (rounded - sub.detach()), low, high),
        }
        if self.minimums:
            parts["super_minimums"] = to_fp16(start["super_minimums"] * gains["super_minimums"])
            parts["sub_minimums"] = to_integer(start["sub_minimums"] * gains["sub_minimums"], low, high)
        return parts

    def scaled(self, parts: Parts, share: float | Tensor) -> dict[str, Tensor]:
        """d and dmin."""
        found = {**parts, "super_scales": to_wire(parts["super_scales"] * share, "fp16")}
        if self.minimums:
            found["super_minimums"] = to_fp16(parts["super_minimums"] * share)
        return found

    def _super(self, real_OG: Tensor) -> Tensor:
        """The fp16 number [O, S] under which the greatest of each super-block becomes the greatest integer."""
        most_OS = real_OG.unflatten(1, (-1, SUPER_BLOCK // self.block)).amax(2)
        return to_wire(most_OS / self.sub_range[1], "fp16")


def _spread(per_super: Tensor, like: Tensor) -> Tensor:
    """[O, S] -> [O, G]."""
    return per_super.repeat_interleave(like.shape[1] // per_super.shape[1], dim=1)


def _under(per_super: Tensor, sub: Tensor) -> Tensor:
    """super * sub, float32 [O, G], exact."""
    return _spread(per_super.float(), sub) * sub.float()


def _nonzero(integers: Tensor, like: Tensor) -> Tensor:
    """One, with the sign of `like`, where an integer is zero or has lost that sign."""
    one = torch.where(like < 0, -1.0, 1.0)
    return torch.where(integers * one < 1, one, integers)


LAYOUTS = {
    grid.name: grid
    for grid in (
        KGrid("q2_k", 2, 16, 4, minimums=True),
        KGrid("q3_k", 3, 16, 6, minimums=False),
        KGrid("q4_k", 4, 32, 6, minimums=True),
        KGrid("q5_k", 5, 32, 6, minimums=True),
        KGrid("q6_k", 6, 16, 8, minimums=False),
    )
}
