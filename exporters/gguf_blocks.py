"""ggml block types: the bytes of `Q4_0` and `Q8_0`, from codes and scales, and back.

A row of a matrix is a run of blocks of 32 columns; the value of a column is d * q, q signed.

    Q4_0   18 bytes, 4.5 bits a weight
      0..1    d    fp16, little endian
      2..17   qs   byte j: column j in the low nibble, column j + 16 in the high nibble, both as q + 8

    Q8_0   34 bytes, 8.5 bits a weight
      0..1    d    fp16, little endian
      2..33   qs   column j as int8 q

Source: block_q4_0 and block_q8_0 in ggml-org/llama.cpp ggml/src/ggml-common.h.

Our grids keep unsigned codes and a zero: w = s * (code - z). A symmetric grid has z = 2^(bits-1), so q = code - z
lies in -2^(bits-1) .. 2^(bits-1) - 1: 2 to 4 bits fit Q4_0, 5 to 8 bits fit Q8_0, and d = s, whatever its sign.
Integers are moved and scales repeated; no float is computed. A group wider than 32 columns is the same scale in
several blocks.

    w4, codes 0 and 15 in columns 0 and 16, 8 elsewhere, scale 0.5 (fp16 0x3800), as Q4_0:
        00 38  f0 88 88 88 88 88 88 88 88 88 88 88 88 88 88 88     w[0] = 0.5 * (0 - 8), w[16] = 0.5 * (15 - 8)
    the same numbers, codes 120 and 135 of w8, as Q8_0:
        00 38  f8 00 .. 00  07 00 .. 00                            column 0 is -8, column 16 is 7

Refuses nothing: `exporters.gguf.carries` has been asked before, so what is passed is asserted only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

COLUMNS = 32  # columns of a block, in both types
SCALE_BYTES = 2
Q4_0_ZERO = 8  # a stored nibble is q + 8
ROW_TILE_CODES = 1 << 19  # codes packed at a time: the working memory stays in the cache


@dataclass(frozen=True)
class BlockType:
    """A ggml block type.

    Attributes:
        name: as ggml spells it.
        ggml_type: its number in a tensor's header.
        file_type: `general.file_type` of a file that mostly holds it.
        nbytes: bytes of a block.
    """

    name: str
    ggml_type: int
    file_type: int
    nbytes: int

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row."""
        return columns // COLUMNS * self.nbytes


Q4_0 = BlockType("Q4_0", ggml_type=2, file_type=2, nbytes=18)
Q8_0 = BlockType("Q8_0", ggml_type=8, file_type=7, nbytes=34)


def block_type(bits: int) -> BlockType:
    """The type that stores a symmetric grid of this width."""
    return Q4_0 if bits <= 4 else Q8_0


def pack(codes_OI: Tensor, scales_OG: Tensor, bits: int) -> Tensor:
    """Codes and fp16 scales of a symmetric grid -> uint8 [O, bytes of a row], of type `block_type(bits)`."""
    rows, columns = codes_OI.shape
    kind = block_type(bits)
    repeat = columns // COLUMNS // scales_OG.shape[1]
    assert codes_OI.dtype == torch.uint8 and scales_OG.dtype == torch.float16
    assert scales_OG.shape[1] * repeat * COLUMNS == columns
    packed = torch.empty(rows, columns // COLUMNS, kind.nbytes, dtype=torch.uint8, device=codes_OI.device)
    pack_codes = _pack_nibbles if kind is Q4_0 else _pack_bytes
    tile = max(1, ROW_TILE_CODES // columns)
    for start in range(0, rows, tile):
        part = slice(start, min(start + tile, rows))
        d_OBS = scales_OG[part].repeat_interleave(repeat, dim=1).view(torch.uint8).unflatten(1, (-1, SCALE_BYTES))
        packed[part, :, :SCALE_BYTES] = d_OBS
        pack_codes(codes_OI[part].reshape(-1, columns // COLUMNS, COLUMNS), bits, packed[part, :, SCALE_BYTES:])
    return packed.view(rows, kind.row_bytes(columns))


def unpack(packed: Tensor, kind: BlockType) -> tuple[Tensor, Tensor]:
    """uint8 [O, bytes of a row] -> int8 q [O, I] and fp16 d [O, I / 32]: the inverse, with signed codes."""
    blocks = packed.contiguous().view(packed.shape[0], -1, kind.nbytes)
    d_OB = blocks[:, :, :SCALE_BYTES].contiguous().view(torch.float16).squeeze(-1)
    qs = blocks[:, :, SCALE_BYTES:]
    q = torch.cat([qs & 0x0F, qs >> 4], dim=-1).view(torch.int8) - Q4_0_ZERO if kind is Q4_0 else qs.view(torch.int8)
    return q.flatten(1), d_OB


def _pack_nibbles(codes_OBC: Tensor, bits: int, out: Tensor) -> None:
    """Q4_0: byte j = column j | column j + 16 << 4, of code + (8 - z); no nibble overflows into the other."""
    shift = Q4_0_ZERO - (1 << (bits - 1))
    low, high = codes_OBC[:, :, : COLUMNS // 2], codes_OBC[:, :, COLUMNS // 2 :]
    bytes_OBJ = high << 4
    bytes_OBJ |= low
    out.copy_(bytes_OBJ + 17 * shift if shift else bytes_OBJ)


def _pack_bytes(codes_OBC: Tensor, bits: int, out: Tensor) -> None:
    """Q8_0: byte j = code - z modulo 256, which is int8's two's complement."""
    out.copy_(codes_OBC - (1 << (bits - 1)))
