"""Facts -> one HTML page. The template escapes whatever comes from files; it holds no figure of its own.

What is not known is not shown: its section says which command makes it known.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrqat import __version__
from lrqat.report import charts
from lrqat.report.facts import Certificate, Facts, HeatMap, Quality, heat_map
from lrqat.report.reproduce import commands

METHODS = {
    "lrqat": "LR-QAT",
    "lsq": "LSQ",
    "l4q": "L4Q",
    "scales": "scales alone",
    "efficientqat": "EfficientQAT",
}
CURVES = {"grad_norm": "gradient norm, before clipping at 1", "tokens_per_second": "tokens per second"}
BENCH_CPU = {"prompt_cpu_s": "prompt, CPU time", "token_cpu_s": "generation, CPU time"}
BENCH_TIME = {"ttft_s": "first token", "itl_s": "between tokens"}
CODES = "codes: how often each occurs"
WEIGHTS = "weights"
SCALES = "scales"
CHANGES = "scales: after against before"


@dataclass(frozen=True)
class Table:
    """Cells of text under headings; the first column names the row."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Tile:
    """One figure that is read from afar."""

    value: str
    label: str


def page(facts: Facts) -> str:
    """The whole page."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lrqat.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    heat = heat_map(facts.layers["weights"]) if facts.layers else None
    model, run = shlex.quote(str(facts.settings["model"])), shlex.quote(str(facts.run))
    return environment.get_template("page.html").render(
        facts=facts,
        title=f"{facts.name}, {facts.settings['grid']}",
        lead=lead(facts),
        tiles=tiles(facts),
        about=about(facts),
        curves=[Markup(svg) for svg in curves(facts)],
        qualities=[(Markup("").join(map(Markup, svgs)), table) for svgs, table in qualities(facts)],
        heat=Markup(charts.moved_map(heat)) if heat else None,
        heat_table=heat_cells(heat) if heat else None,
        moved=moved_words(facts, heat) if heat else None,
        histograms=[(grid, [Markup(svg) for svg in svgs]) for grid, svgs in histograms(facts)],
        certificates=[(c, certificate_table(c)) for c in facts.certificates],
        benches=[
            (bench, bench_lead(bench), Markup(bench_chart(bench, index)), ratio_table(bench), speed_table(bench))
            for index, bench in enumerate(facts.benches)
        ],
        sizes=sizes(facts),
        commands=commands(facts),
        hints={
            "eval": f"lrqat eval {run} --text heldout.txt --reference {model} --json > {run}/eval.json",
            "parity": f"lrqat-parity {run} EXPORTED",
            "bench": f"lrqat-bench EXPORTED PEER --out {run}/bench.json",
            "export": f"lrqat-export {run} --format gguf --out model.gguf && lrqat-parity {run} model.gguf",
        },
        css=Markup(Path(__file__).with_name("page.css").read_text(encoding="utf-8")),
        version=__version__,
    )


def lead(facts: Facts) -> str:
    """One sentence: how, and how long."""
    settings, method = facts.settings, facts.settings.get("method")
    words = [f"{METHODS.get(str(method), str(method))} on the grid {settings['grid']}" if method else "Training"]
    words += [f"from a {settings['start']} start"] if settings.get("start") else []
    if epochs := settings.get("block_epochs"):
        words += [f"layer by layer ({epochs} epochs), then end to end"]
    how = {"kd": f"by distillation from {teacher(settings)}", "ce": "on next tokens"}
    words += [how[loss]] if (loss := str(settings.get("loss"))) in how else []
    text = " ".join(words)
    if facts.summary is None:
        done = f"{integer(facts.metrics[-1]['step'])} of {settings.get('steps', '?')} steps" if facts.metrics else ""
        return f"{text}. Not finished: {done or 'no step yet'}."
    return f"{text}, {integer(facts.summary['steps'])} steps in {duration(facts.summary['seconds_total'])}."


def teacher(settings: dict[str, Any]) -> str:
    """What a run was distilled from."""
    return str(settings.get("teacher") or "the full-precision model")


def loss_words(settings: dict[str, Any]) -> str | None:
    """What the training loss is."""
    words = {"kd": f"KL to {teacher(settings)}, nats per token", "ce": "cross-entropy, nats per token"}
    return words.get(str(settings.get("loss")))


def tiles(facts: Facts) -> list[Tile]:
    """The figures on top."""
    found = []
    ours = next((q for q in facts.quality if q.ours), None)
    if ours:
        found.append(Tile(number(ours.perplexity), "perplexity"))
        if ours.kl is not None:
            found.append(Tile(number(ours.kl), "KL to the reference, nats per token"))
    if facts.metrics:
        found.append(Tile(number(_last_tenth(facts)), f"training {_loss_word(facts)}, last tenth"))
    if facts.summary:
        found.append(Tile(percent(facts.summary["codes_moved"]), "of the codes moved"))
        if "bits_per_weight" in facts.summary:
            found.append(Tile(number(facts.summary["bits_per_weight"]), "bits per parameter, dense ones included"))
    if facts.certificates:
        passed = sum(c.content["verdict"] == "pass" for c in facts.certificates)
        found.append(Tile(f"{passed} of {len(facts.certificates)}", "certificates passed"))
    return found


def _last_tenth(facts: Facts) -> float:
    tail = facts.metrics[-max(1, len(facts.metrics) // 10) :]
    return sum(float(row["loss"]) for row in tail) / len(tail)


def _loss_word(facts: Facts) -> str:
    return "KL" if facts.settings.get("loss") == "kd" else "loss"


def about(facts: Facts) -> list[tuple[str, str]]:
    """What was trained, on what, how: names and values."""
    settings, summary = facts.settings, facts.summary or {}
    tokens = facts.metrics[-1].get("tokens") if facts.metrics else None
    rows: dict[str, Any] = {
        "base model": settings["model"],
        "its weights, SHA-256": facts.base_sha256,
        "grid": settings["grid"],
        "other grids": _joined(settings.get("override")),
        "left as they are": _joined(settings.get("skip")),
        "quantized": _of(summary.get("quantized"), "parameters in", summary.get("quantized_weights"), "matrices"),
        "dense": _of(summary.get("dense"), "parameters"),
        "text": _text(settings),
        "the tokens drawn, SHA-256": facts.data_sha256,
        "tokens trained on": None if tokens is None else integer(tokens),
        "loss": loss_words(settings),
        "loss, first step": number(facts.metrics[0]["loss"]) if facts.metrics else None,
        "loss, mean of the last tenth": number(_last_tenth(facts)) if facts.metrics else None,
        "time before the first step": duration(summary["seconds_prepare"]) if "seconds_prepare" in summary else None,
        "time in all": duration(summary["seconds_total"]) if "seconds_total" in summary else None,
        "speed": _of(round(summary["tokens_per_second"]), "tokens per second") if summary else None,
        "peak memory": f"{number(summary['peak_memory_gb'])} GB" if "peak_memory_gb" in summary else None,
        "versions": ", ".join(f"{name} {value}" for name, value in facts.provenance.get("versions", {}).items()),
    }
    return [(name, str(value)) for name, value in rows.items() if value not in (None, "")]


def _text(settings: dict[str, Any]) -> str | None:
    """Sources of training text, one a line; none named means the default."""
    if "data" not in settings:
        return None
    return "\n".join(settings["data"]) or "CPython's documentation"


def _joined(values: Sequence[str] | None) -> str:
    return ", ".join(map(str, values or ()))


def _of(*words: Any) -> str | None:
    """Numbers and words in a row; None where a number is missing."""
    if any(word is None for word in words):
        return None
    return " ".join(integer(word) if isinstance(word, int) else word for word in words)


def curves(facts: Facts) -> list[str]:
    """Loss first."""
    if not facts.metrics:
        return []
    shown = {"loss": loss_words(facts.settings) or "loss", **CURVES}
    return [
        charts.curve(facts.metrics, key, label)
        for key, label in shown.items()
        if any(row.get(key) is not None for row in facts.metrics)
    ]


def qualities(facts: Facts) -> list[tuple[list[str], Table]]:
    """Charts and table of each text; only figures on as many tokens of it stand together."""
    groups: dict[tuple[int | None, int | None, str | None], list[Quality]] = {}
    for row in facts.quality:
        groups.setdefault((row.tokens, row.context, row.text), []).append(row)
    found = []
    for index, rows in enumerate(groups.values()):
        ordered = sorted(rows, key=lambda row: row.perplexity)
        svgs = [
            charts.bars([(r.model, r.perplexity, r.ours) for r in ordered], f"ppl{index}", "perplexity", ".2f"),
        ]
        if with_kl := [(r.model, r.kl, r.ours) for r in ordered if r.kl is not None]:
            svgs.append(charts.bars(with_kl, f"kl{index}", "KL to the reference, nats per token", ".3f"))
        cells = [
            [
                f"{row.model} (this run)" if row.ours else row.model,
                number(row.perplexity),
                number(row.kl),
                number(row.top1),
                integer(row.tokens),
                integer(row.context),
            ]
            for row in ordered
        ]
        found.append((svgs, Table(("model", "perplexity", "KL", "top-1", "tokens", "context"), cells)))
    return found


def heat_cells(found: HeatMap) -> Table:
    """The heat map as numbers."""
    rows = [[label, *map(percent, shares)] for label, shares in zip(found.rows, found.shares, strict=True)]
    return Table(("layer", *found.columns), rows)


def moved_words(facts: Facts, found: HeatMap) -> str:
    """How many codes moved, and where most did."""
    assert facts.layers is not None
    weights = facts.layers["weights"].values()
    moved, total = sum(w["moved"] for w in weights), sum(w["shape"][0] * w["shape"][1] for w in weights)
    cells = [
        (share, column, row)
        for row, shares in zip(found.rows, found.shares, strict=True)
        for column, share in zip(found.columns, shares, strict=True)
        if share is not None
    ]
    most, least = max(cells), min(cells)
    return (
        f"{integer(moved)} of {integer(total)} codes ({percent(moved / total)}) are not where training began. "
        f"Most moved in {most[1]} of layer {most[2]} ({percent(most[0])}), "
        f"fewest in {least[1]} of layer {least[2]} ({percent(least[0])})."
    )


def histograms(facts: Facts) -> list[tuple[str, list[str]]]:
    """By grid: codes, weights, scales, and how far scales went."""
    if not facts.layers:
        return []
    found = []
    for index, (grid, kinds) in enumerate(facts.layers["histograms"].items()):
        svgs = [
            charts.before_after(kinds["codes"], f"codes{index}", CODES, "code"),
            charts.before_after(kinds["weights"], f"weights{index}", WEIGHTS, "root mean squares of their matrix"),
            charts.before_after(kinds["scales"], f"scales{index}", SCALES, "log₂ of the absolute value"),
            charts.changes(kinds["scale_change"], f"change{index}", CHANGES),
        ]
        found.append((grid, svgs))
    return found


def certificate_table(certificate: Certificate) -> Table:
    """A certificate's comparisons with their limits."""
    content = certificate.content
    rows = {"served model": content["logits"]}
    rows |= {f"{name} control": measured for name, measured in content["controls"].items()}
    return Table(
        ("compared", "KL", "limit", "top-1", "perplexity", "reference", "result"),
        [
            [
                name,
                number(row["figures"]["kl"]),
                number(row["limits"]["kl"]),
                number(row["figures"]["top1"]),
                number(row["figures"]["perplexity"]),
                number(row["figures"].get("perplexity_reference")),
                result(name, row["passed"]),
            ]
            for name, row in rows.items()
        ],
    )


