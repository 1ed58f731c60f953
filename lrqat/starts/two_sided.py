"""Round with feedback from both sides, where outputs know of each other (YAQA's LDLQ, arXiv 2505.22988).

    E = W - W^,    error = tr(H_O E H_I E^T),    H_O = P D P^T,    H_I = K D' K^T         P, K unit upper
    error = sum D_r D'_c (P^T E K)_rc^2
    w^_rc = nearest(w_rc + what (P^T E K)_rc has of errors that are there already)

so each code is the best that it can be for rows above and columns before it, as GPTQ's is for columns before. Rows and
columns come in falling order of their diagonals. What is on one antidiagonal knows nothing of each other and is rounded
at once, in all tiles that lie on one as well; tiles of SIDE x SIDE keep the rest a matrix product.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lrqat.fused import FusedTensor
from lrqat.grid import Grid
from lrqat.starts.factor import unit_factor
from lrqat.starts.felt import Felt

SIDE = 128


@torch.no_grad()
def two_sided(weight_OI: Tensor, felt: Felt, fused: FusedTensor, damp: float, name: str = "weight") -> FusedTensor:
    """Other codes in the same ranges, or the same ones where these err less.

    Args:
        weight_OI: what was rounded, any float dtype.
        felt: H_I and H_O.
        fused: what it was rounded to.
        damp: share of the mean of each diagonal that is added to it.
        name: in messages.
    """
    grid, device = fused.grid, weight_OI.device
    column_I, row_O = (each.diagonal().argsort(descending=True, stable=True) for each in felt)
    affine = grid.affine({part: values.to(device, torch.float32) for part, values in fused.parts.items()}).rows(row_O)
    group_I = column_I // grid.columns_per_group(weight_OI.shape[1])
    # What is added to fill the last tiles up comes last, and nothing knows of it.
    above_OO = filled(unit_factor(felt.outputs_OO[row_O][:, row_O], damp, name))
    before_II = filled(unit_factor(felt.inputs_II[column_I][:, column_I], damp, name))
    scale_DRG = in_rows(affine.scale_OG)
    offset_DRG = torch.zeros_like(scale_DRG) if affine.offset_OG is None else in_rows(affine.offset_OG)
    group_AC = F.pad(group_I, (0, -len(group_I) % SIDE)).view(-1, SIDE)
    exact_OI = filled(weight_OI.float()[row_O][:, column_I])
    levels_OI, errors_OI, passed_OI = (torch.zeros_like(exact_OI) for _ in range(3))  # passed: P^T E
    exact, levels, errors, passed = map(in_tiles, (exact_OI, levels_OI, errors_OI, passed_OI))
    own_above, own_before = (in_tiles(each).diagonal().permute(2, 0, 1) for each in (above_OO, before_II))
    down, along = exact.shape[:2]
    for wave in range(down + along - 1):  # tiles of one antidiagonal know nothing of each other, either
        first, end = max(0, wave - along + 1), min(down, wave + 1)
        i_B = torch.arange(first, end, device=device)
        places = [(i * SIDE, (wave - i) * SIDE) for i in range(first, end)]
        here = i_B, wave - i_B
        group_BRC = group_AC[here[1]][:, None].expand(-1, SIDE, -1)
        scale_BRC, offset_BRC = (part_DRG[here[0]].gather(2, group_BRC) for part_DRG in (scale_DRG, offset_DRG))
        above_BRC = torch.stack([above_OO[:r, r : r + SIDE].T @ errors_OI[:r, c : c + SIDE] for r, c in places])
        before_BRC = torch.stack([passed_OI[r : r + SIDE, :c] @ before_II[:c, c : c + SIDE] for r, c in places])
        above_BRR, before_BCC = own_above[here[0]], own_before[here[1]]
        levels_BRC = tiles(exact[here] - offset_BRC, scale_BRC, above_BRC, before_BRC, above_BRR, before_BCC, grid)
        error_BRC = exact[here] - (levels_BRC * scale_BRC + offset_BRC)
        levels[here], errors[here] = levels_BRC, error_BRC
        passed[here] = above_BRC + above_BRR.mT @ error_BRC
    back_O, back_I = row_O.argsort(), column_I.argsort()
    found = FusedTensor.make(grid.encode(levels_OI[back_O][:, back_I]), fused.parts, grid)
    return min((fused, found), key=lambda one: error(weight_OI, one, felt))


def filled(values_OI: Tensor) -> Tensor:
    """With rows and columns of zeros added up to whole tiles."""
    rows, columns = values_OI.shape
    return F.pad(values_OI, (0, -columns % SIDE, 0, -rows % SIDE))


def in_rows(part_OG: Tensor) -> Tensor:
    """[O / SIDE, SIDE, G]: a grid's scales or offsets, 1 in rows that were added."""
    return F.pad(part_OG, (0, 0, 0, -len(part_OG) % SIDE), value=1.0).unflatten(0, (-1, SIDE))


