"""The model card of an exported model: what it is, how it came about, how to run it so that it stays exact."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from lrqat import __version__
from lrqat.fused import FusedCheckpoint

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


def card(checkpoint: FusedCheckpoint, form: str, path: str, dtype: str = "float16") -> str:
    """Markdown with the front matter that the Hugging Face hub reads.

    Args:
        checkpoint: what was exported.
        form: the format's name.
        path: what users pass to the runtime.
        dtype: what vLLM serves in.
    """
    settings: dict[str, Any] = checkpoint.provenance.get("settings", {})
    method = str(checkpoint.provenance.get("method", "unknown"))
    base = str(settings.get("model", checkpoint.provenance.get("source", "unknown")))
    hub = base if base.count("/") == 1 and not base.startswith((".", "/", "~")) else None
    counts = checkpoint.counts()
    grids = Counter(str(spec.grid) for spec in checkpoint.specs.values())
    runtime = "gguf" if form == "gguf" else "vllm"
    front = ["---", *([f"base_model: {json.dumps(hub)}"] if hub else []), "library_name: transformers"]
    tags = ["lrqat", form, "quantized", *(["quantization-aware-training"] if method not in HOW else [])]
    front += ["tags:", *(f"- {tag}" for tag in tags), "---"]
    rows = {
        "base model": base,
        "method": method,
        "grid": ", ".join(f"{grid} ({count} weights)" for grid, count in grids.items()),
        "quantized parameters": f"{counts['quantized']:,}",
        "dense parameters": f"{counts['dense']:,}",
        **{key.replace("_", " "): settings[key] for key in SHOWN if settings.get(key) is not None},
        "weights of the base, SHA-256": checkpoint.provenance.get("base_sha256"),
        "made with": f"lrqat {__version__}",
    }
    table = [f"| {key} | {_cell(value)} |" for key, value in rows.items() if value not in (None, "", [], ())]
    return "\n".join(
        [
            *front,
            f"# {base.rstrip('/').rpartition('/')[2]}, {', '.join(grids)}, {form}",
            "",
            f"{HOW.get(method, 'Trained')} on the very grid that these bytes store: integers were copied.",
            "",
            "| | |",
            "|---|---|",
            *table,
            "",
            "## Run",
            "",
            "```",
            RUN[runtime].format(path=path, dtype=dtype),
            "```",
            "",
            EXACT[runtime],
            "",
            "Is it the trained model? `lrqat-parity FUSED " + path + "` writes a certificate.",
            "",
        ]
    )


HOW = {"rtn": "Rounded to nearest, without training,", "import": "Imported, as somebody else quantized it,"}
HOW |= {"gptq": "Rounded by GPTQ, without training,", "awq": "Rounded after AWQ, without training,"}
SHOWN = ("steps", "batch_size", "seq_len", "loss", "rank", "lr", "lr_scales", "range_p", "data", "seed")


def _cell(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
