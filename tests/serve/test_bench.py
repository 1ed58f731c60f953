"""lrqat-bench with real llama.cpp: what it finds, what it refuses, and what its statistics are worth."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from exporters import gguf, gptq
from lrqat import client
from lrqat.errors import LrqatError
from lrqat.fused import FusedCheckpoint
from lrqat.grid import Grid
from lrqat.models import locate
from lrqat.ptq import quantize
from serve import bench, bench_cli, layout, meter
from serve.running import start
from tests.serve.processes import ended

pytest.importorskip("xllamacpp", reason="pip install 'lrqat[llamacpp]'")

pytestmark = pytest.mark.usefixtures("surroundings")

QUICK = ("--rounds", "3", "--sittings", "2", "--prompt-tokens", "32", "--tokens", "8")
SECONDS = 300.0  # until a process must be ready or gone, on a busy machine


@pytest.fixture(scope="module")
def models(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files of one layout and of another."""
    folder = tmp_path_factory.mktemp("models")
    found = {}
    for name, grid, p in (("ours", "w4g32", 3.5), ("stock", "w4g32", None), ("eight", "w8g32", None)):
        fused = quantize(locate(str(tiny_model_dir)), Grid.parse(grid), p, (), torch.float16, folder / f"run-{name}")
        found[name] = gguf.write(FusedCheckpoint.load(fused), folder / f"{name}.gguf")
    found["gptq"] = gptq.write(FusedCheckpoint.load(folder / "run-ours"), folder / "gptq")
    return found


def test_models_of_one_layout_are_measured_in_pairs_and_the_last_line_is_json(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bench.json"
    assert bench_cli.main([str(models["ours"]), str(models["stock"]), *QUICK, "--out", str(out)]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert found == json.loads(out.read_text())
    assert (found["format"], found["first"], found["noise"]) == ("lrqat-bench", "ours", "ours (again)")
    assert list(found["models"]) == ["ours", "ours (again)", "stock"]
    assert found["judged_by"] == list(bench.CPU)  # llama.cpp of the package has no GPU
    assert found["layouts"]["stock"]["same"] and found["layouts"]["stock"]["bytes"]
    for model in found["models"].values():
        assert all(np.shape(model["samples"][metric]) == (2, 3) for metric in bench.PER_ROUND)
        assert all(np.min(values) > 0 for values in model["samples"].values())
        assert model["medians"]["load_s"] > 0 and model["medians"]["peak_bytes"] > 1e6
    for ratios in found["ratios"].values():
        assert all(ratios[metric]["low"] <= ratios[metric]["ratio"] <= ratios[metric]["high"] for metric in bench.CPU)
        assert ratios["load_s"]["low"] is None  # two loads are no interval
    assert any("same names, shapes, dtypes and bytes" in line for line in lines)
    assert any(line.startswith("ours (again)") and found["verdicts"]["ours (again)"] in line for line in lines)


def test_what_is_different_is_said_before_anything_is_measured(models: dict[str, Path]) -> None:
    ours, eight = layout.layout(models["ours"]), layout.layout(models["eight"])
    found = layout.compare(ours, eight)
    assert not found["same"] and found["names"] and found["shapes"] and not found["dtypes"] and not found["bytes"]
    assert len(found["differing"]) == 14 and "blk.0.ffn_up.weight: Q4_0[512, 256], Q8_0[512, 256]" in found["differing"]
    assert found["file_bytes_difference"] == ours.tensor_bytes - eight.tensor_bytes < 0


@pytest.mark.parametrize("name", ["ours", "eight", "gptq"])
def test_a_layout_accounts_for_every_byte_but_the_header(models: dict[str, Path], name: str) -> None:
    found = layout.layout(models[name])
    header = found.file_bytes - found.tensor_bytes
    assert 0 < header < 0.2 * found.file_bytes
    assert sum(row["bytes"] for row in found.dtypes().values()) == found.tensor_bytes
    assert sum(row["tensors"] for row in found.dtypes().values()) == len(found.tensors)
    assert layout.compare(found, found)["same"]


@pytest.mark.parametrize(("sittings", "rounds", "place"), [(1, 20, 0.0), (12, 6, 0.03)])
def test_the_interval_holds_the_true_ratio_as_often_as_it_says(sittings: int, rounds: int, place: float) -> None:
    rng, inside, tries = np.random.default_rng(0), 0, 100
    for _ in range(tries):
        busy = rng.lognormal(0, 0.5, (sittings, rounds))  # what the machine does meets both sides
        lies = rng.lognormal(0, place, (2, sittings, 1))  # where each lies in memory, for a sitting
        first, other = (
            busy * factor * where * rng.lognormal(0, 0.02, busy.shape)
            for factor, where in zip((1.1, 1.0), lies, strict=True)
        )
        found = bench.interval(first.tolist(), other.tolist())
        assert found["high"] - found["low"] < 0.1  # as narrow as the noise of one side, not as wide as the machine's
        inside += found["low"] <= 1.1 <= found["high"]
    assert inside / tries > 0.87  # of 100, two deviations below .95; few sittings cost a little more


@pytest.mark.parametrize(
    ("prompt", "token", "said"),
    [
        ((0.99, 1.01), (0.98, 1.02), "equal"),
        ((0.99, 1.01), (1.04, 1.05), "slower"),
        ((0.90, 0.96), (0.99, 1.01), "faster"),
        ((0.90, 0.96), (1.04, 1.05), "slower"),
        ((0.96, 1.01), (0.99, 1.01), "unclear"),
        ((None, None), (0.99, 1.01), "unclear"),
    ],
)
def test_equal_needs_both_intervals_within_three_percent(
    prompt: tuple[float, float], token: tuple[float, float], said: str
) -> None:
    assert bench.verdict([{"low": low, "high": high} for low, high in (prompt, token)]) == said


def test_few_rounds_give_no_interval() -> None:
    found = bench.interval([[2.0] * 4], [[1.0] * 4])
    assert found == {"ratio": 2.0, "low": None, "high": None, "samples": 4, "sittings": [2.0]}


def test_cpu_time_is_that_of_a_process_and_its_children() -> None:
    spin = "import time\nwhile time.process_time() < {}: pass\n"
    parent = (
        f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {spin.format(0.3)!r} + 'time.sleep(99)'])\n"
    )
    program = parent + spin.format(0.2) + "print('done', flush=True)\ntime.sleep(99)\n"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "done\n"
            deadline = time.monotonic() + SECONDS
            while (spent := meter.cpu_seconds(process.pid)) < 0.5 and time.monotonic() < deadline:
                time.sleep(0.05)
            assert 0.5 <= spent < 1.5
            assert meter.peak_bytes(process.pid) > 2 * 4e6  # two interpreters
        finally:
            for child in psutil.Process(process.pid).children():
                child.kill()
            process.kill()
    with pytest.raises(LrqatError, match="has ended"):
        meter.cpu_seconds(process.pid)


