"""Packing: conversations stay whole, and do not see each other."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lrqat.evaluate import hidden_states
from lrqat.packing import OPEN, Marked, pack

PAD = 999
texts = st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=20)


@given(st.lists(texts, max_size=2 * OPEN), st.integers(2, 24))
def test_what_fits_stays_whole_and_is_there_once(conversations: list[Marked], length: int) -> None:
    ids_NT, answers_NT, positions_NT = pack(conversations, length, PAD)
    assert ids_NT.shape[1] == length and answers_NT[:, 1:].any(1).all()
    found = []
    for ids_T, answers_T, positions_T in zip(ids_NT, answers_NT, positions_NT, strict=True):
        starts = [*(positions_T == 0).nonzero().flatten().tolist(), length]
        for start, end in pairwise(starts):
            assert torch.equal(positions_T[start:end], torch.arange(end - start))
            found.append((ids_T[start:end].tolist(), answers_T[start:end].tolist()))
    kept = [text[:length] for text in conversations if any(answer for _, answer in text[1:length])]
    wanted = [([i for i, _ in text], [False, *(answer for _, answer in text[1:])]) for text in kept]
    assert sorted(text for text in found if PAD not in text[0]) == sorted(wanted)


def test_blocks_are_filled_well() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(20, 200, (400,), generator=generator).tolist()
    ids_NT, _, _ = pack([[(1, True)] * length for length in lengths], 512, PAD)
    assert sum(lengths) / ids_NT.numel() > 0.96


def test_an_answer_that_is_cut_off_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    pack([[(1, False)] * 4 + [(2, True)] * 4, [(1, False)] * 8 + [(2, True)] * 4], 6, PAD)
    assert "not trained: 75.0% of the answers' tokens" in capsys.readouterr().err


def test_a_conversation_does_not_see_the_one_before(tiny_model_dir: Path) -> None:
    from transformers import AutoModelForCausalLM

    body: Any = AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval().base_model
    first, second = [(3 + i, True) for i in range(9)], [(40 + i, True) for i in range(14)]
    ids_NT, _, positions_NT = pack([first, second], 32, 0)
    packed_TH = hidden_states(body, ids_NT[0], positions_NT[0])
    for start, text in ((0, first), (len(first), second)):
        alone_TH = hidden_states(body, torch.tensor([token for token, _ in text]))
        assert torch.allclose(packed_TH[start : start + len(text)], alone_TH, atol=1e-5)
    assert not torch.allclose(hidden_states(body, ids_NT[0])[9:23], packed_TH[9:23], atol=1e-2)
