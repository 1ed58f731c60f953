"""Evaluation: perplexity, KL and top-1 are what a straightforward computation gives."""

from __future__ import annotations

import json
import math
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from lrqat import evaluate
from lrqat.cli import main
from lrqat.evaluate import evaluate_files, score, words_of

FLOAT32 = 1e-5  # float32 logits and log-softmax, summed in float64


@pytest.fixture(scope="module")
def models(tiny_model_dir: Path) -> tuple[Any, Any]:
    """A model and a slightly different one."""
    model, other = (AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval() for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    for parameter in other.model.layers.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model, other


@pytest.fixture
def blocks_NT() -> torch.Tensor:
    return torch.randint(0, 400, (3, 40), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("chunk", [256, 7])
def test_scores_are_those_of_whole_log_softmaxes(
    models: tuple[Any, Any], blocks_NT: torch.Tensor, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "CHUNK_TOKENS", chunk)
    other, model = models
    with torch.no_grad():
        log_q, log_p = (m(blocks_NT).logits[:, :-1].double().log_softmax(-1) for m in (model, other))
    nats = F.nll_loss(log_q.flatten(0, 1), blocks_NT[:, 1:].flatten())
    kl = F.kl_div(log_q, log_p, reduction="sum", log_target=True) / (3 * 39)
    found = score(model, blocks_NT, other, words=50)
    assert found.tokens == 3 * 39 and found.context == 40
    assert found.perplexity == pytest.approx(nats.exp().item(), rel=FLOAT32 * 10)
    assert found.word_perplexity == pytest.approx(math.exp(nats.item() * 117 / 50), rel=FLOAT32 * 117)
    assert found.kl is not None and found.kl > 1e-3
    assert found.kl == pytest.approx(kl.item(), rel=1e-3)
    assert found.top1 == (log_p.argmax(-1) == log_q.argmax(-1)).double().mean().item() != 1.0


def test_a_model_does_not_differ_from_itself(models: tuple[Any, Any], blocks_NT: torch.Tensor) -> None:
    found = score(models[0], blocks_NT, models[0])
    assert found.kl == 0.0 and found.top1 == 1.0


def test_without_a_reference_there_is_no_kl(models: tuple[Any, Any], blocks_NT: torch.Tensor) -> None:
    found = score(models[0], blocks_NT)
    assert found.kl is None and found.top1 is None and found.word_perplexity is None


def test_words_that_are_whole_paragraphs_cost_no_evaluation(models: tuple[Any, Any], blocks_NT: torch.Tensor) -> None:
    found = score(models[0], blocks_NT.repeat(4, 1), words=1)
    assert found.word_perplexity == math.inf and found.perplexity < 1e4


def test_every_block_is_its_own_context(models: tuple[Any, Any], blocks_NT: torch.Tensor) -> None:
    single = [math.log(score(models[0], block[None]).perplexity) for block in blocks_NT]
    assert math.log(score(models[0], blocks_NT).perplexity) == pytest.approx(sum(single) / 3, rel=FLOAT32)


def test_the_command_evaluates_a_fused_checkpoint_against_its_base(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "held.txt"
    text.write_text("Some words to be scored, again and again. " * 20)
    run = tmp_path / "rtn"
    assert main(["ptq", str(tiny_model_dir), "--grid", "w4g32", "--dtype", "float32", "--out", str(run)]) == 0
    capsys.readouterr()
    arguments = ["--text", str(text), "--seq-len", "64", "--json", "--reference", str(tiny_model_dir)]
    assert main(["eval", str(run / "fused"), *arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    assert 0 < found["kl"] < 1 and 0 < found["top1"] <= 1 and found["perplexity"] > 1
    direct = evaluate_files(str(run / "fused"), str(tiny_model_dir), [str(text)], 64, None, "float32")
    assert found == {"model": str(run / "fused"), **direct.to_dict()}


def test_the_reference_is_gone_when_the_model_is_loaded(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("Some words to be scored. " * 20)
    made: list[weakref.ref[Any]] = []
    load = evaluate.load_any

    def loading(*given: Any) -> Any:
        assert all(model() is None for model in made)
        found = load(*given)
        made.append(weakref.ref(found[0]))
        return found

    monkeypatch.setattr(evaluate, "load_any", loading)
    found = evaluate_files(str(tiny_model_dir), str(tiny_model_dir), [str(tmp_path / "a.txt")], 32, 2, "float32")
    assert len(made) == 2 and found.kl == 0 and found.top1 == 1


def test_the_command_takes_a_run_for_the_checkpoint_it_holds(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "held.txt"
    text.write_text("Some words to be scored. " * 20)
    main(["ptq", str(tiny_model_dir), "--grid", "w4g32", "--out", str(tmp_path / "rtn")])
    assert main(["eval", str(tmp_path / "rtn"), "--text", str(text), "--seq-len", "32"]) == 0
    assert "perplexity" in capsys.readouterr().out


def test_a_reference_of_other_words_is_one_line(
    tiny_model_dir: Path, trained_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("words " * 50)
    arguments = ["--text", str(tmp_path / "a.txt"), "--seq-len", "16", "--reference", str(trained_model_dir)]
    assert main(["eval", str(tiny_model_dir), *arguments]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "another vocabulary" in errors[0]


def test_words_are_those_of_the_predicted_tokens(tiny_tokenizer: Any) -> None:
    ids = tiny_tokenizer("one two three")["input_ids"]
    alone = len(tiny_tokenizer.decode(ids[1:]).split())
    assert words_of(torch.tensor([ids, ids]), tiny_tokenizer) == 2 * alone


@pytest.mark.parametrize("arguments", [["--seq-len", "1"], ["--seq-len", "0"], ["--blocks", "0"], ["--blocks", "-1"]])
def test_numbers_that_leave_nothing_to_score_are_one_line(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    (tmp_path / "a.txt").write_text("words " * 50)
    assert main(["eval", str(tiny_model_dir), "--text", str(tmp_path / "a.txt"), *arguments]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