def test_what_is_stopped_does_nothing_until_it_goes_on() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", "print(1, flush=True)\nwhile True: pass"], stdout=subprocess.PIPE
    ) as spin:
        try:
            assert spin.stdout is not None and spin.stdout.readline() == b"1\n"
            with meter.stopped([spin.pid]):
                time.sleep(0.05)  # until the signal has arrived
                before = meter.cpu_seconds(spin.pid)
                time.sleep(0.2)
                assert meter.cpu_seconds(spin.pid) == before
            deadline = time.monotonic() + SECONDS
            while meter.cpu_seconds(spin.pid) < before + 0.05:
                assert time.monotonic() < deadline
        finally:
            spin.kill()


def refusal(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert bench_cli.main([str(word) for word in words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines()[-1].startswith("error: ")
    return err.splitlines()[-1]


def test_what_cannot_be_compared_is_refused_in_one_line(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "expected at least two models" in refusal(capsys, models["ours"])
    assert "compare models of one runtime" in refusal(capsys, models["ours"], models["gptq"])
    assert "no such file" in refusal(capsys, models["ours"], tmp_path / "none.gguf")
    assert "--rounds: expected at least 1, got 0" in refusal(capsys, models["ours"], models["ours"], "--rounds", 0)
    (tmp_path / "short.txt").write_text("Too little.")
    line = refusal(capsys, models["ours"], models["stock"], *QUICK, "--text", tmp_path / "short.txt")
    assert "--text: " in line and "expected at least 64; give more text" in line


def test_too_long_a_prompt_is_the_servers_own_line(models: dict[str, Path]) -> None:
    with start(models["ours"], threads=1, ctx=256) as server:
        with pytest.raises(LrqatError, match=r"^http://[^\n]*status 400: [^\n]*exceed[^\n]*256[^\n]*$"):
            client.complete(server.url, server.model, [5] * 400, 1)
        assert client.complete(server.url, server.model, [5] * 20, 4).tokens == 4  # and it goes on
        url = server.url
    with pytest.raises(LrqatError, match=r"is the server running\?$"):
        client.call(url, "/v1/models")
    with pytest.raises(LrqatError, match="not a URL"):
        client.call("localhost", "/v1/models")


def test_a_server_that_is_killed_in_the_middle_ends_the_bench_and_the_other_servers(models: dict[str, Path]) -> None:
    words = [sys.executable, "-m", "serve.bench_cli", models["ours"], models["stock"], "--rounds", "100000"]
    with subprocess.Popen([*map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        seen = []
        for line in process.stderr:
            seen.append(line)
            if line.startswith("round 1/"):
                break
        found = psutil.Process(process.pid).children(recursive=True)
        servers = [p for p in found if any("xllama_child" in word for word in p.cmdline()[:2])]
        assert len(servers) == 3, "".join(seen)
        os.kill(servers[1].pid, signal.SIGKILL)
        rest = process.stderr.read().splitlines()
        assert process.wait(timeout=SECONDS) == 2
    assert rest[-1].startswith("error: ") and "llama.cpp was killed by SIGKILL" in rest[-1]
    _, alive = psutil.wait_procs(found, timeout=SECONDS)
    assert all(map(ended, alive))
