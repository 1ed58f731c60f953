"""ggml's block types: the bytes of a run of columns, from codes and parts, and back.

A row of a matrix is a run of blocks. Sizes are bytes, floats are fp16, everything is little endian. Of `q`:
low and high are bits of the codes; `q0|q16` puts several of them into one byte, the first lowest.

    type     columns  bytes  w                    bytes in their order
    Q4_0          32     18  d * (q - 8)          d 2, q0|q16 .. 16
    Q4_1          32     20  d * q + m            d 2, m 2, q0|q16 .. 16
    Q5_0          32     22  d * (q - 16)         d 2, bit 4: q0|q1|..|q7 .. 4, low 4 bits: q0|q16 .. 16
    Q5_1          32     24  d * q + m            d 2, m 2, bit 4: q0|q1|..|q7 .. 4, low 4 bits: q0|q16 .. 16
    Q8_0          32     34  d * (q - 128)        d 2, q - 128 as int8 32
    IQ4_NL        32     18  d * table[q]         d 2, q0|q16 .. 16
    MXFP4         32     17  2^(e-127)*table[q]   e 1, q0|q16 .. 16
    Q2_0          64     18  d * (Q - 1)          d 2, Q0|Q1|Q2|Q3, Q4|Q5|Q6|Q7 .. 16
    TQ2_0        256     66  d * (q - 1)          q0|q32|q64|q96 .. 32, the same of columns 128 on .. 32, d 2
    Q2_K         256     84  d*sc*q - dmin*mn     sc|mn 16, q as TQ2_0 64, d 2, dmin 2
    Q3_K         256    110  d*sc*(q - 4)         bit 2: q0|q32|..|q224 .. 32, low 2 bits: as TQ2_0 64, of sc + 32
                                                  low 4 bits: sc0|sc8 .. 8, high 2: sc0|sc4|sc8|sc12 .. 4, d 2
    Q4_K         256    144  d*sc*q - dmin*mn     d 2, dmin 2, sc and mn 12, q0|q32 .. 32, q64|q96 .. 96
    Q5_K         256    176  d*sc*q - dmin*mn     d 2, dmin 2, sc and mn 12, bit 4: q0|q32|..|q224 .. 32,
                                                  low 4 bits: as Q4_K 128
    Q6_K         256    210  d*sc*(q - 32)        low 4 bits: q0|q64 .. 64, q128|q192 .. 64, high 2: as TQ2_0 64,
                                                  sc as int8 16, d 2

The 12 bytes of sc and mn, 6 bits each, for j in 0..3:

    byte j         sc[j] | high 2 bits of sc[j+4]
    byte j + 4     mn[j] | high 2 bits of mn[j+4]
    byte j + 8     low 4 bits of sc[j+4] | low 4 bits of mn[j+4]

Q2_0 reaches from -1 to 2, our two bits from -2 to 1: d = -s and Q = 3 - q, so that d * (Q - 1) = s * (q - 2).

Each type is `BlockType.fields`: one `Field` for each run of bytes. `pack` takes weights on the type's own grid
(`exporters.gguf_carry.restate`), `unpack` gives them back. Integers are moved and signs flipped; no float is computed.

    w4g32, codes 0 and 15 in columns 0 and 16, 8 elsewhere, scale 0.5 (fp16 0x3800), as Q4_0:
        00 38  f0 88 88 88 88 88 88 88 88 88 88 88 88 88 88 88     w[0] = 0.5 * (0 - 8), w[16] = 0.5 * (15 - 8)

Source: ggml-org/llama.cpp ggml/src/ggml-common.h (block_*), ggml-quants.c (dequantize_row_*, get_scale_min_k4), ggml.h
(enum ggml_type); file types: include/llama.h, as src/llama-model-loader.cpp names a file that mostly holds the type.

Refuses nothing: `exporters.gguf_carry.carries` has been asked before, so what is passed is asserted only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from exporters.packing import gather
from lrqat.fused import FusedTensor
from lrqat.grid import Grid

LOW_4, HIGH_2_OF_6 = np.uint32(0x0F0F0F0F), np.uint32(0x30303030)  # of each byte of a word
MOVED = {4: "<u4", 8: "<u8", 16: "<c16"}  # as what numpy copies runs of bytes one by one the fastest
LONGEST = max(MOVED)
TURNED = {"codes": np.uint16(0xFFFF), "scales": np.uint16(0x8000)}  # Q2_0: 3 - q turns both bits, -d the sign

Planes = dict[str, np.ndarray]  # "codes" and parts: uint8 [blocks, bytes in a block]


@dataclass(frozen=True)
class Field:
    """A run of bytes of a block.

    Attributes:
        plane: what it holds: "codes", the name of a part, or "subs" (sub-scales with sub-minimums).
        count: bytes of the plane in a block.
        low: the first of the bits that are taken from each.
        ways: how many share a byte: each gives 8 / ways bits.
        span: how far apart those are: byte j holds values j, j + span, j + 2 * span .. of each run of ways * span.
    """

    plane: str
    count: int = 2
    low: int = 0
    ways: int = 1
    span: int = 1

    @property
    def nbytes(self) -> int:
        """Bytes in a block."""
        return self.count // self.ways


@dataclass(frozen=True)
class BlockType:
    """A ggml block type.

    Attributes:
        name: as ggml spells it.
        ggml_type: its number in a tensor's header.
        file_type: `general.file_type` of a file that mostly holds it.
        grid: the lattice of its blocks.
        columns: of a block.
        fields: its bytes, in their order.
        offsets: plane -> what is added to it, modulo 256.
        negated: codes and scales are stored negated.
    """

    name: str
    ggml_type: int
    file_type: int
    grid: Grid
    columns: int
    fields: tuple[Field, ...]
    offsets: Mapping[str, int]
    negated: bool = False

    @cached_property
    def nbytes(self) -> int:
        """Bytes of a block."""
        return sum(field.nbytes for field in self.fields)

    @cached_property
    def struct(self) -> np.dtype[np.void]:
        """A block as numpy copies it, a run of bytes at a time: fields "0", "1" .. in their order."""
        return np.dtype([(str(place), f"V{field.nbytes}") for place, field in enumerate(self.fields)])

    @cached_property
    def runs(self) -> dict[str, tuple[int, int]]:
        """Plane -> (run of bytes that the spans of its fields are made of, how many its widest field joins)."""
        found: dict[str, tuple[int, int]] = {}
        for field in self.fields:
            if field.span > 1:
                run, joined = found.get(field.plane, (0, 1))
                found[field.plane] = math.gcd(run or LONGEST, field.span), math.lcm(joined, field.span * field.ways)
        return {plane: (run, joined // run) for plane, (run, joined) in found.items()}

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row."""
        return columns // self.columns * self.nbytes


