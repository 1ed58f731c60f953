"""Several processes on one run: the codes of one, resumed on any number, one voice, one line when one of them goes.

Tolerance: none, where each process makes one forward pass of a step, and there are two of them. A sum of two gradients
has one order, and halving is exact, so bits are compared. With more passes the sums have another order, see
`test_more_passes_than_processes_differ_in_the_last_bits_of_gradients_alone`; a third is not exact (docs/scale-out.md).
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lrqat.cli import main
from lrqat.errors import LrqatError
from lrqat.fused import FusedCheckpoint
from lrqat.jsonfile import read_metrics
from lrqat.ranks import own, passes, share
from lrqat.trainer import last_checkpoint

STEPS = 6
FLAGS = ["--grid", "w3g32", "--steps", STEPS, "--seq-len", 32, "--batch-size", 2, "--save-every", 2]
SMALL = [str(flag) for flag in [*FLAGS, "--lr-scales", 1e-2, "--threads", 1]]
TOGETHER = ["--gradient-accumulation", "2"]  # what two processes do in one step, in one process
SECONDS = 120

Command = Callable[..., list[str]]


@pytest.fixture(scope="module")
def command(tiny_model_dir: Path, text: Path) -> Command:
    """Arguments of a small run."""
    return lambda out, *more: ["train", str(tiny_model_dir), "--data", str(text), *SMALL, "--out", str(out), *more]


@pytest.fixture(scope="module")
def alone(command: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    assert main(command(out, *TOGETHER)) == 0
    return out


@pytest.fixture(scope="module")
def forkserver() -> Any:
    """Starts processes that have all modules already: what the launchers do, without their half minute of imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lrqat.train"])
    return context


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def as_rank(rank: int, count: int, port: int, log: str, body: Callable[..., int], given: Any) -> None:
    """One of several processes, in the environment that torchrun makes."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    os.environ.update({name: str(number) for name, number in numbers.items()}, MASTER_ADDR="127.0.0.1")
    sys.exit(body(given))


def train(
    forkserver: Any, folder: Path, *given: Any, body: Callable[..., int] = main
) -> tuple[list[int | None], list[str]]:
    """One process for each command; how they ended, and what each wrote."""
    port, logs = free_port(), [folder / f"log{rank}" for rank in range(len(given))]
    started = [
        forkserver.Process(target=as_rank, args=(rank, len(given), port, str(logs[rank]), body, words))
        for rank, words in enumerate(given)
    ]
    for process in started:
        process.start()
    deadline = time.monotonic() + SECONDS
    for process in started:
        process.join(max(0.0, deadline - time.monotonic()))
    for process in started:
        process.kill()
    return [process.exitcode for process in started], [log.read_text() for log in logs]


def codes(run: Path) -> dict[str, str]:
    """Codes and scales of a run, by hash."""
    index = json.loads((run / "fused" / "fused.json").read_text())
    return {name: weight["sha256"] for name, weight in index["weights"].items()}


def figures(run: Path) -> list[tuple[float, float, float, int]]:
    return [(row["loss"], row["grad_norm"], row["lr"], row["tokens"]) for row in read_metrics(run / "metrics.jsonl")]


@pytest.mark.parametrize("shard", [[], ["--shard"]], ids=["whole", "shard"])
def test_two_processes_end_with_the_codes_of_one(
    alone: Path, command: Command, forkserver: Any, tmp_path: Path, shard: list[str]
) -> None:
    out = tmp_path / "run"
    statuses, logs = train(forkserver, tmp_path, *[command(out, *shard)] * 2)
    assert statuses == [0, 0], logs
    assert codes(out) == codes(alone) and len(codes(out)) == 14
    assert figures(out) == figures(alone) and len(figures(out)) == STEPS
    assert json.loads((out / "layers.json").read_text()) == json.loads((alone / "layers.json").read_text())
    assert {path.name for path in out.iterdir()} == {path.name for path in alone.iterdir()}
    assert logs[0].count("writing ") == logs[0].count(f"step {STEPS}/{STEPS}") == 1 and logs[1] == ""
    kept = json.loads((out / "run.json").read_text())
    assert kept["settings"]["gradient_accumulation"] == 2  # the command that does it again in one process


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ["--start", "awq+gptq", "--calibration-blocks", "4"],
        ["--method", "efficientqat", "--calibration-blocks", "4"],
        ["--block-epochs", "1", "--calibration-blocks", "4"],
        ["--offload", "disk"],
        ["--method", "lsq", "--grid", "q4_k"],
        ["--loss", "ce", "--gradient-checkpointing", "--dtype", "float32"],
        ["--seq-len", "500"],  # text for fewer blocks than the steps see
        ["--rotate", "1", "--untie-head", "--override", "lm_head=q8_0"],
        ["--shard", "--method", "scales"],
        ["--shard", "--downcast", "int", "--gradient-checkpointing", "--override", "down_proj=dense"],
    ],
    ids=lambda flags: "rotated" if flags[0] == "--rotate" else flags[2] if flags[0] == "--shard" else flags[1],
)
def test_so_they_do_whatever_is_trained(command: Command, forkserver: Any, tmp_path: Path, flags: list[str]) -> None:
    one, two, words = tmp_path / "one", tmp_path / "two", [*flags, "--steps", "3"]
    assert main(command(one, *TOGETHER, *[word for word in words if word != "--shard"])) == 0
    statuses, logs = train(forkserver, tmp_path, command(two, *words), command(two, *words))
    assert statuses == [0, 0], logs
    assert codes(two) == codes(one) and figures(two) == figures(one)
    assert {path.name for path in two.iterdir()} == {path.name for path in one.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("shard", [[], ["--shard"]], ids=["whole", "shard"])
def test_experts_that_no_token_of_a_process_reaches_hold_nobody_up(
    text: Path, tiny_tokenizer: Any, forkserver: Any, tmp_path: Path, shard: list[str]
) -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=448, hidden_size=64, moe_intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_experts=16, num_experts_per_tok=1, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    words = ["train", str(tmp_path / "model"), "--data", str(text), *SMALL, "--seq-len", "6", "--batch-size", "1"]
    assert main([*words, "--out", str(tmp_path / "one"), *TOGETHER]) == 0
    two = [*words, "--out", str(tmp_path / "two"), *shard]
    statuses, logs = train(forkserver, tmp_path, two, two)
    assert statuses == [0, 0], logs
    assert codes(tmp_path / "two") == codes(tmp_path / "one")
    assert figures(tmp_path / "two") == figures(tmp_path / "one")


@pytest.mark.slow
def test_more_passes_than_processes_differ_in_the_last_bits_of_gradients_alone(
    command: Command, forkserver: Any, tmp_path: Path
) -> None:
    one, two, four = tmp_path / "one", tmp_path / "two", ["--gradient-accumulation", "4", "--dtype", "float32"]
    assert main(command(one, *four)) == 0
    statuses, logs = train(forkserver, tmp_path, command(two, *four), command(two, *four))
    assert statuses == [0, 0], logs
    # ((a + b) + c) + d in one process, (a + c) + (b + d) in two: half a unit in the last place of float32 for each sum,
    # a few steps long. A code differs where a weight lies so near to the middle between two.
    assert figures(two)[0][0] == figures(one)[0][0]
    for found, wanted in zip(figures(two), figures(one), strict=True):
        assert found == pytest.approx(wanted, rel=1e-4)
    a, b = (FusedCheckpoint.load(run).tensors for run in (one, two))
    differ = sum(int((a[name].codes_OI != b[name].codes_OI).sum()) for name in a)
    assert differ <= 1e-5 * sum(a[name].codes_OI.numel() for name in a)


@pytest.mark.parametrize("before", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_a_stopped_run_goes_on_in_another_number_of_processes(
    alone: Path, command: Command, forkserver: Any, tmp_path: Path, before: int
) -> None:
    """Stopped as a crash behind a checkpoint would: the folders of the later checkpoints and of the result are gone."""
    import shutil

    out, after = tmp_path / "run", 3 - before
    statuses, logs = train(forkserver, tmp_path, *[command(out, *TOGETHER)] * before)
    assert statuses == [0] * before, logs
    shutil.rmtree(out / "fused")
    (out / "summary.json").unlink()
    for folder in (out / "checkpoints").iterdir():
        if int(folder.name.rpartition("-")[2]) > 4:
            shutil.rmtree(folder)
    found = last_checkpoint(out / "checkpoints")
    assert found is not None and found.name == "checkpoint-4"
    statuses, logs = train(forkserver, tmp_path, *[command(out, *TOGETHER, "--resume")] * after)
    assert statuses == [0] * after, logs
    assert f"step {STEPS - 1}/{STEPS}" in logs[0] and f"step 4/{STEPS}" not in logs[0]
    assert codes(out) == codes(alone) and figures(out) == figures(alone)


def test_a_finished_run_is_complete_for_all(alone: Path, command: Command, forkserver: Any, tmp_path: Path) -> None:
    before = codes(alone)
    words = command(alone, "--resume", *TOGETHER)
    statuses, logs = train(forkserver, tmp_path, words, words)
    assert statuses == [0, 0] and "complete already" in logs[0] and logs[1] == "" and codes(alone) == before


def test_processes_that_read_different_data_refuse_to_train(
    command: Command, forkserver: Any, text: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.txt"
    other.write_text("Other words. " * 3000)
    out = tmp_path / "run"
    statuses, logs = train(forkserver, tmp_path, command(out), [*command(out), "--data", str(other)])
    assert statuses == [2, 2] and not out.exists()
    assert logs[0].splitlines()[-1].startswith("error: process 1: was given other flags, ")


def test_passes_that_cannot_be_shared_are_one_line(command: Command, forkserver: Any, tmp_path: Path) -> None:
    words = command(tmp_path / "run", "--gradient-accumulation", "3")
    statuses, logs = train(forkserver, tmp_path, words, words)
    assert statuses == [2, 2] and not (tmp_path / "run").exists()
    assert logs[0].splitlines() == [
        "error: gradient_accumulation: 3 forward passes a step cannot be shared by 2 processes; "
        "use --gradient-accumulation 4"
    ]
    assert logs[1].startswith("error: process 1: ")  # late: a launcher would have ended it by now


def look_at_shards(given: tuple[str, str]) -> int:
    """Train a step of a sharded model; write how many bytes of Phi0 lie in this process, and of how many layers all."""
    import gc

    from torch.nn.parallel import DistributedDataParallel

    from lrqat.layers import quantizers
    from lrqat.models import locate
    from lrqat.plan import plan
    from lrqat.ranks import copy_first, join, leave
    from lrqat.settings import TrainSettings
    from lrqat.shards import is_sharded, shard
    from lrqat.train import swap_for_training
    from lrqat.trainer import LossModel

    source, report = given
    join()
    settings = TrainSettings(model=source, out="unused", rank=4, loss="ce")
    model = locate(source).model(torch.bfloat16)
    swap_for_training(model, plan(model, settings.assignment), settings)
    loss_model = LossModel(model)
    copy_first(loss_model)
    wrapped = DistributedDataParallel(loss_model)
    shard(loss_model)

    def whole() -> int:
        return sum(not is_sharded(layer.self_attn.q_proj.quantizer.phi) for layer in model.model.layers)

    def held() -> int:
        gc.collect()
        found = [tensor for tensor in gc.get_objects() if type(tensor) in (torch.Tensor, torch.nn.Parameter)]
        storages = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found if t.dtype == torch.int8
        }
        return sum(storages.values())

    seen = {"in use": [], "between": [whole()], "bytes": [held()]}
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda *_: seen["in use"].append(whole()))
        layer.mlp.down_proj.register_full_backward_pre_hook(lambda *_: seen["in use"].append(whole()))
    loss = wrapped(torch.arange(64).view(2, 32))["loss"]
    seen["between"].append(whole())
    seen["bytes"].append(held())
    loss.backward()
    seen["between"].append(whole())
    seen["bytes"].append(held())
    seen["all"] = [sum(q.shape[0] * q.shape[1] for q in quantizers(model).values())]
    Path(report).write_text(json.dumps(seen))
    leave()
    return 0


def test_with_shards_each_process_holds_its_part_and_the_layer_in_use(
    tiny_model_dir: Path, forkserver: Any, tmp_path: Path
) -> None:
    given = [(str(tiny_model_dir), str(tmp_path / f"report{rank}")) for rank in range(2)]
    statuses, logs = train(forkserver, tmp_path, *given, body=look_at_shards)
    assert statuses == [0, 0], logs
    for _, report in given:
        seen = json.loads(Path(report).read_text())
        assert len(seen["in use"]) == 4 and all(1 <= layers <= 2 for layers in seen["in use"])
        assert seen["between"] == [0, 0, 0]
        assert seen["bytes"] == [seen["all"][0] // 2] * 3


def test_shards_need_several_processes(command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(tmp_path / "run", "--shard")) == 2
    assert "error: shard: one process has nobody to share with" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("engine", ["FSDP", "DEEPSPEED"])
def test_accelerates_own_sharding_is_refused(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], engine: str
) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    assert main(command(tmp_path / "run")) == 2
    assert f"configured for {engine}; launch with --multi_gpu" in capsys.readouterr().err


def as_one_of(monkeypatch: pytest.MonkeyPatch, rank: int, count: int) -> None:
    for name, number in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count}.items():
        monkeypatch.setenv(name, str(number))


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_every_step_has_the_same_blocks_on_any_number_of_processes(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    batch, accumulation, steps, blocks = 2, 12, 3, 50
    wanted = steps * batch * accumulation
    found = []
    for rank in range(count):
        as_one_of(monkeypatch, rank, count)
        assert passes(accumulation) * count == accumulation
        found.append(share(blocks, wanted, batch).view(steps, passes(accumulation), batch))
    together = torch.cat(found, dim=1).flatten(1).sort(dim=1).values
    assert torch.equal(together, (torch.arange(wanted) % blocks).view(steps, -1).sort(dim=1).values)
    assert share(blocks, wanted, batch).view(-1, batch)[0].tolist() == [2 * count - 2, 2 * count - 1]


def test_each_process_has_its_own_file(monkeypatch: pytest.MonkeyPatch) -> None:
    assert own("teacher.npy") == "teacher.npy"
    as_one_of(monkeypatch, 1, 2)
    assert own("teacher.npy") == "teacher.1-of-2.npy"
    with pytest.raises(LrqatError, match="use --gradient-accumulation 2"):
        passes(1)


def launcher(name: str) -> list[str]:
    """Two processes through a launcher's own command."""
    words = {
        "torchrun": "torch.distributed.run --nproc-per-node 2 --master-port",
        "accelerate": "accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no "
        "--dynamo_backend no --main_process_port",
    }
    return [sys.executable, "-m", *words[name].split(), str(free_port()), "-m", "lrqat.cli"]