def result(name: str, passed: bool) -> str:
    """What a row's outcome means: the negative control must fail."""
    if name.startswith("negative"):
        return "NOT told apart" if passed else "told apart, as it must be"
    return "within limits" if passed else "OUTSIDE limits"


def bench_lead(bench: dict[str, Any]) -> str:
    """What was compared with what, and whether the files are alike."""
    others = [label for label in bench["layouts"] if label != bench["noise"]]
    same = [label for label in others if bench["layouts"][label]["same"]]
    text = f"{bench['first']} in {bench['runtime']}, against {', '.join(others)}."
    if same:
        text += f" {', '.join(same)}: same names, shapes, dtypes and bytes of all tensors."
    return text


def bench_chart(bench: dict[str, Any], index: int) -> str:
    """Ratios of CPU time to models of the same tensors, with intervals; the first is the measurement's own noise."""
    alike = [label for label in bench["ratios"] if bench["layouts"][label]["same"]] or list(bench["ratios"])
    rows = [
        (f"{words}, against {label}", found["ratio"], found["low"], found["high"])
        for metric, words in BENCH_CPU.items()
        for label in sorted(alike, key=lambda label: label != bench["noise"])
        if (found := bench["ratios"][label].get(metric)) and found["low"] is not None
    ]
    title = f"CPU time of {bench['first']} / that of another"
    return charts.intervals(rows, f"bench{index}", title, bench["limit"]) if rows else ""