def _type(
    name: str, ggml_type: int, file_type: int, columns: int, *fields: Field, negated: bool = False, **offsets: int
) -> BlockType:
    return BlockType(name, ggml_type, file_type, Grid.parse(name.lower()), columns, fields, offsets, negated)


D, M = Field("scales"), Field("minimums")
SUPER_D, SUPER_M = Field("super_scales"), Field("super_minimums")
NIBBLES = Field("codes", 32, 0, 2, 16)
FIFTH_BITS = Field("codes", 32, 4, 8, 1)
QUARTERS = Field("codes", 256, 0, 4, 32)
K_NIBBLES = Field("codes", 256, 0, 2, 32)

Q4_0 = _type("Q4_0", 2, 2, 32, D, NIBBLES)
Q4_1 = _type("Q4_1", 3, 3, 32, D, M, NIBBLES)
Q5_0 = _type("Q5_0", 6, 8, 32, D, FIFTH_BITS, NIBBLES)
Q5_1 = _type("Q5_1", 7, 9, 32, D, M, FIFTH_BITS, NIBBLES)
Q8_0 = _type("Q8_0", 8, 7, 32, D, Field("codes", 32), codes=128)
Q2_K = _type("Q2_K", 10, 10, 256, Field("subs", 16), QUARTERS, SUPER_D, SUPER_M)
Q3_K = _type(
    "Q3_K",
    11,
    12,
    256,
    Field("codes", 256, 2, 8, 32),
    QUARTERS,
    Field("sub_scales", 16, 0, 2, 8),
    Field("sub_scales", 16, 4, 4, 4),
    SUPER_D,
    sub_scales=32,
)
Q4_K = _type("Q4_K", 12, 15, 256, SUPER_D, SUPER_M, Field("subs", 12), K_NIBBLES)
Q5_K = _type("Q5_K", 13, 17, 256, SUPER_D, SUPER_M, Field("subs", 12), Field("codes", 256, 4, 8, 32), K_NIBBLES)
Q6_K = _type(
    "Q6_K",
    14,
    18,
    256,
    Field("codes", 256, 0, 2, 64),
    Field("codes", 256, 4, 4, 32),
    Field("sub_scales", 16),
    SUPER_D,
)
IQ4_NL = _type("IQ4_NL", 20, 25, 32, D, NIBBLES)
TQ2_0 = _type("TQ2_0", 35, 37, 256, QUARTERS, D)
MXFP4 = _type("MXFP4", 39, 38, 32, Field("exponents", 1), NIBBLES)
Q2_0 = _type("Q2_0", 42, 41, 64, D, Field("codes", 64, 0, 4, 1), negated=True)

