"""Matrix products of 16-bit numbers, on processors that have no instructions for them too.

    Y = X W^T + b,   dX = dY W,   dW = dY^T X          summed in float32, rounded once

There torch multiplies bfloat16 at a fifth of float32's speed (26 and 120 GFLOP/s on a core of Cascade Lake). So blocks
of both factors are widened to float32, where every 16-bit number is exact, and the sums are rounded as they would be:
nothing changes but their order. A dL/dW that is used up at once is not rounded at all (`product_dtype`), so gradients
differ between such processors and others by its rounding. Three blocks lie in `lrqat.methods.place`, whatever the size.
Wherever a processor has the instructions, and on a GPU, it is torch's own product; so is X W^T of a few rows.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from lrqat.methods.place import passing

BLOCK = 1024  # rows and columns: of a whole block, widening costs a tenth of the product; three take 12 MB
FEW = 16  # rows, below which widening W costs more than it saves in X W^T; dY W pays at one (6 times; 30 at 8)

# What `torch.cpu.get_capabilities` calls what oneDNN's products need, of x86 and of ARM.
INSTRUCTIONS = {
    torch.bfloat16: ("avx512_bf16", "amx_bf16", "avx_ne_convert", "bf16", "sve_bf16"),
    torch.float16: ("avx512_fp16", "amx_fp16", "avx_ne_convert", "fp16_arith"),
}


@cache
def widens(dtype: torch.dtype, device: str) -> bool:
    """Whether products of this dtype are taken in float32; `device` is a type. Never by a torch that cannot tell."""
    capabilities = getattr(torch.cpu, "get_capabilities", None)  # newer than torch 2.6
    if device != "cpu" or dtype not in INSTRUCTIONS or capabilities is None:
        return False
    found = capabilities()
    return not any(found.get(name, False) for name in INSTRUCTIONS[dtype])


def product_dtype(factor: Tensor) -> torch.dtype:
    """In which a product is there before it is rounded: float32, or the factors' own."""
    return torch.float32 if widens(factor.dtype, factor.device.type) else factor.dtype


def product(
    left_MK: Tensor,
    right_KN: Tensor,
    bias_N: Tensor | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """left right + bias; not differentiable.

    Args:
        left_MK: float matrix.
        right_KN: of the same dtype.
        bias_N: added before rounding.
        out: where the result goes, [M, N]; of `product_dtype`, if not of the factors'.
    """
    few = len(left_MK) < FEW and right_KN.stride(0) == 1 and (out is None or out.dtype == left_MK.dtype)
    if few or not widens(left_MK.dtype, left_MK.device.type):
        if bias_N is None:
            return torch.mm(left_MK, right_KN, out=out)
        return torch.addmm(bias_N, left_MK, right_KN, out=out)
    (rows, inner), columns = left_MK.shape, right_KN.shape[1]
    if out is None:
        out = left_MK.new_empty(rows, columns)
    for m in _blocks(rows):
        for n in _blocks(columns):
            sums = out[m, n]
            if out.dtype != torch.float32:
                sums = passing((m.stop - m.start, n.stop - n.start), torch.float32, out.device, "sums")
            if bias_N is None:
                sums.zero_()
            else:
                sums.copy_(bias_N[n])
            for k in _blocks(inner):
                sums.addmm_(_wide(left_MK[m, k], "left"), _wide(right_KN[k, n], "right"))
            if out.dtype != torch.float32:
                out[m, n] = sums
    return out


def _wide(block: Tensor, use: str) -> Tensor:
    """In float32 and in the block's own order of rows and columns."""
    if block.stride(0) < block.stride(1):
        return _wide(block.T, use).T
    return passing((block.shape[0], block.shape[1]), torch.float32, block.device, use).copy_(block)


def _blocks(size: int) -> list[slice]:
    """Of a dimension."""
    return [slice(start, min(start + BLOCK, size)) for start in range(0, size, BLOCK)]