def ratio_table(bench: dict[str, Any]) -> Table:
    """The first model's figures divided by each other's, with intervals."""
    shown = BENCH_CPU | BENCH_TIME
    rows = [
        [label, *(_ratio(found.get(metric)) for metric in shown), bench["verdicts"][label]]
        for label, found in bench["ratios"].items()
    ]
    return Table((f"{bench['first']} /", *shown.values(), "verdict"), rows)


def _ratio(found: dict[str, Any] | None) -> str:
    if found is None:
        return "–"
    interval = "" if found["low"] is None else f" [{found['low']:.3f}, {found['high']:.3f}]"
    return f"{found['ratio']:.3f}{interval}"


def speed_table(bench: dict[str, Any]) -> Table:
    """Medians of each model."""
    heads = ("model", "first token", "between tokens", "prompt tokens/s", "tokens/s", "load", "peak memory", "file")
    rows = []
    for label, model in bench["models"].items():
        medians = model["medians"]
        rows.append(
            [
                label,
                _milliseconds(medians.get("ttft_s")),
                _milliseconds(medians.get("itl_s")),
                number(model.get("prompt_tokens_per_s")),
                number(model.get("tokens_per_s")),
                "–" if medians.get("load_s") is None else f"{medians['load_s']:.2f} s",
                megabytes(medians.get("peak_bytes")),
                megabytes(model["file_bytes"]),
            ]
        )
    return Table(heads, rows)


