"""Answers: the tokens that the assistant writes, found in any template that allows it, and alone in the loss."""

from __future__ import annotations

import copy
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from lrqat.chat import answer_blocks, answered
from lrqat.cli import main
from lrqat.data import blocks
from lrqat.errors import LrqatError
from lrqat.fused import FusedCheckpoint
from lrqat.losses import head_of
from lrqat.settings import TrainSettings
from lrqat.train import train
from lrqat.trainer import LossModel

CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nBe kind."
    "<|im_end|>\n{% endif %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['role'] == 'assistant' %}"
    "{%- generation -%}{{ message['content'] }}<|im_end|>{%- endgeneration -%}{% else %}{{ message['content'] }}"
    "<|im_end|>{% endif %}\n{% endfor %}"
)
LAST_IS_ANOTHER = CHATML.replace(
    "{{ '<|im_start|>'", "{% if loop.last and message['role'] == 'assistant' %}(thinks){% endif %}{{ '<|im_start|>'"
)
TURNS = [
    {"role": "user", "content": "How much is 2 and 2?"},
    {"role": "assistant", "content": "It is 4.\n\nSure."},
    {"role": "user", "content": "assistant\nIt is 4.?"},
    {"role": "assistant", "content": "Größe: 4 ✓"},
]


@pytest.fixture
def tokenizer(tiny_tokenizer: Any) -> Any:
    """The tiny tokenizer with a ChatML template."""
    own = copy.deepcopy(tiny_tokenizer)
    own.chat_template = CHATML
    return own


@pytest.fixture
def rows(tmp_path: Path) -> Any:
    """Write rows as .jsonl."""

    def write(*content: dict[str, Any], name: str = "chat.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in content))
        return str(path)

    return write


def answers_of(messages: list[dict[str, str]], tokenizer: Any) -> str:
    """The text of the tokens that count as answers."""
    return str(tokenizer.decode([i for i, answer in answered(messages, tokenizer, "x") if answer]))


def test_answers_are_what_the_assistant_writes_up_to_the_end_of_its_turn(tokenizer: Any) -> None:
    found = answered(TURNS, tokenizer, "x")
    whole = tokenizer.apply_chat_template(TURNS, tokenize=True, return_dict=True)["input_ids"]
    assert [i for i, _ in found] == whole
    assert answers_of(TURNS, tokenizer) == "It is 4.\n\nSure.<|im_end|>Größe: 4 ✓<|im_end|>"
    ends = [n for n, (i, answer) in enumerate(found) if answer and i == tokenizer.eos_token_id]
    assert len(ends) == 2 and not found[ends[0] + 1][1] and tokenizer.decode([found[ends[0] + 1][0]]) == "\n"


def test_a_template_that_marks_its_answers_is_believed(tokenizer: Any) -> None:
    tokenizer.chat_template = MARKED
    assert answers_of(TURNS, tokenizer) == "It is 4.\n\nSure.<|im_end|>Größe: 4 ✓<|im_end|>"


def test_a_template_that_renders_the_last_turn_in_another_way_is_refused_in_one_line(tokenizer: Any) -> None:
    tokenizer.chat_template = LAST_IS_ANOTHER
    assert answers_of(TURNS[:1], tokenizer) == ""
    with pytest.raises(LrqatError, match=r"^where: [^\n]*turn 2[^\n]*--answers-only out$"):
        answered(TURNS, tokenizer, "where")


def test_a_template_that_raises_is_one_line(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ raise_exception('no system\nrole') }}"
    with pytest.raises(LrqatError, match=r"^where: the chat template refuses it \(no system\)$"):
        answered(TURNS, tokenizer, "where")


def test_every_answer_stands_behind_its_own_question(tokenizer: Any, rows: Any) -> None:
    turn = [{"role": "user", "content": "And 3?"}, {"role": "assistant", "content": "Also."}]
    marked = [answered(turns, tokenizer, "x") for turns in (TURNS, turn, TURNS[:2])]
    source = rows({"messages": TURNS}, {"prompt": "And 3?", "response": "Also."}, {"messages": TURNS[:2]})
    ids_NT, answers_NT, positions_NT = answer_blocks([source], tokenizer, max(map(len, marked)) + 8)
    found = []
    for ids_T, answers_T, positions_T in zip(ids_NT, answers_NT, positions_NT, strict=True):
        starts = [*(positions_T == 0).nonzero().flatten().tolist(), len(ids_T)]
        for start, end in pairwise(starts):
            found.append(list(zip(ids_T[start:end].tolist(), answers_T[start:end].tolist(), strict=True)))
    padding = [text for text in found if not any(answer for _, answer in text)]
    assert sorted(text for text in found if text not in padding) == sorted(marked)
    assert {token for text in padding for token, _ in text} == {tokenizer.pad_token_id}


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"text": "plain"}, r"document 1 is plain text"),
        ({"messages": TURNS[:1] * 30}, "no turn is the assistant's"),
    ],
)
def test_data_without_answers_is_refused_in_one_line(
    tokenizer: Any, rows: Any, content: dict[str, Any], named: str
) -> None:
    with pytest.raises(LrqatError, match=rf"^[^\n]*{named}[^\n]*--answers-only out$"):
        answer_blocks([rows(content)], tokenizer, 16)


