"""Losses on the head: torch's own values and gradients, at any number of tokens, never T x V at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lrqat.errors import LrqatError
from lrqat.losses import CHUNK_TOKENS, Head, body_and_head, head_loss

HIDDEN, WORDS = 24, 331
# Logits and gradients are rounded to the dtype once each (8 significant bits in bfloat16), and summed over words.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2.0**-7}  # the dtypes that are trained in
KD_FACTOR = 4  # q - p is about a quarter of q here, and both carry the rounding of their logits


def sample(tokens: int, dtype: torch.dtype, words: int = WORDS) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Student and teacher hidden states [T, H], head [V, H], next tokens [T]."""
    g = torch.Generator().manual_seed(tokens)
    student = torch.randn(tokens, HIDDEN, generator=g)
    teacher = student + 0.3 * torch.randn(tokens, HIDDEN, generator=g)
    head = torch.randn(words, HIDDEN, generator=g) / 2
    ids = torch.randint(0, words, (tokens,), generator=g)
    return student.to(dtype).requires_grad_(), teacher.to(dtype), head.to(dtype), ids


CAP = 3.0  # logits of the sample reach beyond it


@pytest.mark.parametrize("tokens", [1, CHUNK_TOKENS + 5])
@pytest.mark.parametrize("target", ["teacher", "ids"])
def test_soft_capped_logits_have_torchs_value_and_gradient(target: str, tokens: int) -> None:
    student, teacher, head, ids = sample(tokens, torch.float32)
    found = head_loss(student[None], Head(head, CAP), teacher[None] if target == "teacher" else ids[None])
    (grad,) = torch.autograd.grad(found, student)
    log_q, log_p = (Head(head.double(), CAP).logits(h.double()).log_softmax(1) for h in (student, teacher))
    expected = F.nll_loss(log_q, ids)
    if target == "teacher":
        expected = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    (wanted,) = torch.autograd.grad(expected, student)
    assert abs(found.item() - expected.item()) <= TOLERANCE[torch.float32] * max(1.0, expected.item())
    assert (grad - wanted).norm() <= KD_FACTOR * TOLERANCE[torch.float32] * wanted.norm()


def test_a_teacher_with_a_head_of_its_own_is_multiplied_by_it() -> None:
    student, teacher, head, _ = sample(CHUNK_TOKENS + 5, torch.float32)
    rounded = (8 * head).round() / 8
    found = head_loss(student[None], Head(rounded), teacher[None], Head(head))
    (grad,) = torch.autograd.grad(found, student)
    log_q, log_p = student.double() @ rounded.double().T, teacher.double() @ head.double().T
    expected = F.kl_div(log_q.log_softmax(1), log_p.log_softmax(1), reduction="batchmean", log_target=True)
    (wanted,) = torch.autograd.grad(expected, student)
    assert abs(found.item() - expected.item()) <= TOLERANCE[torch.float32] * max(1.0, expected.item())
    assert (grad - wanted).norm() <= KD_FACTOR * TOLERANCE[torch.float32] * wanted.norm()


def kd(student: Tensor, teacher: Tensor, head: Tensor, ids: Tensor) -> Tensor:
    """KL by torch, in float64."""
    log_q, log_p = ((h.double() @ head.double().T).log_softmax(1) for h in (student, teacher))
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def ce(student: Tensor, teacher: Tensor, head: Tensor, ids: Tensor) -> Tensor:
    """Cross-entropy by torch, in float64."""
    return F.cross_entropy(student.double() @ head.double().T, ids)


@pytest.mark.parametrize("dtype", sorted(TOLERANCE, key=str), ids=str)
@pytest.mark.parametrize("tokens", [1, CHUNK_TOKENS - 1, CHUNK_TOKENS, CHUNK_TOKENS + 1, 3 * CHUNK_TOKENS - 5])
@pytest.mark.parametrize("reference", [kd, ce])
def test_value_and_gradient_are_torchs(reference: Any, tokens: int, dtype: torch.dtype) -> None:
    student, teacher, head, ids = sample(tokens, dtype)
    found = head_loss(student[None], Head(head), teacher[None] if reference is kd else ids[None])
    (3 * found).backward()
    grad, student.grad = student.grad, None
    expected = reference(student, teacher, head, ids)
    (3 * expected).backward()
    assert found.dtype == torch.float32 and grad is not None and student.grad is not None
    tolerance = TOLERANCE[dtype] * (KD_FACTOR if reference is kd else 1)
    assert abs(found.item() - expected.item()) <= tolerance * max(1.0, expected.item())
    assert (grad.double() - student.grad.double()).norm() <= tolerance * student.grad.double().norm()