def _milliseconds(seconds: float | None) -> str:
    return "–" if seconds is None else f"{number(1e3 * seconds)} ms"


def sizes(facts: Facts) -> Table | None:
    """Bytes of the exported files that are there; without quantization every parameter would take two."""
    rows = [[c.exported.name, megabytes(c.size)] for c in facts.certificates if c.size is not None]
    summary = facts.summary or {}
    if not rows or "quantized" not in summary:
        return None
    parameters = summary["quantized"] + summary.get("skipped", 0) + summary["dense"]
    return Table(("file", "size"), [*rows, ["the same parameters in bfloat16", megabytes(2 * parameters)]])


def number(value: float | None) -> str:
    """Four significant digits; a dash for what is not known."""
    if value is None:
        return "–"
    text = f"{value:.4g}"
    return text if "e" not in text else f"{value:.1e}"


def integer(value: int | None) -> str:
    """With thin spaces between thousands."""
    return "–" if value is None else f"{value:,}".replace(",", "\u202f")


def percent(share: float | None) -> str:
    """Of a share."""
    return "–" if share is None else f"{100 * share:.2f}\u202f%" if share < 0.1 else f"{100 * share:.1f}\u202f%"


def duration(seconds: float) -> str:
    """In the unit that suits it."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def megabytes(size: int | None) -> str:
    """In units of a million bytes."""
    return "–" if size is None else f"{size / 1e6:,.1f}".replace(",", "\u202f") + " MB"
