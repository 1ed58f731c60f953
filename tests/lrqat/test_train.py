"""Training: losses fall, killed and interrupted runs end in the codes of an undisturbed one, checkpoints are small."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lrqat.cli import main
from lrqat.fused import FusedCheckpoint
from lrqat.models import fake_quant_model, locate
from lrqat.plan import plan
from lrqat.settings import TrainSettings
from lrqat.teacher import Blocks, cache_teacher
from lrqat.train import ARITHMETIC, make_quantized, make_trainer, swap_for_training
from lrqat.trainer import Metrics, last_checkpoint, read_metrics, without_dropout

STEPS = 16
FLAGS = ["--grid", "w3g32", "--steps", STEPS, "--seq-len", 32, "--batch-size", 2, "--rank", 4, "--save-every", 4]
SMALL = [str(flag) for flag in [*FLAGS, "--lr-scales", 1e-2, "--threads", 1]]


@pytest.fixture(scope="module")
def command(tiny_model_dir: Path, text: Path) -> Callable[..., list[str]]:
    """Arguments of a small run."""
    return lambda out, *more: ["train", str(tiny_model_dir), "--data", str(text), *SMALL, "--out", str(out), *more]


@pytest.fixture(scope="module")
def run(command: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed KD run."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    assert main(command(out)) == 0
    return out


@pytest.fixture(scope="module")
def ce_run(tiny_model_dir: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CE run in float32."""
    out = tmp_path_factory.mktemp("ce") / "run"
    words = [str(tiny_model_dir), "--data", str(text), *SMALL, "--steps", "30", "--loss", "ce", "--dtype", "float32"]
    assert main(["train", *words, "--out", str(out)]) == 0
    return out


def codes(run: Path) -> dict[str, bytes]:
    """Codes and scales of a run, by hash."""
    index = json.loads((run / "fused" / "fused.json").read_text())
    return {name: weight["sha256"] for name, weight in index["weights"].items()}


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(run / "metrics.jsonl")]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_cross_entropy_falls(ce_run: Path) -> None:
    found = losses(ce_run)
    assert len(found) == 30 and mean(found[-5:]) < 0.95 * mean(found[:3])


def test_distillation_falls(run: Path) -> None:
    found = losses(run)
    assert len(found) == STEPS and mean(found[-3:]) < 0.8 * mean(found[:3])


def test_training_brings_the_model_nearer_to_its_teacher_than_its_start(
    run: Path, tiny_model_dir: Path, tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["ptq", str(tiny_model_dir), "--grid", "w3g32", "--out", str(tmp_path)])
    found = []
    for source in (tmp_path / "fused", run / "fused"):
        capsys.readouterr()
        words = ["--text", str(text), "--seq-len", "64", "--blocks", "8", "--reference", str(tiny_model_dir), "--json"]
        assert main(["eval", str(source), *words]) == 0
        found.append(json.loads(capsys.readouterr().out)["kl"])
    assert found[1] < 0.8 * found[0]


def test_a_run_leaves_its_figures_and_its_plot(run: Path) -> None:
    assert {path.name for path in run.iterdir()} - {"tensorboard"} == {
        "run.json",
        "metrics.jsonl",
        "layers.json",
        "summary.json",
        "loss.png",
        "checkpoints",
        "fused",
    }
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == STEPS and summary["grid"] == "w3g32" and summary["quantized_weights"] == 14
    assert summary["loss_last_tenth"] < summary["loss_first"] == losses(run)[0]
    assert 0 < summary["codes_moved"] < 0.5
    assert 0 <= summary["seconds_prepare"] <= summary["seconds_total"] and summary["tokens_per_second"] > 0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert rows[-1]["tokens"] == STEPS * 2 * 32 and rows[0]["grad_norm"] > 0
    from matplotlib.image import imread

    image = imread(run / "loss.png")
    assert image.ndim == 3 and image.std() > 0


def test_learning_rate_warms_up_and_decays_to_nothing(ce_run: Path) -> None:
    rates = [row["lr"] for row in read_metrics(ce_run / "metrics.jsonl")]
    assert max(rates) <= 1e-2 and rates.index(max(rates)) <= 4 and rates[-1] < 1e-3