def in_tiles(values_OI: Tensor) -> Tensor:
    """A view [O / SIDE, I / SIDE, SIDE, SIDE]."""
    return values_OI.unflatten(1, (-1, SIDE)).unflatten(0, (-1, SIDE)).transpose(1, 2)


def tiles(
    weight_BRC: Tensor, scale_BRC: Tensor, above_BRC: Tensor, before_BRC: Tensor, above_BRR: Tensor, before_BCC: Tensor,
    grid: Grid,
) -> Tensor:  # fmt: skip
    """Levels [B, R, C] of some tiles, given what (P^T E K) has of rows above them and of columns before them."""
    rows, columns = weight_BRC.shape[1:]
    # Turned upside down, an antidiagonal is a diagonal: a stretch of rows beside a stretch of columns.
    weight_BRC, scale_BRC, above_BRC, before_BRC = (
        each.flip(1) for each in (weight_BRC, scale_BRC, above_BRC, before_BRC)
    )
    above_BRR = without_diagonal(above_BRR.flip(1, 2))
    before_BCC = without_diagonal(before_BCC)
    levels_BRC, passed_BRC, errors_BCR = (torch.zeros_like(each) for each in (weight_BRC, weight_BRC, weight_BRC.mT))
    for number in range(rows + columns - 1):
        first, end = max(0, rows - 1 - number), min(rows, rows - 1 - number + columns)
        down, along = slice(first, end), slice(first + number - rows + 1, end + number - rows + 1)

        def diagonal(values_BRC: Tensor, down: slice = down, along: slice = along) -> Tensor:
            return values_BRC[:, down, along].diagonal(dim1=1, dim2=2)

        above_BD = diagonal(above_BRC) + (above_BRR[:, down] * errors_BCR[:, along]).sum(2)
        before_BD = diagonal(before_BRC) + (passed_BRC[:, down] * before_BCC[:, along]).sum(2)
        weight_BD, scale_BD = diagonal(weight_BRC), diagonal(scale_BRC)
        level_BD = grid.nearest((weight_BD + above_BD + before_BD) / scale_BD)
        error_BD = weight_BD - level_BD * scale_BD
        diagonal(levels_BRC).copy_(level_BD)
        diagonal(errors_BCR.mT).copy_(error_BD)
        diagonal(passed_BRC).copy_(error_BD + above_BD)
    return levels_BRC.flip(1)


def without_diagonal(unit_BKK: Tensor) -> Tensor:
    """Their transposes, 0 where they have 1."""
    found_BKK = unit_BKK.mT.contiguous()
    found_BKK.diagonal(dim1=1, dim2=2).zero_()
    return found_BKK


def error(weight_OI: Tensor, fused: FusedTensor, felt: Felt) -> float:
    """tr(H_O E H_I E^T)."""
    off_OI = weight_OI.float() - fused.dequantize().to(weight_OI.device, torch.float32)
    return float((felt.outputs_OO @ off_OI @ felt.inputs_II).mul_(off_OI).sum())
