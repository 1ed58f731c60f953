"""The report: one page that loads nothing, escapes everything, and holds no figure that no file holds."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from lrqat.cli import main, make_parser, train_settings
from lrqat.report import facts
from lrqat.report.page import page
from lrqat.report.reproduce import train_command
from lrqat.settings import METHODS, TrainSettings

HOSTILE = '<script>alert("x")</script><img src=http://example.org/x.png onerror=alert(1)> $x_1$ & \'"'
LAYERS = 30
KINDS = {"q_proj": (64, 64), "down_proj": (64, 192)}
FIGURES = {
    "positions": 511,
    "kl": 0.001817,
    "top1": 0.9824,
    "perplexity": 28.19,
    "perplexity_reference": 28.17,
}
LIMITS = {"kl": 0.01, "top1": 0.94, "perplexity": 0.01, "why": "activations of 8 bits"}


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def layers() -> dict[str, Any]:
    weights = {
        f"model.layers.{n}.{kind}.weight": {"grid": "w4g32", "shape": list(shape), "moved": 7 * n + len(kind)}
        for n in range(LAYERS)
        for kind, shape in KINDS.items()
    }
    histogram = {"low": -4.0, "high": 4.0, "before": [1, 5, 9, 4], "after": [2, 4, 8, 5]}
    kinds = {
        "codes": {"before": [3] * 16, "after": [2, 4] * 8},
        "weights": histogram,
        "scales": histogram,
        "scale_change": {"low": -0.25, "high": 0.25, "counts": [0, 3, 8, 1]},
    }
    return {"format": "lrqat-layers", "version": 1, "weights": weights, "histograms": {"w4g32": kinds}}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run, as its files tell."""
    folder = tmp_path / "runs" / "small"
    settings = TrainSettings("org/model", "unused", grid="w4g32", data=("a.txt", "b c.txt"), steps=40).to_dict()
    kept = {key: value for key, value in settings.items() if key not in ("out", "save_every")}
    write(folder / "run.json", {"settings": kept, "base_sha256": "ab" * 32, "data_sha256": "cd" * 32})
    rows = [
        {"step": n, "loss": 3 / n, "grad_norm": 0.2, "lr": 0.01, "tokens": 64 * n, "tokens_per_second": 151.5 + n}
        for n in range(1, 41)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = {"grid": "w4g32", "method": "lrqat", "steps": 40, "codes_moved": 0.00917, "quantized_weights": 60}
    summary |= {"quantized": 491520, "skipped": 0, "dense": 28672, "bits_per_weight": 5.137, "seconds_prepare": 33.0}
    summary |= {"seconds_total": 918.0, "tokens_per_second": 154.4, "peak_memory_gb": 2.228}
    write(folder / "summary.json", summary)
    write(folder / "layers.json", layers())
    write(folder / "fused" / "fused.json", {"format": "lrqat-fused", "provenance": {"versions": {"lrqat": "0.1.0"}}})
    return folder


def certificate(run: Path, path: Path, exported: str = "model.gguf", verdict: str = "pass", **more: Any) -> Path:
    """What `lrqat-parity` writes, about this run."""
    fused = hashlib.sha256((run / "fused" / "fused.json").read_bytes()).hexdigest()
    compared = {"figures": FIGURES, "limits": LIMITS, "passed": True}
    wrong = {"figures": {**FIGURES, "kl": 0.2031}, "limits": LIMITS, "passed": False}
    content = {
        "format": "lrqat-certificate",
        "version": 1,
        "verdict": verdict,
        "runtime": "llama.cpp b6543",
        "weights": {"equal": 60, "total": 60, "differing": []},
        "token_ids_equal": True,
        "logits": compared,
        "controls": {"positive": compared, "negative": wrong},
        "hashes": {"base": None, "fused": {"fused.json": fused}, "exported": {exported: "12" * 32}},
        "settings": {"sequences": 4, "tokens": 128, "texts": ["CPython documentation"]},
    }
    return write(path, {**content, **more})


def bench() -> dict[str, Any]:
    """What `lrqat-bench` writes."""
    metrics = ("ttft_s", "itl_s", "prompt_cpu_s", "token_cpu_s", "load_s", "peak_bytes")
    medians = dict(zip(metrics, (0.1234, 0.0317, 0.4567, 0.0432, 1.73, 271e6), strict=True))
    ratio = {"ratio": 1.0042, "low": 0.9913, "high": 1.0171, "samples": 20}
    ratios = {metric: ratio for metric in metrics[:4]}
    model = {"path": "model.gguf", "file_bytes": 91726720, "medians": medians, "tokens_per_s": 31.5}
    return {
        "format": "lrqat-bench",
        "version": 2,
        "runtime": "llama.cpp",
        "first": "trained",
        "noise": "trained (again)",
        "models": {"trained": model, "trained (again)": model, "stock": {**model, "path": "stock.gguf"}},
        "layouts": {"trained (again)": {"same": True}, "stock": {"same": True}},
        "ratios": {"trained (again)": ratios, "stock": ratios},
        "verdicts": {"trained (again)": "equal", "stock": "equal"},
        "limit": 0.03,
        "confidence": 0.95,
        "settings": {
            "prompt_tokens": 256,
            "generated_tokens": 64,
            "rounds": 20,
            "sittings": 1,
            "threads": 1,
            "seed": 0,
        },
        "machine": {},
    }


def scores(model: str, perplexity: float, kl: float | None) -> dict[str, Any]:
    """What `lrqat eval --json` prints."""
    return {"model": model, "tokens": 3066, "context": 512, "perplexity": perplexity, "kl": kl, "top1": 0.7923}


class Page(HTMLParser):
    """Tags, attributes and visible text of a page; every tag that is opened must be closed."""

    VOID = frozenset({"meta", "link", "br", "img"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"[\s\u202f]+", " ", " ".join(self.words))


def written(run: Path, **given: list[Path]) -> Page:
    """The page of a run, read."""
    found = facts.gather(run, given.get("certificates", []), given.get("benches", []), given.get("quality", []))
    return Page(page(found))


@pytest.fixture
def whole(run: Path, tmp_path: Path) -> Page:
    """A page with every section filled."""
    (tmp_path / "model.gguf").write_bytes(bytes(123456))
    return written(
        run,
        certificates=[certificate(run, tmp_path / "model.certificate.json")],
        benches=[write(tmp_path / "b.json", bench())],
        quality=[
            write(tmp_path / "ours.json", scores(str(run), 28.193, 0.13842)),
            write(tmp_path / "rtn.json", scores("runs/rtn", 32.581, 0.32317)),
        ],
    )


def test_every_figure_of_every_file_is_on_the_page(whole: Page) -> None:
    for figure in (
        "40 steps in 15.3 min",
        "0.92 %",  # codes moved
        "5.137",
        "491 520 parameters in 60 matrices",
        "2.228 GB",
        "2 560",  # tokens trained on
        "28.19",
        "0.1384",
        "32.58",
        "0.3232",
        "0.7923",
        "3 066",
        "60 of 60 weights bitwise equal",
        "0.001817",
        "0.2031",
        "told apart, as it must be",
        "activations of 8 bits",
        "1.004 [0.991, 1.017]",
        "123.4 ms",
        "31.7 ms",
        "91.7 MB",
        "0.1 MB",  # of the file
        "1 of 1 certificates passed",
    ):
        assert figure in whole.text, figure
    moved = sum(weight["moved"] for weight in layers()["weights"].values())
    assert f"{moved:,}".replace(",", " ") in whole.text
    assert "Not measured" not in whole.text


def test_nothing_is_invented_where_nothing_was_measured(tmp_path: Path) -> None:
    write(tmp_path / "run.json", {"settings": {"model": "m", "grid": "grid"}})
    found = written(tmp_path)
    body = found.text.replace(str(tmp_path), "")
    assert not re.search(r"\d", body.replace("lrqat 0.1.0", "")), body
    assert not re.search("None|LR-QAT|distillation|next tokens|CPython", found.text)
    for command in ("lrqat eval", "lrqat-parity", "lrqat-bench", "lrqat-export"):
        assert command in found.text
    assert found.text.count("Not measured") == 3 and "no layers.json" in found.text and "No step" in found.text


def test_the_template_holds_no_figures() -> None:
    text = (Path(facts.__file__).with_name("page.html")).read_text(encoding="utf-8")
    shown = re.sub(r"\{[%{].*?[%}]\}|<[^>]*>", " ", text, flags=re.DOTALL)
    assert not re.search(r"\d", shown), re.findall(r".{20}\d.{20}", shown)


def test_the_page_loads_nothing_and_runs_nothing(whole: Page) -> None:
    policy = next(tag for tag in whole.tags if tag[1].get("http-equiv") == "Content-Security-Policy")[1]
    assert policy["content"] == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    for tag, attributes in whole.tags:
        assert tag not in ("script", "img", "iframe", "object", "embed", "base", "form")
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("href", "src", "xlink:href"):
                assert (value or "").startswith(("#", "data:,")), (tag, name, value)
            assert "url(" not in (value or "") or "url(#" in (value or "")


def test_the_style_loads_nothing() -> None:
    text = (Path(facts.__file__).with_name("page.css")).read_text(encoding="utf-8")
    assert "url(" not in text and "@import" not in text and "prefers-color-scheme: dark" in text


def test_identifiers_are_unique_and_references_are_met(whole: Page) -> None:
    identifiers = [attributes["id"] for _, attributes in whole.tags if "id" in attributes]
    assert len(identifiers) == len(set(identifiers)) > 10
    for _, attributes in whole.tags:
        for value in attributes.values():
            for reference in re.findall(r"^#([\w-]+)$|url\(#([^)]+)\)", value or ""):
                assert "".join(reference) in identifiers


def test_charts_are_in_the_pages_colours(whole: Page) -> None:
    styles = " ".join(attributes.get("style") or "" for _, attributes in whole.tags)
    assert "var(--accent)" in styles and "var(--heat)" in styles and not re.search(r"#[0-9a-f]{6}", styles)


def test_every_chart_says_what_it_shows(whole: Page) -> None:
    charts = [attributes for tag, attributes in whole.tags if tag == "svg"]
    assert len(charts) == 3 + 2 + 1 + 4 + 1
    assert all(chart["role"] == "img" and chart["aria-label"] for chart in charts)


def test_names_from_files_are_text(run: Path, tmp_path: Path) -> None:
    told = json.loads((run / "run.json").read_text())
    told["settings"]["model"] = HOSTILE
    told["settings"]["data"] = [HOSTILE]
    write(run / "run.json", told)
    found = layers()
    found["weights"][f"model.layers.0.{HOSTILE}"] = {"grid": HOSTILE, "shape": [2, 2], "moved": 1}
    found["histograms"] = {HOSTILE: found["histograms"]["w4g32"]}
    write(run / "layers.json", found)
    given = certificate(run, tmp_path / "x.certificate.json", HOSTILE, HOSTILE, runtime=HOSTILE)
    measured = bench()
    measured["first"] = HOSTILE
    measured["verdicts"]["stock"] = HOSTILE
    whole = written(
        run,
        certificates=[given],
        benches=[write(tmp_path / "b.json", measured)],
        quality=[write(tmp_path / "q.json", scores(HOSTILE, 20.0, 0.2))],
    )
    assert HOSTILE in "".join(whole.words)
    assert not {"script", "img"} & {tag for tag, _ in whole.tags}


def test_the_page_stays_small(run: Path) -> None:
    """80 layers of 7 matrices, 20,000 steps."""
    found = layers()
    entry = next(iter(found["weights"].values()))
    found["weights"] = {f"model.layers.{n}.p{kind}_proj.weight": entry for n in range(80) for kind in range(7)}
    write(run / "layers.json", found)
    rows = [{"step": n, "loss": 1 + (n * 7919 % 101) / 99, "tokens": n} for n in range(1, 20001)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["report", str(run)]) == 0
    assert (run / "report.html").stat().st_size < 500_000


def test_the_command_given_to_a_shell_trains_with_the_same_settings() -> None:
    more: dict[str, dict[str, Any]] = {
        "lrqat": {"range_p": None, "override": ("re:.*down_proj=w8g32", "lm_head=q6_k"), "skip": (r"layers\.0\.",)},
        "efficientqat": {"start": "gptq", "block_epochs": 3},
        "l4q": {"gradient_checkpointing": True, "alpha": 1.5, "block_epochs": 1, "block_lr": 0.25},
    }
    for method in METHODS:
        settings = TrainSettings("org/it's a model", "runs/a b", method=method, data=("a.txt", "b.txt"), lr_scales=0.02)
        settings = TrainSettings(**{**settings.to_dict(), **more.get(method, {})})
        kept = json.loads(json.dumps(settings.to_dict()))
        del kept["out"]
        script = 'lrqat() { printf "%s\\0" "$@"; }\n' + train_command(kept, "runs/a b")
        words = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout.split("\0")
        assert words[0] == "train"
        assert train_settings(make_parser().parse_args(words[:-1])) == settings


def test_certificates_beside_the_run_are_found_and_others_passed_over(run: Path, tmp_path: Path) -> None:
    certificate(run, run.parent / "ours.certificate.json", "ours.gguf")
    certificate(run, run.parent / "ours-gptq" / "certificate.json", "model.safetensors")
    write(run.parent / "ours-gptq" / "config.json", {"quantization_config": {"quant_method": "gptq"}})
    other = certificate(run, run.parent / "theirs.certificate.json", "theirs.gguf")
    content = json.loads(other.read_text())
    content["hashes"]["fused"]["fused.json"] = "00" * 32
    write(other, content)
    (run.parent / "broken.certificate.json").write_text("{")
    found = facts.gather(run, [], [], [])
    assert {c.exported.name for c in found.certificates} == {"ours.gguf", "ours-gptq"}
    text = written(run).text
    assert "--format gptq" in text and "--format gguf" in text and "theirs" not in text


def test_a_table_of_benchmarks_gives_the_peers_of_the_grid(run: Path, tmp_path: Path) -> None:
    def row(grid: str, name: str, bits: float, kl: float) -> dict[str, Any]:
        figures = {"kl": kl, "perplexity": 20 + 10 * kl, "top1": 0.8}
        spread = {key: {"mean": v, "low": v, "high": v, "runs": 2} for key, v in figures.items()}
        return {
            "grid": grid,
            "name": name,
            "tool": "GPTQModel",
            "version": "7",
            "bits_per_weight": bits,
            "valid": spread,
        }

    table = {
        "benchmark": "quality",
        "sorted_by": "valid",
        "valid": {"text": "wiki.txt", "seq_len": 1024, "blocks": 12},
        "rows": [row("w4g32", "gptq", 4.5, 0.2), row("w3g64", "other", 3.25, 0.9), row("bf16", "none", 16.0, 0.0)],
    }
    text = written(run, quality=[write(tmp_path / "quality.json", table)]).text
    assert "gptq (GPTQModel 7) mean of 2 seeds" in text and "12 276" in text and "other" not in text


def test_an_unfinished_run_says_so(run: Path) -> None:
    for name in ("summary.json", "layers.json", "fused/fused.json"):
        (run / name).unlink()
    assert "Not finished: 40 of 40 steps" in written(run).text
    (run / "metrics.jsonl").unlink()
    assert "Not finished: no step yet" in written(run).text


def damage(name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def body(run: Path) -> None:
        write(run / name, change(json.loads((run / name).read_text())))

    return body


@pytest.mark.parametrize(
    ("spoil", "words", "message"),
    [
        (lambda run: (run / "run.json").unlink(), [], "no run.json; expected a run of `lrqat train`"),
        (damage("run.json", lambda c: {}), [], "expected settings with model and grid"),
        (damage("layers.json", lambda c: {**c, "version": 2}), [], "expected format lrqat-layers version 1"),
        (damage("layers.json", lambda c: {**c, "histograms": {"w4g32": {"codes": {}}}}), [], "damaged"),
        (lambda run: write(run / "eval.json", {"kl": 1}), [], "expected what `lrqat eval --json` prints"),
        (lambda run: write(run / "bench.json", {"format": "x"}), [], "expected format lrqat-bench version 2"),
        (lambda run: None, ["--certificate", "nowhere.json"], "no such file"),
        (
            lambda run: write(run / "c.json", {"format": "x"}),
            ["--certificate", "{run}/c.json"],
            "expected a certificate",
        ),
        (
            lambda run: certificate(
                run, run / "c.json", hashes={"fused": {"fused.json": "0"}, "exported": {"a.gguf": "1"}}
            ),
            ["--certificate", "{run}/c.json"],
            "certifies another checkpoint",
        ),
        (
            lambda run: (run / "metrics.jsonl").write_text('{"step": 1, "loss": null}\n'),
            [],
            "metrics.jsonl:1: expected a step and a loss",
        ),
    ],
)
def test_what_is_no_part_of_the_run_is_refused_in_one_line(
    run: Path, capsys: pytest.CaptureFixture[str], spoil: Callable[[Path], Any], words: list[str], message: str
) -> None:
    spoil(run)
    assert main(["report", str(run), *(word.format(run=run) for word in words)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: ") and message in error
    assert not (run / "report.html").exists()
