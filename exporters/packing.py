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

import torch
from torch import Tensor

WORD_BITS = 32


def codes_per_block(bits: int) -> int:
    """Fewest codes that fill whole words: the length of a packed axis is a multiple of it."""
    return math.lcm(bits, WORD_BITS) // bits


def pack(codes: Tensor, bits: int, axis: int = -1) -> Tensor:
    """uint8 codes below 2^bits -> int32 words; `axis` shrinks from n to n*bits/32.

    Byte by byte: the codes that fill whole bytes (2 at 4 bits, 8 at 3 bits) are or-ed in one column at a time,
    so beside the result only one such column exists.
    """
    rows = codes.movedim(axis, -1)
    assert codes.dtype == torch.uint8 and rows.shape[-1] % codes_per_block(bits) == 0
    period, places = _places(bits)
    rows = rows.unflatten(-1, (-1, period))
    stream = torch.zeros(*rows.shape[:-1], period * bits // 8, dtype=torch.uint8, device=codes.device)
    for index, (byte, shift) in enumerate(places):
        stream[..., byte] |= rows[..., index] << shift
        if shift + bits > 8:
            stream[..., byte + 1] |= rows[..., index] >> (8 - shift)
    return stream.flatten(-2).view(torch.int32).movedim(-1, axis)


def unpack(words: Tensor, bits: int, axis: int = -1) -> Tensor:
    """int32 words -> uint8 codes: the inverse of `pack`."""
    rows = words.movedim(axis, -1).contiguous()
    assert words.dtype == torch.int32 and rows.shape[-1] * WORD_BITS % bits == 0
    period, places = _places(bits)
    stream = rows.view(torch.uint8).unflatten(-1, (-1, period * bits // 8))
    codes = torch.empty(*stream.shape[:-1], period, dtype=torch.uint8, device=words.device)
    for index, (byte, shift) in enumerate(places):
        code = stream[..., byte] >> shift
        if shift + bits > 8:
            code |= stream[..., byte + 1] << (8 - shift)
        codes[..., index] = code & ((1 << bits) - 1)
    return codes.flatten(-2).movedim(-1, axis)


def _places(bits: int) -> tuple[int, list[tuple[int, int]]]:
    """Fewest codes that fill whole bytes; for each of them its first byte and its lowest bit there."""
    period = math.lcm(bits, 8) // bits
    return period, [divmod(index * bits, 8) for index in range(period)]
