"""What files tell about a run.

    RUN/run.json, metrics.jsonl, summary.json, layers.json, fused/fused.json     `lrqat train`
    *.certificate.json, certificate.json                                         `lrqat-parity`
    one JSON object or one a line, with a perplexity                             `lrqat eval --json`, benchmarks
    JSON with ratios and their intervals                                         `lrqat-bench`

Only run.json must be there. What was given by name must fit the run, or is refused; what is found beside the run and
belongs to another one is passed over.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrqat.errors import LrqatError
from lrqat.hashing import sha256
from lrqat.jsonfile import read_json, read_metrics

Json = dict[str, Any]
UNQUANTIZED_BITS = 16
FORMATS = ("gptq", "awq", "compressed-tensors")  # of directories


@dataclass(frozen=True)
class Certificate:
    """A certificate of `lrqat-parity`.

    Attributes:
        path: the certificate's file.
        exported: the exported file or directory, as it was called when the certificate was written.
        size: bytes of its weight files that lie beside the certificate; None where they are not there.
        export_flags: of `lrqat-export`, where the exported model is there to tell.
        content: what the certificate holds.
    """

    path: Path
    exported: Path
    size: int | None
    export_flags: str | None
    content: Json


@dataclass(frozen=True)
class Quality:
    """Figures of a model on a text.

    Attributes:
        model: its name.
        ours: it is this run.
        perplexity: of tokens.
        kl: to the reference, nats per token.
        top1: share of positions where it ranks the reference's first token first.
        tokens: how many were predicted.
        context: tokens of a block; each is its own context.
        text: the text's name, where the file tells.
        bits: stored bits per quantized weight, where the file tells.
    """

    model: str
    ours: bool
    perplexity: float
    kl: float | None
    top1: float | None
    tokens: int | None
    context: int | None
    text: str | None = None
    bits: float | None = None


@dataclass(frozen=True)
class Facts:
    """All that is known of a run; None or empty where nothing is."""

    run: Path
    settings: Json
    base_sha256: str | None
    data_sha256: str | None
    metrics: list[Json]
    summary: Json | None
    layers: Json | None
    provenance: Json
    certificates: list[Certificate]
    quality: list[Quality]
    benches: list[Json]

    @property
    def name(self) -> str:
        """The base model's name."""
        return str(self.settings["model"]).rstrip("/").rpartition("/")[2]


def gather(run: Path, certificates: Sequence[Path], benches: Sequence[Path], qualities: Sequence[Path]) -> Facts:
    """Read a run and what was measured about it.

    Raises:
        LrqatError: no run, a damaged file, a certificate of another run.
    """
    path = run / "run.json"
    if not path.is_file():
        raise LrqatError(f"{run}: no run.json; expected a run of `lrqat train` (its --out)")
    told = read_json(path)
    settings = told.get("settings")
    if not isinstance(settings, dict) or "model" not in settings or "grid" not in settings:
        raise LrqatError(f"{path}: expected settings with model and grid; it was not written by `lrqat train`")
    return Facts(
        run=run,
        settings=settings,
        base_sha256=told.get("base_sha256"),
        data_sha256=told.get("data_sha256"),
        metrics=read_steps(run / "metrics.jsonl"),
        summary=_optional(run / "summary.json"),
        layers=read_layers(run / "layers.json"),
        provenance=(_optional(run / "fused" / "fused.json") or {}).get("provenance", {}),
        certificates=find_certificates(run, certificates),
        quality=[
            row
            for file in _with_found(qualities, run, "eval*.json")
            for row in read_quality(file, run, str(settings["grid"]))
        ],
        benches=[read_bench(file) for file in _with_found(benches, run, "bench*.json")],
    )


def own_figures(run: Path) -> tuple[Json, list[Quality]]:
    """summary.json, and what RUN/eval*.json tells about the run itself."""
    summary = _optional(run / "summary.json") or {}
    rows = [q for file in sorted(run.glob("eval*.json")) for q in read_quality(file, run, str(summary.get("grid")))]
    return summary, [q for q in rows if q.ours]


def _optional(path: Path) -> Json | None:
    return read_json(path) if path.is_file() else None


def _with_found(given: Sequence[Path], run: Path, pattern: str) -> list[Path]:
    """What was named, and what the run's folder holds, each once."""
    return list({path.resolve(): path for path in [*given, *sorted(run.glob(pattern))]}.values())


def read_steps(path: Path) -> list[Json]:
    """The steps of a run; refuses rows without a step or a finite loss."""
    rows = read_metrics(path)
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not isinstance(row.get("step"), int) or not _is_number(row.get("loss")):
            raise LrqatError(f"{path}:{number}: expected a step and a loss; the line was changed")
    return rows