def children(of: int) -> list[int]:
    import psutil

    return [child.pid for child in psutil.Process(of).children(recursive=True)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torchrun", "accelerate"])
def test_the_launchers_end_with_the_codes_of_one(alone: Path, command: Command, tmp_path: Path, name: str) -> None:
    out = tmp_path / "run"
    done = subprocess.run([*launcher(name), *command(out)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert codes(out) == codes(alone) and figures(out) == figures(alone)


def until(log: Path, pattern: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 200
    while not re.search(pattern, log.read_text()):
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_torchrun_stopped_or_bereft_of_a_process_leaves_no_orphan_and_resumes_to_the_codes_of_one(
    command: Command, tmp_path: Path, number: signal.Signals
) -> None:
    """SIGINT and SIGTERM go to torchrun, SIGKILL to the second of its processes."""
    out, log, steps = tmp_path / "run", tmp_path / "log", ["--steps", "40", "--save-every", "10"]
    assert main(command(tmp_path / "alone", *steps, *TOGETHER)) == 0
    with open(log, "w") as file:
        process = subprocess.Popen([*launcher("torchrun"), *command(out, *steps)], stdout=file, stderr=file)
    try:
        until(log, r"step 1\d/40", process)
        below = children(process.pid)
        os.kill(below[1] if number == signal.SIGKILL else process.pid, number)
        process.wait(60)
    finally:
        process.kill()
    assert process.returncode != 0 and not (out / "fused").exists()
    assert len(below) >= 2 and not any(Path(f"/proc/{pid}").exists() for pid in below)
    said = [line for line in log.read_text().splitlines() if line.startswith(("error: ", "stopped at step "))]
    assert len(said) == 1 and "--resume" in said[0], log.read_text()
    words = [*launcher("torchrun"), *command(out, *steps), "--resume"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert codes(out) == codes(tmp_path / "alone") and figures(out) == figures(tmp_path / "alone")
