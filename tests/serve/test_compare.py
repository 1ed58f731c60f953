"""Comparison: the figures are what whole softmaxes give, and every limit can fail a model."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.compare import EXACT, LLAMACPP, ROWS, VLLM_BFLOAT16, VLLM_FLOAT16, Comparison, Limits, over_http, within

WORDS = 50
ALL = {"exact": EXACT, "llama.cpp": LLAMACPP, "vllm-float16": VLLM_FLOAT16, "vllm-bfloat16": VLLM_BFLOAT16}
FLOAT64 = 1e-9  # sums in float64, in another order


def sample(tokens: int, noise: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Logits of a reference and a runtime, and the tokens."""
    rng = np.random.default_rng(seed)
    reference = rng.normal(size=(tokens, WORDS)).astype(np.float32) * 3
    got = reference + noise * rng.normal(size=(tokens, WORDS)).astype(np.float32)
    return reference, got, rng.integers(0, WORDS, tokens).tolist()


def compare(*sequences: tuple[np.ndarray, np.ndarray, list[int]]) -> dict[str, float]:
    comparison = Comparison()
    for reference, got, ids in sequences:
        comparison.add(reference, got, ids)
    return comparison.figures()


@given(st.integers(2, 3 * ROWS), st.floats(0.01, 2.0), st.integers(0, 1000))
@settings(max_examples=30)
def test_figures_are_those_of_whole_softmaxes(tokens: int, noise: float, seed: int) -> None:
    reference, got, ids = sample(tokens, noise, seed)
    log_p, log_q = (torch.from_numpy(x[:-1]).double().log_softmax(1) for x in (reference, got))
    following = torch.tensor(ids[1:])[:, None]
    wanted, found = log_p.gather(1, following), log_q.gather(1, following)
    difference = got[:-1].astype(np.float64) - reference[:-1]
    assert compare((reference, got, ids)) == pytest.approx(
        {
            "positions": tokens - 1,
            "kl": (log_p.exp() * (log_p - log_q)).sum(1).mean().item(),
            "top1": float((reference[:-1].argmax(1) == got[:-1].argmax(1)).mean()),
            "perplexity": math.exp(-found.mean().item()),
            "perplexity_reference": math.exp(-wanted.mean().item()),
            "perplexity_change": math.exp((wanted - found).mean().item()) - 1,
            "logprob_difference_mean": (wanted - found).abs().mean().item(),
            "logprob_difference_max": (wanted - found).abs().max().item(),
            "relative_l2": np.linalg.norm(difference) / np.linalg.norm(reference[:-1].astype(np.float64)),
        },
        rel=1e-6,  # differences of float32 logits
        abs=FLOAT64,
    )


def test_a_runtime_that_computes_the_same_differs_in_nothing() -> None:
    reference, _, ids = sample(100, 0)
    figures = compare((reference, reference, ids))
    assert figures["kl"] == figures["relative_l2"] == figures["logprob_difference_max"] == 0.0
    assert figures["top1"] == 1.0 and figures["perplexity_change"] == 0.0
    assert all(within(figures, limits) for limits in ALL.values())


def test_logits_and_log_probabilities_are_compared_alike() -> None:
    reference, got, ids = sample(80, 0.1)
    shifted = got - np.arange(80, dtype=np.float32)[:, None] / 64
    plain, moved = compare((reference, got, ids)), compare((reference, shifted, ids))
    for name in ("kl", "top1", "perplexity", "logprob_difference_mean"):
        assert moved[name] == pytest.approx(plain[name], rel=1e-4)  # float32 logits moved by up to 1.25


def test_a_runtime_may_leave_out_the_last_row_and_pad_the_vocabulary() -> None:
    reference, got, ids = sample(70, 0.1)
    padded = np.pad(got[:-1], ((0, 0), (0, 14)), constant_values=99)
    assert compare((reference, padded, ids)) == compare((reference, got, ids))


def test_sequences_weigh_by_their_positions() -> None:
    parts = [sample(20, 0.1, 1), sample(90, 0.5, 2)]
    whole, single = compare(*parts), [compare(part) for part in parts]
    assert whole["positions"] == 19 + 89
    for name in ("kl", "top1", "logprob_difference_mean"):
        assert whole[name] == pytest.approx((19 * single[0][name] + 89 * single[1][name]) / 108, rel=FLOAT64)


