"""One table of all results: JSON for programs, Markdown and plots for people.

Rows that differ in nothing but their seed are one line: mean, lowest and highest. A line has figures on the test text
when all of its runs have. Lines are sorted by grid, those of more bits first, and then by KL: on the test text when
every line has it, else on the validation text.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.quality.plots import kl_against_bits, kl_against_minutes
from lrqat.errors import LrqatError
from lrqat.jsonfile import read_json, write_json, write_text

KINDS = ("valid", "test")
TEXT = ("text", "sha256", "seq_len", "blocks")
SCORES = ("kl", "perplexity", "word_perplexity", "top1")
KEPT = ("grid", "name", "tool", "version", "method", "bits_per_weight", "megabytes")
SAME_SPEED = 1.25  # times the slowest measurement of a machine, whose caches and clock other work shares
COSTS = ("seconds", "cpu_seconds", "core_minutes", "peak_memory_gb", "codes_moved")


def write(out: Path) -> tuple[Path, int]:
    """Write quality.json, quality.md and the plots; returns the first's path and the count of lines."""
    results = [read_json(path) for path in sorted((out / "rows").glob("*/result.json"))]
    results = [result for result in results if "valid" in result]
    if not results:
        raise LrqatError(f"{out}: no results; make some with `python -m benchmarks.quality run`")
    table = {
        "benchmark": "quality",
        "model": Path(read_json(out / "bench.json")["model"]).name,
        **{kind: one_text(results, kind) for kind in KINDS},
        "zeroshot": next((asked(result["zeroshot"]) for result in results if "zeroshot" in result), None),
        **lines(results),
    }
    path = out / "quality.json"
    write_json(path, table)
    write_text(out / "quality.md", markdown(table))
    for name, plot in (("kl-minutes.png", kl_against_minutes), ("kl-bits.png", kl_against_bits)):
        plot(table["rows"], table["sorted_by"], out / name)
    return path, len(table["rows"])


def one_text(results: list[dict[str, Any]], kind: str) -> dict[str, Any] | None:
    """The text that all results of a kind are of."""
    texts = {json.dumps({key: r[kind][key] for key in TEXT}): r for r in results if kind in r}
    if len(texts) > 1:
        first, other = (f"{r['grid']} {r['name']}" for r in list(texts.values())[:2])
        raise LrqatError(f"{first} and {other} were scored on different {kind} text; run them again on one")
    found: dict[str, Any] | None = json.loads(next(iter(texts))) if texts else None
    return found


def asked(zeroshot: Mapping[str, Any]) -> dict[str, int]:
    """Tasks, and how many rows of each; the same for all results (`benchmarks.quality.rows.zeroshot`)."""
    return {name: found["rows"] for name, found in zeroshot["tasks"].items()}