def test_the_fused_model_says_where_it_comes_from(run: Path, tiny_model_dir: Path) -> None:
    found = FusedCheckpoint.load(run).provenance
    assert found["method"] == "lrqat" and found["settings"]["steps"] == STEPS
    assert found["base_sha256"] == locate(str(tiny_model_dir)).sha256()
    assert found["versions"]["torch"] == torch.__version__


def test_dense_weights_and_tokenizer_pass_through_untouched(ce_run: Path, tiny_model_dir: Path) -> None:
    before, after = load_file(tiny_model_dir / "model.safetensors"), FusedCheckpoint.load(ce_run)
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.dense.items())
    assert after.dense.keys() | after.tensors.keys() == before.keys()
    for name, content in after.assets.items():
        assert (tiny_model_dir / name).read_bytes() == content
    assert "tokenizer.json" in after.assets


def test_a_checkpoint_holds_adapters_and_scales_only_and_no_pickle(run: Path, tiny_model_dir: Path) -> None:
    folder = last_checkpoint(run / "checkpoints")
    assert folder is not None and folder.name == f"checkpoint-{STEPS}"
    adapters = load_file(folder / "adapters.safetensors")
    assert {name.rpartition(".")[2] for name in adapters} == {"a_OR", "b_RI", "scales"} and len(adapters) == 3 * 14
    moments = load_file(folder / "optimizer.safetensors")
    trained = sum(t.numel() for t in adapters.values())
    assert sum(t.numel() for name, t in moments.items() if not name.startswith("rng")) <= 2 * trained + len(moments)
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json"}
    whole = sum(path.stat().st_size for path in folder.iterdir())
    assert whole < 3 * 4 * trained + 100_000 < (tiny_model_dir / "model.safetensors").stat().st_size


def test_the_same_command_gives_the_same_codes(run: Path, command: Callable[..., list[str]], tmp_path: Path) -> None:
    assert main(command(tmp_path / "run", "--save-every", "1000")) == 0
    assert codes(tmp_path / "run") == codes(run)


def test_another_seed_gives_other_codes(run: Path, command: Callable[..., list[str]], tmp_path: Path) -> None:
    assert main(command(tmp_path / "run", "--seed", "1")) == 0
    assert codes(tmp_path / "run").keys() == codes(run).keys() and codes(tmp_path / "run") != codes(run)