def read_layers(path: Path) -> Json | None:
    """layers.json, whole; None where there is none (runs of earlier versions)."""
    if not path.is_file():
        return None
    layers = read_json(path)
    if layers.get("format") != "lrqat-layers" or layers.get("version") != 1:
        raise LrqatError(
            f"{path}: expected format lrqat-layers version 1, got {layers.get('format')!r} version "
            f"{layers.get('version')!r}; use the lrqat that wrote it"
        )
    try:
        for weight in layers["weights"].values():
            rows, columns = weight["shape"]
            _expect(0 <= weight["moved"] <= rows * columns, "moved")
        for kinds in layers["histograms"].values():
            for kind, entry in kinds.items():
                counts = [entry["counts"]] if kind == "scale_change" else [entry["before"], entry["after"]]
                _expect(sum(map(sum, counts)) > 0, kind)
                _expect(kind == "codes" or entry["low"] < entry["high"], kind)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise LrqatError(f"{path}: damaged ({type(error).__name__} {error}); copy it again") from None
    return layers


def _expect(condition: bool, what: str) -> None:
    """Refuse a field of a damaged file."""
    if not condition:
        raise ValueError(what)


def find_certificates(run: Path, given: Sequence[Path]) -> list[Certificate]:
    """Certificates by name, and those of this run in its folder and beside it."""
    fused = run / "fused" / "fused.json"
    ours = sha256([fused]) if fused.is_file() else None
    found: dict[Path, Certificate] = {}
    for path in given:
        certificate = read_certificate(path)
        if (theirs := certificate.content["hashes"]["fused"].get("fused.json")) != ours:
            raise LrqatError(
                f"{path}: certifies another checkpoint (fused.json {str(theirs)[:12]}, {run} has {str(ours)[:12]}); "
                "leave it out, or run lrqat-parity again"
            )
        found[path.resolve()] = certificate
    for path in _beside(run):
        if path.resolve() not in found and _names(path, ours):
            found[path.resolve()] = read_certificate(path)
    return list(found.values())


def _beside(run: Path) -> Iterator[Path]:
    for folder in (run, run.resolve().parent):
        yield from sorted(folder.glob("*.certificate.json"))
        yield from sorted(folder.glob("*/certificate.json"))


def _names(path: Path, fused_sha256: str | None) -> bool:
    """Whether a file is a certificate of this checkpoint."""
    try:
        content = read_json(path)
        return fused_sha256 is not None and content["hashes"]["fused"].get("fused.json") == fused_sha256
    except (LrqatError, OSError, KeyError, TypeError, AttributeError):
        return False


