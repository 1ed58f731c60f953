"""Dense little-endian bit packing of b-bit codes into int32 words.

Code k of a row occupies bits [k*b, k*b + b) of the row's bit stream; bit n of the stream is bit n % 32 of word
n // 32. When b divides 32 that is 32/b codes a word, lowest first. At 3 bits codes cross the words: 32 codes
in 3 words, of which code 10 has two bits in word 0 and one in word 1.

    b = 4, codes 1 2 3 4 5 6 7 8              ->  0x87654321
    b = 3, codes 1, nine 0, 7, 5, twenty 0    ->  0xc0000001 0x0000000b 0x00000000

GPTQ packs weights so along I and zeros along O, compressed-tensors both along the last axis; AWQ permutes the
codes first. Source: `pack` in AutoGPTQ/AutoGPTQ@058fd80:auto_gptq/nn_modules/qlinear/qlinear_cuda.py, whose cases
for 2, 4, 8 and for 3 bits are this one stream. Little-endian hosts only, as torch's own safetensors reader.

Refuses nothing: exporters have asked `carries` before, so what they pass is asserted only.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

WORD_BITS = 32
LANE = 8  # codes that close up at once, as the bytes of one int64
TILE = 1 << 17  # codes: what a core's L2 cache holds together with its temporaries


def codes_per_block(bits: int) -> int:
    """Fewest codes that fill whole words: the length of a packed axis is a multiple of it."""
    return math.lcm(bits, WORD_BITS) // bits


def pack(codes: Tensor, bits: int, axis: int = -1) -> Tensor:
    """uint8 codes below 2^bits -> int32 words; `axis` shrinks from n to n*bits/32. At 8 bits it may be a view.

    Rows fill whole words, so they are packed as one stream; beside the result only tiles of it exist.
    """
    rows = codes.movedim(axis, -1).contiguous()
    assert codes.dtype == torch.uint8 and rows.shape[-1] % codes_per_block(bits) == 0
    if rows.storage_offset() % LANE:
        rows = rows.clone()  # int64 views are aligned
    shape = *rows.shape[:-1], rows.shape[-1] * bits // WORD_BITS
    if bits == 8:
        return rows.view(-1).view(torch.int32).view(shape).movedim(-1, axis)
    words = torch.empty(shape, dtype=torch.int32, device=codes.device)
    if words.numel():
        tiles = words.view(-1).split(TILE * bits // WORD_BITS)
        for tile, words_of_tile in zip(rows.view(-1).split(TILE), tiles, strict=True):
            _pack_tile(tile.numpy(), bits, words_of_tile.numpy().view(np.uint32))
    return words.movedim(-1, axis)


def _pack_tile(codes: np.ndarray, bits: int, words: np.ndarray) -> None:
    while 2 * bits <= 8:  # neighbours share a byte: half as many codes, twice as wide
        pairs = codes.view(np.uint16)
        codes = (pairs >> np.uint16(8 - bits) | pairs).astype(np.uint8)
        bits *= 2
    if bits == 8:
        words.view(np.uint8)[:] = codes
    else:
        _pack_wide(codes, bits, words)


def _pack_wide(codes: np.ndarray, bits: int, words: np.ndarray) -> None:
    """Five to seven bits: the bytes of a u64 close up in three steps; two or four such lanes make whole words."""
    lanes = codes.view(np.uint64)
    for width in (8, 16, 32):
        kept = bits * width // 8
        low = sum(((1 << kept) - 1) << place for place in range(0, 64, 2 * width))
        lanes = lanes & np.uint64(low) | lanes >> np.uint64(width - kept) & np.uint64(low << kept)
    lane_bits = LANE * bits
    blocks = lanes.reshape(-1, codes_per_block(bits) // LANE)
    words = words.reshape(len(blocks), -1)
    for word in range(words.shape[1]):
        first, last = word * WORD_BITS // lane_bits, ((word + 1) * WORD_BITS - 1) // lane_bits
        found = blocks[:, first] >> np.uint64(word * WORD_BITS - first * lane_bits)
        if last > first:
            found |= blocks[:, last] << np.uint64(last * lane_bits - word * WORD_BITS)
        words[:, word] = found.astype(np.uint32)  # its low 32 bits


def unpack(words: Tensor, bits: int, axis: int = -1) -> Tensor:
    """int32 words -> uint8 codes: the inverse of `pack`."""
    rows = words.movedim(axis, -1).contiguous()
    assert words.dtype == torch.int32 and rows.shape[-1] * WORD_BITS % bits == 0
    period = math.lcm(bits, 8) // bits  # fewest codes that fill whole bytes
    stream = rows.view(torch.uint8).unflatten(-1, (-1, period * bits // 8))
    codes = torch.empty(*stream.shape[:-1], period, dtype=torch.uint8, device=words.device)
    for index in range(period):
        byte, shift = divmod(index * bits, 8)
        code = stream[..., byte] >> shift
        if shift + bits > 8:
            code |= stream[..., byte + 1] << (8 - shift)
        codes[..., index] = code & ((1 << bits) - 1)
    return codes.flatten(-2).movedim(-1, axis)
