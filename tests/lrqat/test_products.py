"""Widened products: the same sums, rounded once; only where a processor has no instructions for the dtype."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from lrqat.methods import products
from lrqat.methods.products import product


@pytest.fixture
def widened(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor without the instructions, in blocks of 5."""
    monkeypatch.setattr(products, "widens", lambda dtype, device: dtype != torch.float32)
    monkeypatch.setattr(products, "BLOCK", 5)
    monkeypatch.setattr(products, "FEW", 0)


@pytest.fixture
def cleared() -> Iterator[None]:
    """What is known of the processor is asked again, and afterwards once more."""
    products.widens.cache_clear()
    yield
    products.widens.cache_clear()


@pytest.mark.usefixtures("widened")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 4, 2), (5, 10, 5), (7, 11, 13), (1, 6, 0), (4, 0, 3)])
def test_sums_are_exact_and_rounded_once(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    rows, inner, columns = shape
    generator = torch.Generator().manual_seed(0)
    left, right, bias = (  # integers: float32 sums of their products are exact in any order
        torch.randint(-50, 50, size, generator=generator).to(dtype)
        for size in ((inner, rows), (columns, inner), (columns,))
    )
    exact = left.T.float() @ right.T.float()
    assert torch.equal(product(left.T, right.T), exact.to(dtype))
    assert torch.equal(product(left.T, right.T, bias), (exact + bias).to(dtype))
    unrounded = torch.empty(rows, columns, dtype=products.product_dtype(left))
    assert torch.equal(product(left.T, right.T, out=unrounded), exact) and unrounded.dtype == torch.float32
    place = torch.zeros(rows, columns + 2, dtype=dtype)
    product(left.T, right.T, out=place[:, 1:-1])
    assert torch.equal(place[:, 1:-1], exact.to(dtype)) and not place[:, [0, -1]].any()


@pytest.mark.usefixtures("cleared")
@pytest.mark.parametrize("named", ["avx512_bf16", "bf16", None])
def test_a_processor_with_the_instructions_uses_them(named: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    capabilities = {"avx512_f": True, "avx512_bf16": False} | ({named: True} if named else {})
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert products.widens(torch.bfloat16, "cpu") == (named is None)
    assert not products.widens(torch.float32, "cpu") and not products.widens(torch.bfloat16, "cuda")


@pytest.mark.usefixtures("cleared")
def test_a_torch_that_cannot_tell_leaves_products_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert not products.widens(torch.bfloat16, "cpu")


@pytest.mark.parametrize(("rows", "torchs"), [(1, True), (products.FEW - 1, True), (products.FEW, False)])
def test_of_few_rows_torch_multiplies_by_w_transposed_and_never_by_w(
    rows: int, torchs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    widened: list[str] = []
    wide = products._wide
    monkeypatch.setattr(products, "widens", lambda dtype, device: True)
    monkeypatch.setattr(products, "_wide", lambda block, use: widened.append(use) or wide(block, use))
    x, w, dy = (torch.randn(size, dtype=torch.bfloat16) for size in ((rows, 24), (40, 24), (rows, 40)))
    product(x, w.T)
    assert (widened == []) == torchs
    widened.clear()
    product(dy, w)
    assert widened == ["left", "right"]
