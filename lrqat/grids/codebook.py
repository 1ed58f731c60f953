"""Codebook grids: w = s * table[q], one scale for a block of columns.

    iq4_nl   32 columns    s fp16                   sixteen integers, denser around zero
    mxfp4    32 columns    s = 2^(e - 127)          +-{0, .5, 1, 1.5, 2, 3, 4, 6}: OCP microscaling, FP4 E2M1
    tq2_0    256 columns   s fp16                   -1, 0, 1; stored in two bits

Sources: ggml-org/llama.cpp ggml/src/ggml-common.h (kvalues_iq4nl, block_mxfp4, block_tq2_0); OCP Microscaling
Formats (MX) v1.0, section 5.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from lrqat.errors import LrqatError
from lrqat.grid import Affine, Grid, Part, Parts
from lrqat.grids import search
from lrqat.grids.wire import keep_zero, through, to_wire

EXPONENT_BIAS = 127  # of E8M0
EXPONENTS = (1, 254)  # 0 is a subnormal float32, 255 is NaN


@dataclass(frozen=True)
class CodebookGrid(Grid):
    """A codebook grid; `CODEBOOKS` has them all.

    Attributes:
        name: ggml's.
        bits: width of a stored code.
        block: columns that share a scale.
        table: the level of each code. The order need not be the values'.
        one: pieces of a level's unit in the fixed-point downcast.
        power_of_two: s = 2^(e - 127), stored as e in a byte; otherwise s is fp16.
    """

    name: str
    bits: int = field(compare=False)
    block: int = field(compare=False)
    table: tuple[float, ...] = field(compare=False, repr=False)
    one: float = field(compare=False, repr=False)
    power_of_two: bool = field(default=False, compare=False, repr=False)

    @classmethod
    def spelled(cls, text: str) -> CodebookGrid | None:
        """The grid of this name."""
        return CODEBOOKS.get(text)

    def __str__(self) -> str:
        return self.name

    @property
    def codes(self) -> int:
        """Length of the table."""
        return len(self.table)

    @property
    def ends(self) -> tuple[float, float]:
        """The least and the greatest entry."""
        return min(self.table), max(self.table)

    @property
    def step(self) -> float:
        """The range over the number of gaps; entries of one value count once."""
        low, high = self.ends
        return (high - low) / (len(set(self.table)) - 1)

    @property
    def bounds(self) -> tuple[float, float]:
        """Half a step beyond the ends."""
        levels = sorted(set(self.table))
        return 1.5 * levels[0] - 0.5 * levels[1], 1.5 * levels[-1] - 0.5 * levels[-2]

    @property
    def fixed_point(self) -> tuple[float, float]:
        """(0, one)."""
        return 0.0, self.one

    def columns_per_group(self, columns: int, name: str = "weight") -> int:
        """The block; refuses what does not divide."""
        if columns % self.block:
            raise LrqatError(f"{name}: blocks of {self.block} columns ({self}) do not divide in_features {columns}")
        return self.block

    def parts(self, rows: int, columns: int, name: str = "weight") -> dict[str, Part]:
        """`scales` fp16, or `exponents` uint8, [O, blocks]."""
        shape = (rows, columns // self.columns_per_group(columns, name))
        return (
            {"exponents": Part(torch.uint8, shape, *EXPONENTS)}
            if self.power_of_two
            else {"scales": Part(torch.float16, shape)}
        )

    @property
    def learned(self) -> tuple[str, ...]:
        """The scale, in either form."""
        return ("exponents",) if self.power_of_two else ("scales",)

    def affine(self, parts: Parts) -> Affine:
        """(s, nothing)."""
        if self.power_of_two:
            return Affine(torch.exp2(parts["exponents"].float() - EXPONENT_BIAS), None)
        return Affine(parts["scales"].float(), None)

    def fit(self, weight_KI: Tensor, p: float | None) -> dict[str, Tensor]:
        """The search over scales."""
        groups = weight_KI.reshape(-1, self.columns_per_group(weight_KI.shape[1]))
        found = search.scale(groups, *self.ends, self.nearest, self._wire, p)
        found = found.view(len(weight_KI), -1)
        return {"exponents": found.log2().round_() + EXPONENT_BIAS} if self.power_of_two else {"scales": found}

    def learn(self, start: Parts, gains: Parts) -> dict[str, Tensor]:
        """wire(s0 * gain); an exponent is e0 + log2(gain), rounded."""
        if not gains:
            return dict(start)
        if not self.power_of_two:
            return {"scales": keep_zero(start["scales"], self._wire(start["scales"] * gains["scales"]))}
        exponents = start["exponents"] + gains["exponents"].clamp_min(2.0**-8).log2()
        return {"exponents": through(exponents, exponents.detach().round().clamp_(*EXPONENTS))}

    def scaled(self, parts: Parts, share: float | Tensor) -> dict[str, Tensor]:
        """The scale, as by a gain; a power of two goes to the nearest one."""
        return self.learn(parts, {name: torch.ones_like(parts[name]) * share for name in self.learned})

    def nearest(self, x: Tensor) -> Tensor:
        """The nearest entries of the table."""
        values, between, _ = _sorted(self.table, x.device)
        return values[torch.bucketize(x, between)]

    def encode(self, levels: Tensor) -> Tensor:
        """Positions in the table."""
        _, between, codes = _sorted(self.table, levels.device)
        return codes[torch.bucketize(levels, between)]

    def decode(self, codes: Tensor) -> Tensor:
        """table[code]."""
        return _levels(self.table, codes.device)[codes.int()]

    def _wire(self, scales: Tensor) -> Tensor:
        if self.power_of_two:
            return torch.exp2(scales.abs().log2().round().clamp(*(e - EXPONENT_BIAS for e in EXPONENTS)))
        return to_wire(scales, "fp16")


@lru_cache
def _levels(table: tuple[float, ...], device: torch.device) -> Tensor:
    """The table, on its device."""
    return torch.tensor(table, device=device)


@lru_cache
def _sorted(table: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The distinct values ascending, the midpoints between them, and their (first) codes."""
    values = sorted(set(table))
    between = [(a + b) / 2 for a, b in pairwise(values)]
    codes = torch.tensor([table.index(v) for v in values], dtype=torch.uint8, device=device)
    return torch.tensor(values, device=device), torch.tensor(between, device=device), codes


_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)

CODEBOOKS = {
    grid.name: grid
    for grid in (
        CodebookGrid("iq4_nl", 4, 32, tuple(map(float, _IQ4_NL)), one=1.0),
        CodebookGrid("mxfp4", 4, 32, (*_E2M1, *(-v for v in _E2M1)), one=16.0, power_of_two=True),
        CodebookGrid("tq2_0", 2, 256, (-1.0, 0.0, 1.0), one=64.0),
    )
}