def read_certificate(path: Path) -> Certificate:
    """One certificate; refuses other files and damaged ones."""
    content = read_json(path)
    if content.get("format") != "lrqat-certificate":
        raise LrqatError(f"{path}: expected a certificate of lrqat-parity, got format {content.get('format')!r}")
    try:
        _expect(isinstance(content["verdict"], str), "verdict")
        _expect(isinstance(content["hashes"]["fused"], dict), "hashes")
        _ = int(content["weights"]["equal"]), int(content["weights"]["total"]), str(content["runtime"])
        for measured in (content["logits"], *content["controls"].values()):
            for name in ("kl", "top1", "perplexity"):
                _expect(measured["figures"][name] is None or _is_number(measured["figures"][name]), name)
            _ = measured["limits"]["kl"], bool(measured["passed"])
        names = list(content["hashes"]["exported"])
        _expect(bool(names) and all(isinstance(name, str) for name in names), "hashes")
        _ = content["settings"]["sequences"], content["settings"]["tokens"], content["token_ids_equal"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise LrqatError(f"{path}: damaged certificate ({type(error).__name__} {error}); write it again") from None
    told = content.get("paths", {}).get("exported")  # from the certificate's folder; version 1 had none
    exported = path.parent / (told or (names[0] if names[0].endswith(".gguf") else ""))
    folder = exported.parent if names[0].endswith(".gguf") else exported
    files = [folder / name for name in names if name.endswith((".gguf", ".safetensors"))]
    there = bool(files) and all(file.is_file() for file in files)
    return Certificate(
        path=path,
        exported=_plain(exported),
        size=sum(file.stat().st_size for file in files) if there else None,
        export_flags="--format gguf" if names[0].endswith(".gguf") else _export_flags(exported / "config.json"),
        content=content,
    )


def _plain(path: Path) -> Path:
    """Without .. and ., from here if it lies below."""
    whole = path.resolve()
    return whole.relative_to(Path.cwd()) if whole.is_relative_to(Path.cwd()) else whole


def _export_flags(config: Path) -> str | None:
    quantization = read_json(config).get("quantization_config") if config.is_file() else None
    if not isinstance(quantization, dict) or quantization.get("quant_method") not in FORMATS:
        return None
    groups = quantization.get("config_groups")
    rounded = [g for g in groups.values() if g.get("input_activations")] if isinstance(groups, dict) else []
    return f"--format {quantization['quant_method']}" + (" --activations int8" if rounded else "")


def read_quality(path: Path, run: Path, grid: str) -> list[Quality]:
    """What `lrqat eval --json` printed (one object, or one a line), or a table of benchmarks/quality.

    Args:
        path: the file.
        run: rows whose model is this run's are its own.
        grid: of a table, its rows and those that are not quantized are taken.
    """
    try:
        text = path.read_text(encoding="utf-8")
        contents = _parsed(text)
    except FileNotFoundError:
        raise LrqatError(f"{path}: no such file") from None
    except ValueError as error:
        raise LrqatError(f"{path}: not JSON ({error})") from None
    try:
        if len(contents) == 1 and contents[0].get("benchmark") == "quality":
            return list(_of_table(contents[0], grid))
        ours = {run.resolve(), (run / "fused").resolve()}
        return [_of_eval(row, Path(str(row["model"])).resolve() in ours) for row in contents]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise LrqatError(
            f"{path}: expected what `lrqat eval --json` prints ({type(error).__name__} {error}); make it again"
        ) from None


def _parsed(text: str) -> list[Any]:
    """The JSON value of a file, or those of its lines."""
    try:
        return [json.loads(text)]
    except ValueError:
        return [json.loads(line) for line in text.splitlines() if line.strip()]


def _of_eval(row: Json, ours: bool) -> Quality:
    for name in ("perplexity", "kl", "top1", "tokens", "context"):
        _expect(_is_number(row[name]) or (row[name] is None and name in ("kl", "top1")), name)
    return Quality(str(row["model"]), ours, row["perplexity"], row["kl"], row["top1"], row["tokens"], row["context"])


def _of_table(table: Json, grid: str) -> Iterator[Quality]:
    """Means over seeds, on the text that the table is sorted by."""
    kind = table["sorted_by"]
    text = table[kind]
    for row in table["rows"]:
        if row["grid"] != grid and row["bits_per_weight"] < UNQUANTIZED_BITS:
            continue
        runs = row[kind]["kl"]["runs"]
        tool = " ".join(str(row[key]) for key in ("tool", "version") if row.get(key))
        words = [row["name"], f"({tool})" if tool else "", f"mean of {runs} seeds" if runs > 1 else ""]
        yield Quality(
            model=" ".join(word for word in words if word),
            ours=False,
            perplexity=float(row[kind]["perplexity"]["mean"]),
            kl=float(row[kind]["kl"]["mean"]),
            top1=float(row[kind]["top1"]["mean"]),
            tokens=text["blocks"] * (text["seq_len"] - 1),
            context=text["seq_len"],
            text=str(text["text"]),
            bits=float(row["bits_per_weight"]),
        )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def read_bench(path: Path) -> Json:
    """What `lrqat-bench` wrote; refuses other files and damaged ones."""
    content = read_json(path)
    if content.get("format") != "lrqat-bench" or content.get("version") != 2:
        raise LrqatError(
            f"{path}: expected format lrqat-bench version 2, got {content.get('format')!r} version "
            f"{content.get('version')!r}; run lrqat-bench again"
        )
    try:
        _expect(isinstance(content["first"], str) and isinstance(content["noise"], str), "first")
        _expect(_is_number(content["limit"]) and _is_number(content["confidence"]), "limit")
        for model in content["models"].values():
            _ = int(model["file_bytes"]), model["medians"].items()
        for label, metrics in content["ratios"].items():
            _ = str(content["verdicts"][label]), bool(content["layouts"][label]["same"])
            for row in metrics.values():
                _expect(_is_number(row["ratio"]) and "low" in row and "high" in row, "ratio")
        _ = content["settings"], content["machine"], str(content["runtime"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise LrqatError(f"{path}: damaged ({type(error).__name__} {error}); run lrqat-bench again") from None
    return content


@dataclass(frozen=True)
class HeatMap:
    """Share of codes that moved.

    Attributes:
        rows: labels of the layers.
        columns: names of the projections, in the order of the model.
        shares: [row][column]; None where there is no such weight.
    """

    rows: list[str]
    columns: list[str]
    shares: list[list[float | None]]


def heat_map(weights: Mapping[str, Mapping[str, Any]]) -> HeatMap:
    """Moved codes by layer and projection; a layer's experts count together.

    model.layers.3.mlp.experts.7.up_proj.weight -> layer 3, up_proj
    """
    counts: dict[tuple[str, str], dict[str, tuple[int, int]]] = {}
    columns: dict[str, None] = {}
    for name, weight in weights.items():
        found = re.match(r"(.*?)\.(\d+)\.", name)
        row = (found[1], found[2]) if found else ("", "")
        column = name.removesuffix(".weight").rpartition(".")[2]
        columns[column] = None
        moved, total = counts.setdefault(row, {}).get(column, (0, 0))
        size = weight["shape"][0] * weight["shape"][1]
        counts[row][column] = (moved + weight["moved"], total + size)
    one_stack = len({prefix for prefix, _ in counts}) == 1
    ordered = sorted(counts, key=lambda row: (row[0], int(row[1] or -1)))
    labels = [index if one_stack else f"{prefix.rpartition('.')[2]} {index}".strip() for prefix, index in ordered]
    shares = [[_share(counts[row].get(column)) for column in columns] for row in ordered]
    return HeatMap(labels, list(columns), shares)


def _share(counted: tuple[int, int] | None) -> float | None:
    return None if counted is None else counted[0] / counted[1]