KEPT = {"kl": 0.0, "top1": 1.0, "perplexity_change": 0.0, "logprob_difference_mean": 0.0, "relative_l2": 0.0}
FIELDS = [
    ("kl", "kl", 1),
    ("top1", "top1", -1),
    ("perplexity_change", "perplexity", 1),
    ("logprob_difference_mean", "logprob", 1),
    ("relative_l2", "relative_l2", 1),
]


@pytest.mark.parametrize("limits", ALL.values(), ids=ALL)
@pytest.mark.parametrize(("figure", "limit", "direction"), FIELDS)
def test_each_limit_alone_can_fail_a_model(limits: Limits, figure: str, limit: str, direction: int) -> None:
    assert within(KEPT, limits)
    bound: float = getattr(limits, limit)
    if math.isinf(bound):
        assert within({**KEPT, figure: math.inf}, limits)
        return
    assert within({**KEPT, figure: bound}, limits)
    assert not within({**KEPT, figure: bound + direction * max(1e-9, 1e-6 * bound)}, limits)
    assert not within({**KEPT, figure: math.nan}, limits)


@pytest.mark.parametrize("limits", ALL.values(), ids=ALL)
def test_perplexity_may_not_improve_beyond_its_limit_either(limits: Limits) -> None:
    assert not within({**KEPT, "perplexity_change": -2 * limits.perplexity}, limits)


def test_nan_logits_never_pass() -> None:
    reference, got, ids = sample(30, 0.0)
    got = got.copy()
    got[3, 7] = np.nan
    figures = compare((reference, got, ids))
    assert not any(within(figures, limits) for limits in ALL.values())


def test_the_exact_limits_are_the_strictest_and_every_limit_says_why() -> None:
    for limits in (LLAMACPP, VLLM_FLOAT16, VLLM_BFLOAT16):
        assert EXACT.kl < limits.kl and EXACT.top1 > limits.top1 and EXACT.logprob < limits.logprob
        assert limits.why
    assert VLLM_FLOAT16.kl < VLLM_BFLOAT16.kl


def test_a_runtime_off_by_one_position_fails_every_limit() -> None:
    reference, _, ids = sample(100, 0.0)
    figures = compare((reference, np.roll(reference, 1, axis=0), ids))
    assert not any(within(figures, replace(limits, relative_l2=math.inf)) for limits in ALL.values())


@given(st.integers(2, 20), st.floats(0.01, 2.0), st.integers(0, 1000))
@settings(max_examples=30)
def test_a_list_of_all_tokens_says_what_logits_say(tokens: int, noise: float, seed: int) -> None:
    reference, got, ids = sample(tokens, noise, seed)
    log_q = torch.from_numpy(got[:-1]).double().log_softmax(1)
    listed = Comparison()
    listed.add_listed(reference, [dict(enumerate(row.tolist())) for row in log_q], ids)
    expected, found = compare((reference, got, ids)), listed.figures()
    assert math.isnan(found.pop("relative_l2")) and expected.pop("relative_l2") > 0
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)  # of LEAST, the event that nothing is listed


@given(st.integers(2, 20), st.integers(1, 10), st.integers(0, 1000))
@settings(max_examples=30)
def test_a_list_of_some_tokens_never_says_more_than_all(tokens: int, known: int, seed: int) -> None:
    reference, got, ids = sample(tokens, 0.5, seed)
    log_q = torch.from_numpy(got[:-1]).double().log_softmax(1)
    listed = Comparison()
    top = log_q.topk(known, 1)
    rows = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    listed.add_listed(reference, [dict(zip(*row, strict=True)) for row in rows], ids)
    found, whole = listed.figures(), compare((reference, got, ids))
    assert 0 <= found["kl"] <= whole["kl"] + FLOAT64 and found["top1"] == whole["top1"]


@pytest.mark.parametrize("limits", ALL.values(), ids=ALL.keys())
def test_limits_over_http_are_wider_and_tighten_with_positions(limits: Limits) -> None:
    few, many = over_http(limits, 64), over_http(limits, 6400)
    assert few.kl == many.kl == limits.kl and few.logprob == limits.logprob
    assert few.top1 <= many.top1 <= limits.top1 and few.perplexity > many.perplexity > limits.perplexity
    assert few.top1 == pytest.approx(limits.top1 - 3 * math.sqrt(limits.top1 * (1 - limits.top1) / 64))