@pytest.mark.parametrize("distilled", [False, True])
def test_the_loss_and_its_gradient_see_only_the_answers(tiny_model_dir: Path, distilled: bool) -> None:
    from transformers import AutoModelForCausalLM

    generator = torch.Generator().manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval().requires_grad_(False)
    weight = model.model.layers[1].mlp.down_proj.weight.requires_grad_(True)
    ids_BT = torch.randint(0, 400, (2, 12), generator=generator)
    answers_BT = torch.rand(2, 12, generator=generator) < 0.3
    states_BTH = torch.randn(2, 12, 256, generator=generator) if distilled else None
    loss = LossModel(model)(ids_BT, states_BTH, answers_BT)["loss"]
    (found,) = torch.autograd.grad(loss, weight)

    log_q = model(ids_BT).logits[:, :-1].log_softmax(-1)
    if states_BTH is not None:
        p = head_of(model).logits(states_BTH)[:, :-1].softmax(-1)
        nats_BT = (p * (p.log() - log_q)).sum(-1)
    else:
        nats_BT = -log_q.gather(2, ids_BT[:, 1:, None])[..., 0]
    expected = nats_BT[answers_BT[:, 1:]].mean()
    (wanted,) = torch.autograd.grad(expected, weight)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)  # float32
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-7)
    assert abs(nats_BT.mean() - expected) > 1e-3 * expected


def test_no_logits_are_computed_for_tokens_that_do_not_count(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    from lrqat import trainer

    seen: list[int] = []
    head_loss = trainer.head_loss

    def counted(hidden: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append(hidden.shape[:-1].numel())
        return head_loss(hidden, *rest)

    monkeypatch.setattr(trainer, "head_loss", counted)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()
    answers_BT = torch.zeros(2, 12, dtype=torch.bool)
    answers_BT[0, 0] = answers_BT[0, 5] = answers_BT[1, 11] = True  # the first is predicted by nobody
    LossModel(model)(torch.zeros(2, 12, dtype=torch.int64), None, answers_BT)
    assert seen == [2]


@pytest.mark.parametrize("loss", ["kd", "ce"])
def test_a_run_on_answers_trains_and_says_so(
    tiny_model_dir: Path, tokenizer: Any, rows: Any, tmp_path: Path, loss: str
) -> None:
    import shutil

    model = shutil.copytree(tiny_model_dir, tmp_path / "model")
    tokenizer.save_pretrained(model)
    words = f"--grid w3g32 --steps 3 --seq-len 160 --loss {loss} --answers-only --method scales --threads 1"
    source = rows(*[{"messages": TURNS}] * 20)
    assert main(["train", str(model), *words.split(), "--data", source, "--out", str(tmp_path / "run")]) == 0
    provenance = FusedCheckpoint.load(tmp_path / "run").provenance
    assert provenance["settings"]["answers_only"] is True


def test_what_is_calibrated_on_has_no_pads_and_is_one_text(
    tiny_model_dir: Path, tokenizer: Any, rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    class Seen(Exception):
        """With the blocks."""

    def look(_model: Any, _plan: Any, _settings: Any, calibration_NT: torch.Tensor, *_: Any) -> None:
        raise Seen(calibration_NT)

    monkeypatch.setattr("lrqat.train.make_quantized", look)
    tokenizer.save_pretrained(shutil.copytree(tiny_model_dir, tmp_path / "model"))
    source = rows(*[{"messages": TURNS}] * 20)
    settings = TrainSettings(
        model=str(tmp_path / "model"),
        out=str(tmp_path / "run"),
        data=(source,),
        answers_only=True,
        start="gptq",
        calibration_blocks=2,
        seq_len=64,
        steps=1,
    )
    with pytest.raises(Seen) as seen:
        train(settings)
    (calibration_NT,) = seen.value.args
    joined_NT = blocks([source], tokenizer, 64)
    assert all((joined_NT == block_T).all(1).any() for block_T in calibration_NT) and len(calibration_NT) == 2


def test_answers_only_without_data_is_one_line(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(tiny_model_dir), "--answers-only", "--out", str(tmp_path / "run")]) == 2
    assert "--data" in capsys.readouterr().err and not (tmp_path / "run").exists()