def test_a_killed_run_resumes_to_the_codes_of_an_undisturbed_one(
    run: Path, command: Callable[..., list[str]], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    program = f"import sys; from lrqat.cli import main; sys.exit(main({command(out)!r}))"
    with open(tmp_path / "log", "w") as log:
        child = subprocess.Popen([sys.executable, "-c", program], stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 120
        while last_checkpoint(out / "checkpoints") is None:
            assert child.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.005)
    finally:
        child.kill()
        child.wait()
    assert not (out / "fused").exists(), "the run was over before it was killed"
    assert main(command(out, "--resume")) == 0
    assert codes(out) == codes(run)
    assert [row["step"] for row in read_metrics(out / "metrics.jsonl")] == list(range(1, STEPS + 1))
    assert losses(out) == losses(run)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_finishes_the_step_saves_and_the_run_resumes_to_the_same_codes(
    run: Path,
    command: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: int,
) -> None:
    out, before = tmp_path / "run", signal.getsignal(number)
    on_log = Metrics.on_log

    def interrupt(self: Metrics, args: Any, state: Any, control: Any, **options: Any) -> None:
        on_log(self, args, state, control, **options)
        if state.global_step == 5:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(Metrics, "on_log", interrupt)
        assert main(command(out)) == 130
    assert signal.getsignal(number) == before
    assert "--resume" in capsys.readouterr().err
    folder = last_checkpoint(out / "checkpoints")
    assert folder is not None and int(folder.name.rpartition("-")[2]) in (5, 6)
    assert not (out / "fused").exists() and not (out / "summary.json").exists()
    assert main(command(out, "--resume")) == 0
    assert codes(out) == codes(run)


def test_a_checkpoint_that_was_cut_short_is_not_resumed_from(tmp_path: Path) -> None:
    for step, state in ((4, "{}"), (8, '{"global'), (12, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
    assert last_checkpoint(tmp_path / "none") is None


def test_checkpoints_are_ordered_by_number(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-100"


def test_a_finished_run_is_neither_overwritten_nor_trained_again(
    run: Path, command: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    before = codes(run)
    assert main(command(run)) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert main(command(run, "--resume")) == 0
    assert codes(run) == before and len(losses(run)) == STEPS


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--steps", "17"], "steps"),
        (["--grid", "w4g32"], "grid"),
        (["--lr", "0.5"], "lr"),
        (["--skip", "down_proj"], "skip"),
        (["--override", "down_proj=q4_k"], "override"),
        (["--seed", "3"], "seed"),
        (["--loss", "ce"], "loss"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_resuming_with_another_setting_is_refused_by_name(
    run: Path, command: Callable[..., list[str]], capsys: pytest.CaptureFixture[str], flags: list[str], named: str
) -> None:
    assert main(command(run, "--resume", *flags)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error:") and f"started with {named} " in error


def test_resuming_with_other_data_is_refused(
    run: Path, command: Callable[..., list[str]], text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = text.read_text()
    try:
        text.write_text("Other words. " * 3000)
        assert main(command(run, "--resume")) == 2
    finally:
        text.write_text(content)
    assert "the training data has changed" in capsys.readouterr().err


@pytest.mark.parametrize("arithmetic", [ARITHMETIC - 1, None], ids=["older", "before it was kept"])
def test_resuming_what_another_arithmetic_began_is_refused(
    run: Path, command: Callable[..., list[str]], capsys: pytest.CaptureFixture[str], arithmetic: int | None
) -> None:
    path = run / "run.json"
    kept = path.read_text()
    assert json.loads(kept)["arithmetic"] == ARITHMETIC
    try:
        path.write_text(json.dumps(json.loads(kept) | {"arithmetic": arithmetic}))
        assert main(command(run, "--resume")) == 2
    finally:
        path.write_text(kept)
    assert "another version of lrqat" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_checkpoint_is_one_line(
    run: Path, command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    import shutil

    out = tmp_path / "run"
    shutil.copytree(run, out)
    (out / "summary.json").unlink()
    folder = last_checkpoint(out / "checkpoints")
    assert folder is not None
    path = folder / "adapters.safetensors"
    path.unlink() if damage == "gone" else path.write_bytes(path.read_bytes()[:-100])
    assert main(command(out, "--resume")) == 2
    assert "adapters.safetensors" in capsys.readouterr().err.splitlines()[-1]


def test_resuming_a_complete_run_gives_its_summary_at_once(run: Path, command: Callable[..., list[str]]) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    assert main(command(run, "--resume")) == 0
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()} == before


def settings_for(model: Path, **options: Any) -> TrainSettings:
    chosen = {"grid": "w3g32", "rank": 4, "loss": "ce", "dtype": "float32", "steps": 1, "batch_size": 2, **options}
    return TrainSettings(model=str(model), out="unused", **chosen)


@pytest.mark.parametrize("loss", ["ce", "kd"])
def test_checkpointing_layers_gives_the_same_gradients_and_keeps_less(
    tiny_model_dir: Path, tmp_path: Path, loss: str
) -> None:
    ids = torch.randint(0, 400, (2, 32), generator=torch.Generator().manual_seed(0))
    teacher = torch.randn(2, 32, 256, generator=torch.Generator().manual_seed(1)) if loss == "kd" else None
    gradients: list[dict[str, Tensor | None]] = []
    kept: list[int] = []
    for checkpointed in (False, True):
        settings = settings_for(tiny_model_dir, gradient_checkpointing=checkpointed)
        model = locate(str(tiny_model_dir)).model(torch.float32)
        swap_for_training(model, plan(model, settings.assignment), settings)
        trainer = make_trainer(model, Blocks(ids, None, torch.float32), settings, tmp_path)
        loss_model = trainer.model.train()
        saved: dict[int, int] = {}

        def note(tensor: Tensor, saved: dict[int, int] = saved) -> Tensor:
            saved[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            value = loss_model(ids, teacher)["loss"]
        value.backward()
        gradients.append({name: p.grad for name, p in loss_model.trained().items()})
        kept.append(sum(saved.values()))
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) == 3 * 14
    for name, gradient in gradients[0].items():
        other = gradients[1][name]
        assert gradient is not None and other is not None and torch.equal(gradient, other), name
    assert any(g is not None and g.any() for n, g in gradients[0].items() if n.endswith("b_RI"))
    assert kept[1] < kept[0] / 2


def test_accumulated_steps_are_the_steps_of_a_larger_batch(tiny_model_dir: Path, text: Path, tmp_path: Path) -> None:
    words = [str(tiny_model_dir), "--data", str(text), *SMALL, "--steps", "4", "--loss", "ce", "--dtype", "float32"]
    assert main(["train", *words, "--batch-size", "4", "--out", str(tmp_path / "a")]) == 0
    assert (
        main(["train", *words, "--batch-size", "2", "--gradient-accumulation", "2", "--out", str(tmp_path / "b")]) == 0
    )
    # the same tokens a step: float32 sums in another order, amplified by 3 steps of Adam
    assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "b"), rel=1e-3)
    assert read_metrics(tmp_path / "a" / "metrics.jsonl")[-1]["tokens"] == 4 * 4 * 32
    assert read_metrics(tmp_path / "b" / "metrics.jsonl")[-1]["tokens"] == 4 * 4 * 32


@pytest.mark.parametrize(
    "flags", [["--downcast", "int"], ["--downcast", "bf16"], ["--lr-scales", "0"], ["--alpha", "1"]]
)
def test_every_variant_trains_fuses_and_loads(
    tiny_model_dir: Path, text: Path, tmp_path: Path, flags: list[str]
) -> None:
    out = tmp_path / "run"
    words = [str(tiny_model_dir), "--data", str(text), *SMALL, "--steps", "2", "--gradient-checkpointing", *flags]
    assert main(["train", *words, "--out", str(out)]) == 0
    model = fake_quant_model(FusedCheckpoint.load(out))
    assert model(torch.arange(8)[None]).logits.isfinite().all()


def test_text_for_fewer_steps_than_asked_is_gone_through_again(tiny_model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("few words " * 60)
    words = [str(tiny_model_dir), "--data", str(tmp_path / "a.txt"), *SMALL, "--out", str(tmp_path / "run")]
    assert main(["train", *words]) == 0
    assert len(losses(tmp_path / "run")) == STEPS


def test_steps_see_other_blocks_than_the_layers_were_fitted_to(
    tiny_model_dir: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    taught, calibrated = [], []

    def teach(path: Path, body: Any, blocks_NT: torch.Tensor, *rest: Any) -> None:
        taught.append(blocks_NT)
        cache_teacher(path, body, blocks_NT, *rest)

    def make(model: Any, decided: Any, settings: Any, calibration_NT: torch.Tensor, *rest: Any) -> None:
        calibrated.append(calibration_NT)
        make_quantized(model, decided, settings, calibration_NT, *rest)

    monkeypatch.setattr("lrqat.train.cache_teacher", teach)
    monkeypatch.setattr("lrqat.train.make_quantized", make)
    words = [str(tiny_model_dir), "--data", str(text), *SMALL, "--start", "gptq", "--calibration-blocks"]
    for count in (8, 10_000):
        assert main(["train", *words, str(count), "--out", str(tmp_path / str(count))]) == 0
        shared = (taught.pop()[:, None] == calibrated.pop()[None]).all(2).any().item()
        assert shared == (count == 10_000)
        assert ("steps see some that calibrate" in capsys.readouterr().err) == shared


def test_the_student_drops_nothing_in_train_mode() -> None:
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 16, "ffn_dim": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    model = OPTForCausalLM(OPTConfig(**sizes, dropout=0.3, attention_dropout=0.3, layerdrop=0.3)).eval()
    ids_BT = torch.arange(24).view(2, 12)
    alone = model(ids_BT).logits
    assert not torch.equal(model.train()(ids_BT).logits, alone)
    without_dropout(model)
    assert torch.equal(model(ids_BT).logits, alone)
