"""Compiled tiles: the same bits, the same gradients; and without a compiler everything goes on."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_methods import COLUMNS, FLOAT32_SUMS, make, perturb
from torch import Tensor

from lrqat.grid import Grid
from lrqat.methods.gains import GainQuantizer
from lrqat.methods.lr_qat import LRQAT
from lrqat.ranges import start

HOUSE = Path(__file__).resolve().parent.parent.parent
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ here")


def gradients(quantizer: GainQuantizer) -> list[Tensor]:
    """Of everything that is trained, and of the input."""
    x = torch.randn(9, COLUMNS, generator=torch.Generator().manual_seed(2), requires_grad=True)
    for parameter in quantizer.parameters():
        parameter.grad = None
    quantizer(x, None).square().sum().backward()
    return [t.grad for t in (x, *quantizer.parameters()) if t.grad is not None]


def check(quantizer: GainQuantizer) -> None:
    """Bitwise the same weight in both dtypes, the same gradients but for the order of sums."""
    perturb(quantizer)
    plain = [quantizer.weight(dtype) for dtype in (torch.float32, torch.bfloat16)], gradients(quantizer)
    quantizer.compiled = True
    compiled = [quantizer.weight(dtype) for dtype in (torch.float32, torch.bfloat16)], gradients(quantizer)
    assert all(map(torch.equal, plain[0], compiled[0]))
    assert len(plain[1]) == len(compiled[1]) > 1
    for one, other in zip(plain[1], compiled[1], strict=True):
        assert (one - other).abs().max() <= FLOAT32_SUMS * one.abs().max()


def lrqat(spelling: str) -> LRQAT:
    """Of a random weight."""
    weight_OI, grid = torch.randn(48, COLUMNS, generator=torch.Generator().manual_seed(0)) * 0.05, Grid.parse(spelling)
    options = {"rank": 4, "alpha": 4.0, "downcast": "fixed", "learn_scales": True}
    generator = torch.Generator().manual_seed(0)
    return LRQAT(weight_OI, start(weight_OI, grid, 2.0), grid, **options, generator=generator)  # type: ignore[arg-type]


@needs_compiler
@pytest.mark.parametrize("spelling", ["w4g32", "w3"])
@pytest.mark.parametrize("rows", [48, 20])
def test_compiled_lr_qat_has_the_bits_of_the_plain_one(
    spelling: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lrqat.ranges.COMPILED_WEIGHTS", rows * COLUMNS)  # of 48: one call, or three
    check(lrqat(spelling))


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("method", ["lsq", "l4q", "scales"])
@pytest.mark.parametrize("spelling", ["w3", "w4g32-min", "q4_k"])
def test_compiled_methods_have_the_bits_of_the_plain_ones(spelling: str, method: str) -> None:
    check(make(method, spelling))


@needs_compiler
def test_each_grid_has_its_own_limit_of_recompilations() -> None:
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        for spelling in ("w5", "w6", "w7"):
            quantizer = lrqat(spelling)
            plain = quantizer.weight()
            quantizer.compiled = True
            assert torch.equal(quantizer.weight(), plain)


WITHOUT = """
import sys
sys.path.insert(0, "tests/lrqat")
import torch
from lrqat.layers import QuantLinear, compile_tiles
from test_tiles import gradients, lrqat
model = torch.nn.Sequential(QuantLinear(lrqat("w4g64"), None))
compile_tiles(model)
assert not model[0].quantizer.compiled
assert gradients(model[0].quantizer)
"""


def test_training_goes_on_without_a_compiler(tmp_path: Path) -> None:
    environment = os.environ | {"CXX": "/no/such/compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", WITHOUT], env=environment, cwd=HOUSE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "going on without" in done.stderr