def lines(results: list[dict[str, Any]]) -> dict[str, Any]:
    """{"sorted_by": valid or test, "rows": one for all seeds of a row}."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        settings = {key: value for key, value in result["settings"].items() if key != "seed"}
        key = json.dumps([result["grid"], result["name"], result["tool"], settings], sort_keys=True)
        groups.setdefault(key, []).append(result)
    rows = [line(group) for group in groups.values()]
    sorted_by = "test" if all(row["test"] for row in rows) else "valid"
    bits: dict[str, float] = {}
    for row in rows:
        bits[row["grid"]] = min(row["bits_per_weight"], bits.get(row["grid"], row["bits_per_weight"]))
    rows.sort(key=lambda row: (-bits[row["grid"]], row["grid"], row[sorted_by]["kl"]["mean"]))
    return {"sorted_by": sorted_by, "rows": rows}


def line(group: list[dict[str, Any]]) -> dict[str, Any]:
    """Runs of one row, together."""
    first = group[0]
    found: dict[str, Any] = {key: first.get(key) for key in KEPT}
    found |= {"settings": {key: value for key, value in first["settings"].items() if key != "seed"}}
    found["seeds"] = sorted(result["seed"] for result in group if result["seed"] is not None)
    found |= {key: spread(result.get(key) for result in group) for key in COSTS}
    found["code_sha256"] = sorted({result["code_sha256"] for result in group if "code_sha256" in result})
    found["machines"] = [one for result in group for one in result.get("machines", [])]
    found["cost_is_a_lower_bound"] = any(result.get("cost_is_a_lower_bound") for result in group)
    for kind in KINDS:
        whole = all(kind in result for result in group)
        found[kind] = {key: spread(result[kind][key] for result in group) for key in SCORES} if whole else None
    told = [result.get("zeroshot") for result in group]
    found["zeroshot"] = spread(one and one["average"]["acc"] for one in told)
    found["zeroshot_stderr"] = spread(one and one["average"]["acc_stderr"] for one in told)
    return found


def machines_of(rows: Iterable[Mapping[str, Any]]) -> list[list[dict[str, Any]]]:
    """Measurements (`benchmarks.peers.shared.machine`) of each machine: one processor, at about one speed."""
    found = {(one["processor"], one["gflops"]): one for row in rows for one in row["machines"]}
    groups: list[list[dict[str, Any]]] = []
    for name, speed in sorted(found):
        known = groups[-1][0] if groups else {"processor": None}
        if known["processor"] != name or speed > SAME_SPEED * known["gflops"]:
            groups.append([])
        groups[-1].append(found[name, speed])
    return groups


def told_of(machine: list[dict[str, Any]]) -> str:
    """A processor, and what a core-minute on it is worth."""
    ends = dict.fromkeys(f"{machine[end]['gflops']:.0f}" for end in (0, -1))
    return f"{machine[0]['processor']} at {' to '.join(ends)} GFLOP/s"


def spread(values: Iterable[float | None]) -> dict[str, float] | None:
    """Mean, lowest and highest; None where a run has none."""
    known = list(values)
    numbers = [value for value in known if value is not None]
    if not numbers or len(numbers) < len(known):
        return None
    return {"mean": sum(numbers) / len(numbers), "low": min(numbers), "high": max(numbers), "runs": len(numbers)}


def markdown(table: Mapping[str, Any]) -> str:
    """The table for people."""
    kinds = [kind for kind in KINDS if table[kind]]
    texts = [
        f"{kind}: {table[kind]['text']}, {table[kind]['blocks']} x {table[kind]['seq_len']} tokens" for kind in kinds
    ]
    head = ["grid", "row", "tool", "bits", "MB", "runs"]
    head += [f"{name}, {kind}" for kind in kinds for name in ("KL", "perplexity", "per word", "top-1")]
    machines = machines_of(table["rows"])
    head += ["core-min", *(["of"] if len(machines) > 1 else []), "GB", "codes moved"]
    zeroshot = table["zeroshot"]
    head += ["zero-shot"] if zeroshot else []
    codes = {one for row in table["rows"] for one in row["code_sha256"]}
    notes = f" Made by {len(codes)} versions of lrqat's code, which quality.json names." if len(codes) > 1 else ""
    if machines:
        each = "; ".join(f"({letter(place)}) {told_of(one)}" for place, one in enumerate(machines))
        each = each if len(machines) > 1 else told_of(machines[0])
        notes += f" A core-minute is of one thread of {each}, float32."
    if zeroshot:
        tasks = ", ".join(f"{name} ({count})" for name, count in zeroshot.items())
        notes += f" Zero-shot: mean accuracy and its standard error, {tasks}."
    written = [
        f"# Quality: {table['model']}",
        "",
        f"KL in nats per token to the full-precision model ({'; '.join(texts)}); each block is its own context. Bits "
        "are of a quantized weight, scales included; MB of all that is stored. Cost: user and system time and peak "
        "memory of the whole command. Of several seeds: mean (lowest to highest). "
        f"Sorted by KL, {table['sorted_by']}.{notes}",
        "",
        f"| {' | '.join(head)} |",
        f"|{'---|' * len(head)}",
    ]
    for row in table["rows"]:
        cells = [row["grid"], row["name"], f"{row['tool']} {row['version']}" if row["tool"] else ""]
        cells += [f"{row['bits_per_weight']:.2f}", f"{row['megabytes']:.0f}", str(len(row["seeds"]) or 1)]
        for kind in kinds:
            figures = row[kind] or dict.fromkeys(SCORES)
            formats = (".4f", ".5g", ".5g", ".3f")
            cells += [shown(figures[key], form) for key, form in zip(SCORES, formats, strict=True)]
        least = ">= " if row["cost_is_a_lower_bound"] else ""
        cells += [(least + shown(row["core_minutes"], ".3g")).strip()]
        if len(machines) > 1:
            on = [place for place, known in enumerate(machines) if any(one in known for one in row["machines"])]
            cells += [" ".join(map(letter, on))]
        cells += [shown(row["peak_memory_gb"], ".2f")]
        cells += [shown(row["codes_moved"], ".2%")]
        if zeroshot:
            error = row["zeroshot_stderr"]
            cells += [shown(row["zeroshot"], ".4f") + (f" ± {error['mean']:.4f}" if error else "")]
        written.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    return "\n".join(written) + "\n"


def letter(place: int) -> str:
    """Which machine of the note above the table."""
    return chr(ord("a") + place)


def shown(found: Mapping[str, float] | None, form: str) -> str:
    """A figure, with its range if there are several runs."""
    if found is None:
        return ""
    text = f"{found['mean']:{form}}"
    return f"{text} ({found['low']:{form}} to {found['high']:{form}})" if found["runs"] > 1 else text
