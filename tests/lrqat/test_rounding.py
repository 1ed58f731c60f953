"""What a run rounds beside its weights is known to whoever judges it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lrqat.cli import main
from lrqat.errors import LrqatError
from lrqat.fused import FusedCheckpoint
from lrqat.models import fake_quant_model
from lrqat.rounding import Rounding, rounded_model
from serve.compare import EXACT
from serve.parity import Runtime, check_rounding


@pytest.fixture(scope="module")
def run(tiny_model_dir: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with rounded activations, keys and values, of which one layer stays dense."""
    out = tmp_path_factory.mktemp("run") / "run"
    words = f"--grid w8g32 --method scales --steps 2 --seq-len 32 --skip 0.mlp.up --data {text} --threads 1"
    flags = ["--activations", "4", "--kv", "4", "--dtype", "float32"]
    assert main(["train", str(tiny_model_dir), *words.split(), *flags, "--out", str(out)]) == 0
    return out


@pytest.fixture
def evaluate(run: Path, text: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    def measure(*flags: str, model: Path = run) -> dict[str, Any]:
        words = ["eval", str(model), "--text", str(text), "--seq-len", "32", "--blocks", "2", "--json", *flags]
        assert main([*words, "--reference", str(tiny_model_dir)]) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    return measure


def test_a_run_is_judged_with_what_it_was_trained_with_and_says_so(evaluate: Callable[..., Any]) -> None:
    trained = evaluate()
    assert (trained["activations"], trained["kv"]) == ("4", "4")
    assert trained == evaluate("--activations", "4", "--kv", "4")
    finer = evaluate("--activations", "8", "--kv", "8")
    off = evaluate("--activations", "none", "--kv", "none")
    assert (off["activations"], off["kv"]) == (None, None)
    assert trained["kl"] > 5 * finer["kl"] > 0 and finer["kl"] > off["kl"] > 0
    part = evaluate("--activations", "none")
    assert (part["activations"], part["kv"]) == (None, "4") and off["kl"] < part["kl"] < trained["kl"]


def test_the_judged_model_is_the_training_models_forward(run: Path, tiny_model_dir: Path) -> None:
    from lrqat.begin import swap_for_training
    from lrqat.layers import swap
    from lrqat.methods.rounded import Rounded
    from lrqat.models import locate
    from lrqat.plan import plan
    from lrqat.settings import TrainSettings

    checkpoint = FusedCheckpoint.load(run)
    found = TrainSettings("m", "o", grid="w8g32", method="scales", skip=("0.mlp.up",), activations="4", kv="4")
    training = locate(str(tiny_model_dir)).model(torch.float32)
    swap_for_training(training, decided := plan(training, found.assignment), found)
    again = locate(str(tiny_model_dir)).model(torch.float32)  # the same, but with the weights that came out
    swap(again, decided, lambda site, _w, _g: Rounded(checkpoint.tensors[site.name], torch.device("cpu")))
    Rounding("4", "4").apply(again)
    ids = torch.arange(30)[None]
    judged = rounded_model(checkpoint, Rounding.trained(checkpoint.provenance))
    with torch.no_grad():
        assert torch.equal(judged(ids).logits, again(ids).logits)
        assert not torch.equal(judged(ids).logits, fake_quant_model(checkpoint)(ids).logits)
        assert training(ids).logits.isfinite().all()


@pytest.mark.parametrize(
    ("activations", "bits"), [("8", 8), ("4", 4), ("int8", None), (None, None)], ids=lambda value: str(value)
)
def test_queries_are_rounded_as_the_papers_activations_are_and_no_runtimes(
    activations: str | None, bits: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int | None]] = []
    monkeypatch.setattr("lrqat.rounding.round_kv", lambda _model, kv, query: asked.append((kv, query)))
    Rounding(activations, "8").keys(torch.nn.Module())
    assert asked == [(8, bits)]


def test_a_plain_model_takes_rounded_keys_but_no_rounded_activations(
    evaluate: Callable[..., Any], tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate("--kv", "4", model=tiny_model_dir)["kl"] > evaluate("--kv", "8", model=tiny_model_dir)["kl"] > 0
    words = ["eval", str(tiny_model_dir), "--text", str(tiny_model_dir / "config.json"), "--activations", "8"]
    assert main(words) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "no fused checkpoint" in errors[0]


def test_a_rounding_that_this_lrqat_does_not_know_is_refused() -> None:
    assert Rounding.trained({}) == Rounding() and not Rounding()
    for settings in ({"activations": "6"}, {"kv": "3"}):
        with pytest.raises(LrqatError, match=r"^[^\n]*does not know[^\n]*$"):
            Rounding.trained({"settings": settings})


def runtime(int8: bool) -> Runtime:
    """As much of a runtime as the question needs."""
    return Runtime("vllm", EXACT, int8, *[None] * 5)  # type: ignore[arg-type]


def test_a_runtime_that_does_not_round_as_training_did_is_no_proof_unless_that_is_meant(run: Path) -> None:
    checkpoint = FusedCheckpoint.load(run)
    for served in (False, True):
        with pytest.raises(LrqatError, match=r"^vllm: [^\n]*activations 4, kv 4[^\n]*--as-served[^\n]*$"):
            check_rounding(checkpoint, runtime(served), False)
        found = check_rounding(checkpoint, runtime(served), True)
        assert found["trained"] == "activations 4, kv 4" and found["served"].startswith("activations int8") == served
    int8 = replace(checkpoint, provenance={"settings": {"activations": "int8"}})
    with pytest.raises(LrqatError, match="only where weights are on grid w8"):  # w8g32 is served weight-only
        check_rounding(int8, runtime(True), False)
    whole = replace(int8, specs={})
    assert check_rounding(whole, runtime(True), False)["served"] == "activations int8, kv none"
    plain = replace(checkpoint, provenance={})
    assert check_rounding(plain, runtime(True), False)["trained"] == "activations none, kv none"