@pytest.mark.parametrize("dtype", sorted(TOLERANCE, key=str), ids=str)
@pytest.mark.parametrize("reference", [kd, ce])
def test_gradients_do_not_fade_with_many_tokens_and_words(reference: Any, dtype: torch.dtype) -> None:
    student, teacher, head, ids = sample(1024, dtype, words=16384)
    with torch.no_grad():
        head.mul_(0.1)  # a flat distribution: probabilities of 1 / V, gradients of 1 / (V T) = 6e-8
    head_loss(student[None], Head(head), teacher[None] if reference is kd else ids[None]).backward()
    grad, student.grad = student.grad, None
    reference(student, teacher, head, ids).backward()
    assert grad is not None and student.grad is not None
    tolerance = TOLERANCE[dtype] * (KD_FACTOR if reference is kd else 1)
    assert (grad.double() - student.grad.double()).norm() <= tolerance * student.grad.double().norm()


@pytest.mark.parametrize("target", ["teacher", "ids"])
def test_batches_are_the_tokens_in_a_row(target: str) -> None:
    student, teacher, head, ids = sample(60, torch.float32)
    wanted = head_loss(student[None], Head(head), teacher[None] if target == "teacher" else ids[None])
    split = teacher.view(3, 20, -1) if target == "teacher" else ids.view(3, 20)
    assert torch.equal(head_loss(student.view(3, 20, -1), Head(head), split), wanted)


def test_a_student_that_is_its_teacher_has_no_loss_and_no_gradient() -> None:
    student, _, head, _ = sample(200, torch.float32)
    loss = head_loss(student[None], Head(head), student.detach()[None])
    loss.backward()
    assert loss.item() == 0.0 and student.grad is not None and not student.grad.any()


def test_huge_logits_stay_finite() -> None:
    student, teacher, head, ids = sample(10, torch.float32)
    for target in (teacher[None] * 1e4, ids[None]):
        loss = head_loss(student[None] * 1e4, Head(head), target)
        (grad,) = torch.autograd.grad(loss, student, retain_graph=True)
        assert loss.isfinite() and grad.isfinite().all()


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation gave."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize("reference", [kd, ce])
def test_logits_of_all_tokens_never_exist_at_once(reference: Any) -> None:
    tokens = 8 * CHUNK_TOKENS
    student, teacher, head, ids = sample(tokens, torch.float32, words=2000)
    with Largest() as largest:
        head_loss(student[None], Head(head), teacher[None] if reference is kd else ids[None]).backward()
    assert largest.numel == CHUNK_TOKENS * 2000
    student.grad = None
    with Largest() as naive:
        reference(student, teacher, head, ids).backward()
    assert naive.numel == tokens * 2000, "the measure must see what it is to forbid"


def test_only_the_hidden_states_gradient_is_kept_for_backward() -> None:
    student, teacher, head, _ = sample(300, torch.float32)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        head_loss(student[None], Head(head), teacher[None])
    assert sum(t.nbytes for t in saved) == student.nbytes


def test_the_head_is_a_plain_matrix_product_or_refused(tiny_model_dir: Any) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()
    body, head = body_and_head(model)
    assert body is model.model and head.weight_VH is model.lm_head.weight and head.cap is None
    forward = model.forward

    def scaled(*args: Any, **options: Any) -> Any:
        output = forward(*args, **options)
        output.logits = output.logits / 2
        return output

    model.forward = scaled
    with pytest.raises(LrqatError, match=r"^LlamaForCausalLM: [^\n]*scaling[^\n]*$"):
        body_and_head(model)
    with pytest.raises(LrqatError, match="expected a causal language model"):
        body_and_head(model.model)
