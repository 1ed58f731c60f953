"""Losses on the output head, chunk by chunk: the logits of all T tokens and V words never exist at once.

    KD   L = 1/N sum_t KL(p_t || q_t),  p = softmax(W h_teacher), q = softmax(W h_student)
    CE   L = 1/N sum_t -log q_t[next token]

Both have dL/dlogits = (q - p) / N with p the teacher's distribution or the one-hot target, so the gradient of
the hidden states is formed in the forward pass, chunk by chunk, and nothing else is kept (as Liger-Kernel does
for CE). The head is frozen. The teacher is present as its final hidden states alone (lrqat.teacher); where the
student's head is rounded, the teacher's own head is needed too: V x H more in memory.

A head in a mapped file is read in slices of words, whose pages are given back: it is then never resident as a whole.

Soft-capped logits (Gemma), z = cap tanh(W h / cap), have dz/d(W h) = 1 - (z / cap)^2.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lrqat.errors import LrqatError
from lrqat.methods.products import product
from lrqat.pages import give_back

CHUNK_TOKENS = 128  # tokens of one matrix product with the head
SLICE_BYTES = 1 << 26  # of a head in a mapped file, which are resident at once
CACHED_LOGITS = 1 << 18  # logits of one round of element-wise work: three float32 buffers fit in a core's L2 cache


class Head(NamedTuple):
    """An output head: logits = W h, or cap * tanh(W h / cap).

    Attributes:
        weight_VH: W.
        cap: of the logits.
        mapped: W lies in a mapped file and never changes.
    """

    weight_VH: Tensor
    cap: float | None = None
    mapped: bool = False

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., H] -> [..., V]."""
        logits = F.linear(hidden, self.weight_VH)
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap

    def slices(self) -> Iterator[slice]:
        """Of words, one at a time: the pages of the one before are given back."""
        words = len(self.weight_VH)
        count = max(1, -(-self.weight_VH.nbytes // SLICE_BYTES)) if self.mapped else 1
        each = -(-words // count)
        for start in range(0, words, each):
            chunk = slice(start, min(start + each, words))
            yield chunk
            if count > 1:
                give_back(self.weight_VH[chunk])

    def multiply(self, hidden_CH: Tensor, out_CV: Tensor) -> Tensor:
        """W h of each token, into `out_CV`."""
        for words in self.slices():
            product(hidden_CH, self.weight_VH[words].T, out=out_CV[:, words])
        return out_CV

    def transposed(self, grad_CV: Tensor) -> Tensor:
        """W^T g of each token; over several slices summed in float32."""
        sums_CH = None
        for words in self.slices():
            part_CH = product(grad_CV[:, words], self.weight_VH[words])
            if words.stop - words.start == len(self.weight_VH):
                return part_CH
            sums_CH = part_CH.float() if sums_CH is None else sums_CH.add_(part_CH)
        assert sums_CH is not None
        return sums_CH


class HeadLoss(torch.autograd.Function):
    """Mean loss over tokens of softmax(logits), for a teacher's hidden states or target ids."""

    @staticmethod
    def forward(ctx: Any, hidden_TH: Tensor, head: Head, target: Tensor, teacher: Head) -> Tensor:
        """Loss, float32 scalar.

        Args:
            hidden_TH: the student's final hidden states.
            head: the student's.
            target: int64 [T] next tokens (CE), or [T, H] the teacher's final hidden states (KD).
            teacher: the teacher's head.
        """
        tokens, words = len(hidden_TH), len(head.weight_VH)
        total = torch.zeros((), dtype=torch.float64, device=hidden_TH.device)
        grad_TH = torch.empty_like(hidden_TH)
        q_CV = hidden_TH.new_empty(min(CHUNK_TOKENS, tokens), words)
        p_CV = torch.empty_like(q_CV) if target.dim() == 2 else None
        step = max(1, CACHED_LOGITS // words) if hidden_TH.device.type == "cpu" else CHUNK_TOKENS
        for start in range(0, tokens, CHUNK_TOKENS):
            chunk = slice(start, min(start + CHUNK_TOKENS, tokens))
            count = chunk.stop - start
            student_CV = head.multiply(hidden_TH[chunk], q_CV[:count])
            teacher_CV = None
            if p_CV is not None:
                teacher_CV = teacher.multiply(target[chunk].to(teacher.weight_VH.dtype), p_CV[:count])
            for first in range(0, count, step):
                rows = slice(first, min(first + step, count))
                slope_KV = None if head.cap is None else soft_cap(student_CV[rows], head.cap)
                if teacher_CV is not None:
                    if head.cap is not None:
                        soft_cap(teacher_CV[rows], head.cap)
                    total += kd_rows(student_CV[rows], teacher_CV[rows])
                else:
                    total += ce_rows(student_CV[rows], target[chunk][rows])
                if slope_KV is not None:
                    student_CV[rows].mul_(slope_KV)
            grad_TH[chunk] = head.transposed(student_CV)
        for each in (head, teacher):
            if each.mapped:
                give_back(each.weight_VH)
        ctx.save_for_backward(grad_TH)
        ctx.tokens = tokens
        return (total / tokens).float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient of the hidden states."""
        (grad_TH,) = ctx.saved_tensors
        # 1/tokens comes last, so that 16-bit logits hold q - p at full precision.
        return (grad_TH * (grads[0].float() / ctx.tokens)).to(grad_TH.dtype), None, None, None


def soft_cap(logits_KV: Tensor, cap: float) -> Tensor:
    """z = cap * tanh(logits / cap) in place; returns dz/dlogits, float32."""
    tanh_KV = logits_KV.div_(cap).tanh_()
    slope_KV = 1 - tanh_KV.float().square()
    tanh_KV.mul_(cap)
    return slope_KV


def kd_rows(student_KV: Tensor, teacher_KV: Tensor) -> Tensor:
    """Sum over rows of KL(teacher || student); overwrites the student's logits with q - p.

    With logits shifted by their maximum, a and b, and their sums of exponentials A and B:
    KL = sum p (a_teacher - b_student) - log A + log B.
    """
    p, a_KV = exponentials(teacher_KV)
    q, b_KV = exponentials(student_KV)
    mass_a, mass_b = p.sum(1, keepdim=True), q.sum(1, keepdim=True)
    p.div_(mass_a)
    divergence = a_KV.sub_(b_KV).mul_(p).sum() - (mass_a.log() - mass_b.log()).sum()
    student_KV.copy_(q.div_(mass_b).sub_(p))
    return divergence


def ce_rows(student_KV: Tensor, target_K: Tensor) -> Tensor:
    """Sum over rows of -log q[target]; overwrites the student's logits with q - onehot."""
    q, b_KV = exponentials(student_KV)
    mass = q.sum(1, keepdim=True)
    nats = (mass.log() - b_KV.gather(1, target_K[:, None])).sum()
    q.div_(mass).scatter_add_(1, target_K[:, None], torch.full_like(mass, -1.0))
    student_KV.copy_(q)
    return nats


def exponentials(logits_KV: Tensor) -> tuple[Tensor, Tensor]:
    """(exp(x - max x), x - max x), float32."""
    shifted = logits_KV.float()
    shifted.sub_(shifted.amax(1, keepdim=True))
    return shifted.exp(), shifted


def head_loss(hidden_BTH: Tensor, head: Head, target: Tensor, teacher: Head | None = None) -> Tensor:
    """Mean loss per token.

    Args:
        hidden_BTH: the student's final hidden states.
        head: the student's head, frozen.
        target: [B, T] token ids (CE) or [B, T, H] the teacher's hidden states (KD).
        teacher: the teacher's head, where it is not the student's.
    """
    loss: Tensor = HeadLoss.apply(hidden_BTH.flatten(0, 1), head, target.flatten(0, 1), teacher or head)
    return loss


def final_states(body: Any, ids_BT: Tensor, positions_BT: Tensor | None = None) -> Tensor:
    """Final hidden states [B, T, H]; where positions begin again, another text begins."""
    places = {} if positions_BT is None else {"position_ids": positions_BT}  # not all models take them
    states_BTH: Tensor = body(ids_BT, use_cache=False, **places).last_hidden_state
    return states_BTH


def head_of(model: Any) -> Head:
    """The head of a causal language model, with the soft cap that its config names."""
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return Head(model.get_output_embeddings().weight, cap)


def body_and_head(model: Any) -> tuple[Any, Head]:
    """(the model up to its final hidden states, its head), checked on a few tokens.

    Raises:
        LrqatError: the head does more than a matrix product and soft-capping (scaling, a bias).
    """
    body = model.base_model
    if model.get_output_embeddings() is None or body is model:
        raise LrqatError(f"{type(model).__name__}: expected a causal language model with an output head")
    head = head_of(model)
    with torch.no_grad():
        ids = torch.arange(8, device=head.weight_VH.device)[None]
        hidden = body(ids, use_cache=False).last_hidden_state
        if not torch.equal(head.logits(hidden), model(ids, use_cache=False).logits):
            raise LrqatError(
                f"{type(model).__name__}: its head is no matrix product, soft-capped or not (scaling? a bias?); "
                "lrqat does not know it yet"
            )
    return body, head
