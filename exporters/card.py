"""The model card of an exported model: what it is, how it came about, what was measured, how to run it exactly.

Beside a directory's files it is README.md, beside NAME.gguf it is NAME.card.md. Facts come from the checkpoint and from
the run that holds it (`lrqat.report.facts`); `lrqat-parity` writes its verdict between two marks, where the card has
said that there is none yet.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrqat import __version__
from lrqat.fused import FusedCheckpoint
from lrqat.jsonfile import write_text
from lrqat.report.facts import Quality, own_figures

# How each format is run; {path} is the exported file or directory, {dtype} what config.json serves in.
RUN = {
    "gguf": "llama-server -m {path}\nlrqat-serve {path}                 # without a llama.cpp of your own",
    "vllm": "VLLM_CPU_INT4_W4A8=0 vllm serve {path} --dtype {dtype}\nlrqat-serve {path}",
}
EXACT = {
    "gguf": "llama.cpp computes with activations of 8 bits per block of 32; the weights are exact.",
    "vllm": "`--dtype float16` rounds activations eight times finer than bfloat16. On CPUs with AMX, "
    "`VLLM_CPU_INT4_W4A8=0` keeps vLLM from rounding them to 8 bits.",
}
HOW = {"rtn": "Rounded to nearest, without training,", "import": "Imported, as somebody else quantized it,"}
HOW |= {"gptq": "Rounded by GPTQ, without training,", "awq": "Rounded after AWQ, without training,"}
SHOWN = (
    "steps",
    "batch_size",
    "seq_len",
    "loss",
    "rank",
    "lr",
    "lr_scales",
    "block_epochs",
    "block_lr",
    "block_lr_scales",
    "range_p",
    "data",
    "seed",
)
BEGIN, END = "<!-- lrqat-parity -->", "<!-- /lrqat-parity -->"


@dataclass(frozen=True)
class Measured:
    """What a run's folder tells: summary.json, and the run's own figures of `lrqat eval --json` (RUN/eval*.json)."""

    summary: Mapping[str, Any]
    quality: Sequence[Quality]


def measured(fused: Path) -> Measured:
    """What is known of the run that a fused checkpoint lies in; empty where it lies in none.

    Raises:
        LrqatError: a file of the run is damaged.
    """
    found = [folder for folder in (fused, fused.resolve().parent) if (folder / "run.json").is_file()]
    return Measured(*own_figures(found[0])) if found else Measured({}, [])


def card(
    checkpoint: FusedCheckpoint, form: str, path: str, dtype: str = "float16", known: Measured | None = None
) -> str:
    """Markdown with the front matter that the Hugging Face hub reads.

    Args:
        checkpoint: what was exported.
        form: the format's name.
        path: what users pass to the runtime.
        dtype: what vLLM serves in.
        known: what was measured about the run.
    """
    settings: dict[str, Any] = checkpoint.provenance.get("settings", {})
    method = str(checkpoint.provenance.get("method", "unknown"))
    base = str(settings.get("model", checkpoint.provenance.get("source", "unknown")))
    counts = checkpoint.counts()
    grids = Counter(str(spec.grid) for spec in checkpoint.specs.values())
    runtime = "gguf" if form == "gguf" else "vllm"
    rows = {
        "base model": base,
        "method": method,
        "grid": ", ".join(f"{grid} ({count} weights)" for grid, count in grids.items()),
        "quantized parameters": f"{counts['quantized']:,}",
        "dense parameters": f"{counts['dense']:,}",
        **{key.replace("_", " "): settings[key] for key in SHOWN if settings.get(key) is not None},
        **_training(known),
        "weights of the base, SHA-256": checkpoint.provenance.get("base_sha256"),
        "made with": f"lrqat {__version__}",
    }
    return "\n".join(
        [
            "---",
            _front(base, form, method),
            "---",
            f"# {base.rstrip('/').rpartition('/')[2]}, {', '.join(grids)}, {form}",
            "",
            f"{HOW.get(method, 'Trained')} on the very grid that these bytes store: integers were copied.",
            "",
            *_table(("", ""), [(key, value) for key, value in rows.items() if value not in (None, "", [], ())]),
            *_quality(known),
            "",
            "## Is it the trained model?",
            "",
            BEGIN,
            f"Not checked yet: `lrqat-parity FUSED {path}` compares it on the real runtime and tells here.",
            END,
            "",
            "## Run",
            "",
            "```",
            RUN[runtime].format(path=path, dtype=dtype),
            "```",
            "",
            EXACT[runtime],
            "",
        ]
    )


def card_path(exported: Path) -> Path:
    """Where the card of an exported model lies."""
    return exported / "README.md" if exported.is_dir() else exported.with_suffix(".card.md")


def certify_card(exported: Path, certificate: Mapping[str, Any]) -> None:
    """Put a certificate's verdict between the marks of the card, if there is a card that has them."""
    path = card_path(exported)
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    before, begun, rest = text.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not (begun and ended):
        return
    write_text(path, f"{before}{BEGIN}\n{_verdict(certificate)}\n{END}{after}")


def _front(base: str, form: str, method: str) -> str:
    """YAML for the hub, written by its own library."""
    from huggingface_hub import ModelCardData

    on_hub = base.count("/") == 1 and not base.startswith((".", "/", "~")) and not Path(base).exists()
    known: dict[str, Any] = {"base_model": base, "base_model_relation": "quantized"} if on_hub else {}
    tags = ["lrqat", form, "quantized", *(["quantization-aware-training"] if method not in HOW else [])]
    data = ModelCardData(library_name="transformers", pipeline_tag="text-generation", tags=tags, **known)
    return str(data.to_yaml()).strip()


def _training(known: Measured | None) -> dict[str, str]:
    """What the run tells beside its settings."""
    moved = known.summary.get("codes_moved") if known else None
    return {} if moved is None else {"codes moved by training": f"{moved:.2%}"}


def _quality(known: Measured | None) -> list[str]:
    """The run's own figures on held-out text."""
    rows = known.quality if known else []
    if not rows:
        return []
    cells = [
        tuple("–" if v is None else f"{v:.4g}" if isinstance(v, float) else f"{v:,}" for v in values)
        for values in ((q.perplexity, q.kl, q.top1, q.tokens, q.context) for q in rows)
    ]
    heads = ("perplexity", "KL to the unquantized model, nats per token", "top-1 agreement", "tokens", "context")
    return ["", "## Measured on held-out text", "", *_table(heads, cells)]


def _verdict(certificate: Mapping[str, Any]) -> str:
    """A certificate in Markdown."""
    weights, figures = certificate["weights"], certificate["logits"]["figures"]
    rows = {
        "verdict": f"**{certificate['verdict'].upper()}**",
        "runtime": certificate["runtime"],
        "weights bitwise equal": f"{weights['equal']} of {weights['total']}",
        "KL to the trained model, nats per token": f"{figures['kl']:.2e} over {figures['positions']} positions",
        "top-1 agreement": f"{figures['top1']:.4f}",
    }
    if negative := certificate["controls"].get("negative"):
        rows["KL of the same weights rounded once more"] = f"{negative['figures']['kl']:.2e}"
    return "\n".join(_table(("", ""), list(rows.items())))


def _table(heads: tuple[str, ...], rows: list[tuple[Any, ...]]) -> list[str]:
    return [
        f"| {' | '.join(heads)} |",
        "|---" * len(heads) + "|",
        *(f"| {' | '.join(map(_cell, row))} |" for row in rows),
    ]


def _cell(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
