"""The negative control must differ from what it controls, on every width of codes."""

from __future__ import annotations

import pytest
import torch

from lrqat.fused import FusedCheckpoint, FusedSpec, Spec
from lrqat.grid import Grid
from lrqat.ptq import rtn
from serve.parity import requantized


@pytest.mark.parametrize("spelling", ["w6", "w8", "w8g32", "w8-asym", "q6_k"])
def test_of_more_than_five_bits_the_negative_control_keeps_four(spelling: str) -> None:
    grid, name = Grid.parse(spelling), "model.layers.0.mlp.up_proj.weight"
    weight_OI = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)) * 0.05
    fused = rtn(weight_OI, grid, None)
    checkpoint = FusedCheckpoint(
        tensors={name: fused},
        dense={},
        specs={name: FusedSpec(grid, (64, 256))},
        dense_specs=dict[str, Spec](),
        hf_config={},
        assets={},
    )
    control = requantized(checkpoint).tensors[name]
    control.check(name)
    assert len(grid.decode(control.codes_OI).unique()) <= 17 < len(grid.decode(fused.codes_OI).unique())
    off_OI = control.dequantize() - weight_OI
    assert 0.03 < (off_OI.norm() / weight_OI.norm()).item() < 0.3  # 4 bits, not nonsense