BLOCK_TYPES = {
    kind.ggml_type: kind
    for kind in (Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, TQ2_0, MXFP4, Q2_0)
}


def pack(tensor: FusedTensor, kind: BlockType) -> Tensor:
    """Some rows of a weight on `kind.grid` -> uint8 [O, bytes of a row]."""
    assert tensor.grid == kind.grid
    rows, columns = tensor.codes_OI.shape
    blocks = rows * (columns // kind.columns)
    arrays = {"codes": tensor.codes_OI, **tensor.parts}
    planes = {name: np.ascontiguousarray(a.numpy()).view(np.uint8).reshape(blocks, -1) for name, a in arrays.items()}
    planes |= {name: planes[name] + np.uint8(offset) for name, offset in kind.offsets.items()}
    if "sub_minimums" in planes:
        planes["subs"] = _join(planes["sub_scales"], planes["sub_minimums"])
    runs = {name: split(planes[name], *size) for name, size in kind.runs.items()}
    packed = np.empty(blocks, kind.struct)
    for place, field in enumerate(kind.fields):
        values_NC, fits = planes[field.plane], field.plane == "codes" and kind.grid.bits * field.ways <= 8
        if field.ways == 1:
            folded = values_NC
        elif field.span == 1:
            folded = fold_neighbours(values_NC, field, fits)
        else:
            folded = fold(runs[field.plane], kind.runs[field.plane][0], field, fits).reshape(blocks, -1)
        if kind.negated:
            folded = (folded.view("<u2") ^ TURNED[field.plane]).view(np.uint8)
        packed[str(place)] = folded.view(kind.struct[place])[:, 0]
    return torch.from_numpy(packed.view(np.uint8).reshape(rows, kind.row_bytes(columns)))


def unpack(packed: Tensor, kind: BlockType) -> FusedTensor:
    """Some rows, uint8 [O, bytes of a row] -> the weight on `kind.grid`: the inverse."""
    rows = packed.shape[0]
    blocks_NB = packed.contiguous().numpy().reshape(-1, kind.nbytes)
    columns, at = len(blocks_NB) * kind.columns // rows, 0
    planes: Planes = {}
    for field in kind.fields:
        stored = blocks_NB[:, at : at + field.nbytes]
        if kind.negated:
            stored = (np.ascontiguousarray(stored).view("<u2") ^ TURNED[field.plane]).view(np.uint8)
        values = unfold(stored, field.ways, field.span)
        values = values << field.low if field.low else values
        planes[field.plane] = planes[field.plane] | values if field.plane in planes else values
        at += field.nbytes
    if "subs" in planes:
        planes["sub_scales"], planes["sub_minimums"] = _split(planes.pop("subs"))
    planes |= {name: planes[name] - np.uint8(offset) for name, offset in kind.offsets.items()}
    arrays = {name: torch.from_numpy(np.ascontiguousarray(plane).reshape(rows, -1)) for name, plane in planes.items()}
    wire = kind.grid.parts(rows, columns)
    return FusedTensor(arrays["codes"], {name: arrays[name].view(part.dtype) for name, part in wire.items()}, kind.grid)


def split(values_NC: np.ndarray, run: int, count: int) -> np.ndarray:
    """Of every `count` runs of `run` bytes the first, then the second ..: words [count, N * C / count], a copy."""
    return values_NC.reshape(-1).view(MOVED[run]).reshape(-1, count).T.copy().view(f"<u{min(run, 8)}")


def fold(runs_RW: np.ndarray, run: int, field: Field, fits: bool) -> np.ndarray:
    """A field whose span is some runs, from values as `split` leaves them: bytes in their order.

    `fits`: values have no other bits than those that are taken.
    """
    width, apart = 8 // field.ways, field.span // run
    one = runs_RW.dtype.type
    taken = one(int(_every_byte(runs_RW, width)) << field.low)
    spans_SWRW = runs_RW.reshape(-1, field.ways, apart, runs_RW.shape[1])
    folded_SRW = np.zeros((len(spans_SWRW), *spans_SWRW.shape[2:]), runs_RW.dtype)
    for span_WRW, folded_RW in zip(spans_SWRW, folded_SRW, strict=True):
        for way, values_RW in enumerate(span_WRW):
            up = way * width - field.low
            values_RW = values_RW if fits else values_RW & taken
            folded_RW |= values_RW << one(up) if up > 0 else values_RW >> one(-up)
    return folded_SRW.view(MOVED[run]).reshape(-1, runs_RW.nbytes // len(runs_RW) // run).T.reshape(-1).view(np.uint8)


def fold_neighbours(values_NC: np.ndarray, field: Field, fits: bool) -> np.ndarray:
    """A field whose span is 1: uint8 [N, C / ways]."""
    width, words = 8 // field.ways, values_NC.reshape(-1).view("<u8")
    words = words >> np.uint64(field.low) if field.low else words
    words = words if fits else words & _every_byte(words, width)
    return gather(words.view(np.uint8), width, field.ways).reshape(len(values_NC), -1)


def unfold(bytes_NB: np.ndarray, ways: int, span: int) -> np.ndarray:
    """The inverse of `fold` for low = 0: uint8 [N, B * ways]."""
    if ways == 1:
        return bytes_NB
    width = 8 // ways
    if span == 1:
        words = bytes_NB.astype(f"<u{ways}")
        for doubling in range(ways.bit_length() - 1):
            words = words | words << words.dtype.type((8 - width) << doubling)
        words &= _every_byte(words, width)
        return words.view(np.uint8)
    words = np.ascontiguousarray(bytes_NB).reshape(-1).view(f"<u{min(span, 8)}")
    lanes = np.empty((words.nbytes // span, ways), f"V{span}")
    for lane in range(ways):
        lanes[:, lane] = (words >> words.dtype.type(lane * width) & _every_byte(words, width)).view(lanes.dtype)
    return lanes.view(np.uint8).reshape(len(bytes_NB), -1)


def _every_byte(words: np.ndarray, width: int) -> np.unsignedinteger[Any]:
    """The lowest `width` bits of every byte of a word."""
    mask: np.unsignedinteger[Any] = words.dtype.type(
        int.from_bytes(bytes([(1 << width) - 1]) * words.itemsize, "little")
    )
    return mask


def _join(sc: np.ndarray, mn: np.ndarray) -> np.ndarray:
    """Sub-scales and sub-minimums: sixteen of 4 bits as Q2_K has them, or eight of 6 bits, four at a time in a word."""
    if sc.shape[1] == 16:
        joined: np.ndarray = sc | mn << 4
        return joined
    (sc_low, sc_high), (mn_low, mn_high) = sc.view("<u4").T, mn.view("<u4").T
    words_N3 = np.empty((len(sc), 3), "<u4")
    words_N3[:, 0] = sc_low | (sc_high & HIGH_2_OF_6) << np.uint32(2)
    words_N3[:, 1] = mn_low | (mn_high & HIGH_2_OF_6) << np.uint32(2)
    words_N3[:, 2] = sc_high & LOW_4 | (mn_high & LOW_4) << np.uint32(4)
    return words_N3.view(np.uint8)


def _split(subs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The inverse of `_join`."""
    if subs.shape[1] == 16:
        return subs & 15, subs >> 4
    sc, mn, rest = np.ascontiguousarray(subs).view("<u4").T
    low, top = np.uint32(0x3F3F3F3F), np.uint32(2)
    sc_words = np.stack([sc & low, rest & LOW_4 | (sc >> top) & HIGH_2_OF_6], axis=1)
    mn_words = np.stack([mn & low, rest >> np.uint32(4) & LOW_4 | (mn >> top) & HIGH_2_OF_6], axis=1)
    return sc_words.view(np.uint8), mn_words.view(np.uint8)
