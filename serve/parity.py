"""Is the served model the trained model? Weights bit by bit, logits within derived limits, two controls.

    weights     every tensor of the exported bytes, decoded by the format's own reader, equals the checkpoint's
    logits      runtime against the fake-quant model (float32 transformers) on the same tokens
    positive    the same weights dequantized to float32, through the same runtime: must agree to float32 noise.
                So tokens, positions, metadata, rope layout and tying are right, and what is left is arithmetic
    negative    the same weights pushed once more through a stock quantizer: must be told apart (outside the limits,
                or several times farther from the reference), else the comparison says nothing

The result is a certificate: figures, limits and why, hashes, versions, settings, verdict.
"""

from __future__ import annotations

import math
import os
import platform
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import lrqat
from exporters import dense, gguf
from exporters.compressed_tensors import meets_int8
from exporters.formats import FORMATS, as_stored, detect
from exporters.verify import count_equal
from lrqat.activations import round_inputs
from lrqat.console import log
from lrqat.data import blocks
from lrqat.errors import LrqatError
from lrqat.fused import FusedCheckpoint, FusedTensor, Lazy
from lrqat.grid import to_latent
from lrqat.grids.affine import AffineGrid
from lrqat.hashing import sha256
from lrqat.models import fake_quant_model, fused_tokenizer
from lrqat.ranges import start
from serve.compare import EXACT, LLAMACPP, VLLM_BFLOAT16, VLLM_FLOAT16, Comparison, Limits, disturbed, within

CERTIFICATE_VERSION = 1
TOLD_APART = 3  # a re-rounded model must be outside the limits, or at least so many times as far as the exported one
MIN_POSITIONS = 300  # below, or without controls, nothing is proven: top-1 .94 needs more than a handful
NEGATIVE_CONTROL_BITS = 5  # above, a second rounding moves logits less than the runtime's own arithmetic does
HARD_TEXT = (
    "Numbers 3.14159, 2026 and 007; naïve café, Größe, 東京, 👩‍🚀!\n\tdef f(x):  return x**2  # tabs,   spaces\r\n"
)


@dataclass(frozen=True)
class Runtime:
    """How to run one exported model: every position's logits (or log-probabilities), per sequence."""

    name: str
    limits: Limits
    int8_activations: bool
    read: Callable[[Path], FusedCheckpoint]
    write: Callable[[FusedCheckpoint, Path], Path]
    write_exact: Callable[[FusedCheckpoint, Path], Path]
    logits: Callable[[Path, list[list[int]], Path, bool], tuple[str, list[np.ndarray]]]
    tokenize: Callable[[Path, str], list[int]] | None


def llamacpp(threads: int) -> Runtime:
    """llama.cpp, in this process."""
    from serve.llamacpp import LlamaCpp

    def logits(path: Path, sequences: list[list[int]], work: Path, exact: bool) -> tuple[str, list[np.ndarray]]:
        found = []
        with LlamaCpp(path, max(map(len, sequences)), threads, exact=exact) as model:
            for number, ids in enumerate(sequences):
                target = work / f"{path.stem}-{number}.npy"
                np.save(target, model.logits(ids))
                found.append(np.load(target, mmap_mode="r"))
            return model.build, found

    def tokenize(path: Path, text: str) -> list[int]:
        with LlamaCpp(path, 8, threads) as model:
            return model.tokenize(text, add_special=True)

    return Runtime(
        "llama.cpp",
        LLAMACPP,
        False,
        gguf.read,
        lambda checkpoint, folder: gguf.write(checkpoint, folder / "requantized.gguf"),
        lambda checkpoint, folder: gguf.write(checkpoint, folder / "f32.gguf", dequantized=True),
        logits,
        tokenize,
    )


def vllm(exported: Path, threads: int, python: str, dtype: str | None) -> Runtime:
    """vLLM for the format of `exported`, in a process of `python`'s environment."""
    from serve.launch import served_dtype
    from serve.vllm_logprobs import run

    dtype = dtype or served_dtype(exported)
    wire = FORMATS[detect(exported)]
    int8 = wire.read(exported).provenance.get("activations") == "int8"
    options = {"activations": "int8"} if int8 else {}

    def logits(path: Path, sequences: list[list[int]], work: Path, exact: bool) -> tuple[str, list[np.ndarray]]:
        folder = work / f"vllm-{path.name}"
        folder.mkdir(exist_ok=True)
        served = "float32" if exact else str(dtype)
        result = run(path, sequences, folder, python=python, dtype=served, threads=threads)
        rows = [result.logprobs_TV(i) for i in range(len(sequences))]
        return f"vLLM {result.version} ({result.device}, {result.dtype})", rows

    return Runtime(
        "vllm",
        VLLM_FLOAT16 if dtype == "float16" else VLLM_BFLOAT16,
        int8,
        wire.read,
        lambda checkpoint, folder: wire.write(checkpoint, folder / "requantized", **options),
        lambda checkpoint, folder: dense.write(checkpoint, folder / "dense"),
        logits,
        None,
    )


def runtime_for(exported: Path, name: str | None, *, threads: int, python: str, dtype: str | None) -> Runtime:
    """The runtime named, or the one that reads this format."""
    exported = Path(exported)
    native = "llama.cpp" if detect(exported) == "gguf" else "vllm"
    if name not in (None, native):
        raise LrqatError(f"{exported}: {name} does not read this format; use --runtime {native}")
    return llamacpp(threads) if native == "llama.cpp" else vllm(exported, threads, python, dtype)


def requantized(checkpoint: FusedCheckpoint) -> FusedCheckpoint:
    """The negative control: weights rounded a second time, by a rule that is not the one of training.

    Symmetric grids get the stock min-max rule of GPTQ and its kin, scale = max|w| / ((2^b - 1) / 2). Other lattices
    would be found again by their own min-max; they are fitted to a range that is one step wider, as that rule's is.
    """

    def make(name: str) -> FusedTensor:
        weight_OI, grid = checkpoint.tensors[name].dequantize(), checkpoint.specs[name].grid
        if isinstance(grid, AffineGrid) and grid.symmetric:
            groups_OGC = weight_OI.unflatten(1, (-1, grid.columns_per_group(weight_OI.shape[1], name)))
            parts = {"scales": grid.wire(groups_OGC.abs().amax(2) / ((grid.codes - 1) / 2))}
        else:
            wider = 2.0 if getattr(grid, "power_of_two", False) else grid.codes / (grid.codes - 1)
            parts = start(weight_OI * wider, grid, None, name)
        levels_OI = grid.nearest(to_latent(weight_OI, grid.affine(parts)))
        return FusedTensor.make(grid.encode(levels_OI), parts, grid)

    return replace(checkpoint, tensors=Lazy(checkpoint.specs, make))


def certify(
    fused: Path, exported: Path, runtime: Runtime, *, texts: list[str], count: int, length: int, controls: bool
) -> dict[str, Any]:
    """The certificate of one exported model.

    Args:
        fused: the fused checkpoint's directory.
        exported: what lrqat-export wrote.
        runtime: see `runtime_for`.
        texts: sources as `lrqat.data.blocks` takes them; empty for the default text.
        count: sequences to compare on.
        length: tokens of each.
        controls: run the positive and the negative control too.
    """
    checkpoint = FusedCheckpoint.load(fused)
    log(f"weights: comparing {exported} with {fused}")
    equal, total, differing = count_equal(as_stored(checkpoint, detect(exported)), runtime.read(exported))
    tokenizer = fused_tokenizer(checkpoint)
    sequences = blocks(texts, tokenizer, length, count).tolist()
    tokens_equal = (
        runtime.tokenize is None or runtime.tokenize(exported, HARD_TEXT) == tokenizer(HARD_TEXT)["input_ids"]
    )
    with tempfile.TemporaryDirectory(prefix="lrqat-parity-") as folder:
        work = Path(folder)
        log(f"reference: {len(sequences)} x {length} tokens through transformers, float32")
        reference = reference_logits(checkpoint, sequences, work, runtime.int8_activations)

        limits = runtime.limits
        if runtime.int8_activations:
            log("limits: the reference once more, disturbed by 1e-6")
            other = reference_logits(checkpoint, sequences, work, True, disturbance=1e-6)
            itself = Comparison()
            for number, ids in enumerate(sequences):
                itself.add(reference[number], other[number], ids)
            limits = disturbed(itself.figures())

        def measure(label: str, path: Path, limits: Limits, exact: bool) -> tuple[str, dict[str, Any]]:
            log(f"{label}: {path.name} through {runtime.name}")
            build, found = runtime.logits(path, sequences, work, exact)
            expected = reference
            if exact and runtime.int8_activations:  # dense weights meet activations that nobody rounded
                expected = reference_logits(checkpoint, sequences, work, False)
            comparison = Comparison()
            for number, ids in enumerate(sequences):
                comparison.add(expected[number], found[number], ids)
            figures = comparison.figures()
            if runtime.tokenize is None:
                figures["relative_l2"] = math.nan  # vLLM gives log-probabilities, which have another norm
                limits = replace(limits, relative_l2=math.inf)
            return build, {"figures": figures, "limits": asdict(limits), "passed": within(figures, limits)}

        build, logits = measure("logits", exported, limits, False)
        found_controls: dict[str, Any] = {}
        if controls:
            exact_path = runtime.write_exact(checkpoint, work)
            found_controls["positive"] = measure("positive control", exact_path, EXACT, True)[1]
            if min(spec.grid.bits for spec in checkpoint.specs.values()) <= NEGATIVE_CONTROL_BITS:
                wrong = runtime.write(requantized(checkpoint), work)
                negative = measure("negative control", wrong, limits, False)[1]
                negative["passed"] &= negative["figures"]["kl"] < TOLD_APART * logits["figures"]["kl"]
                found_controls["negative"] = negative
    passed = equal == total and not differing and tokens_equal and logits["passed"]
    if controls:
        passed &= found_controls["positive"]["passed"]
        passed &= "negative" not in found_controls or not found_controls["negative"]["passed"]
    proven = controls and logits["figures"]["positions"] >= MIN_POSITIONS
    return clean(
        {
            "format": "lrqat-certificate",
            "version": CERTIFICATE_VERSION,
            "verdict": "fail" if not passed else "pass" if proven else "unproven",
            "runtime": build,
            "weights": {"equal": equal, "total": total, "differing": differing},
            "token_ids_equal": tokens_equal if runtime.tokenize else None,
            "logits": logits,
            "controls": found_controls,
            "hashes": {
                "base": checkpoint.provenance.get("base_sha256"),
                "fused": file_hashes(Path(fused), "fused.json"),
                "exported": file_hashes(exported, "*.safetensors", "config.json"),
            },
            "settings": {"sequences": len(sequences), "tokens": length, "texts": texts or ["CPython documentation"]},
            "machine": {
                "platform": platform.platform(),
                "processor": processor(),
                "cpus": os.cpu_count(),
                "python": platform.python_version(),
                "torch": torch.__version__,
                "lrqat": lrqat.__version__,
            },
        }
    )


def reference_logits(
    checkpoint: FusedCheckpoint,
    sequences: list[list[int]],
    work: Path,
    int8_activations: bool,
    disturbance: float = 0.0,
) -> list[np.ndarray]:
    """Logits of the fake-quant model, mapped from files; with inputs rounded per token where the kernels do so."""
    model = fake_quant_model(checkpoint)
    if int8_activations:
        rounded = [name for name, spec in checkpoint.specs.items() if meets_int8(spec.grid)]
        round_inputs(model, [name.removesuffix(".weight") for name in rounded])
    if disturbance:
        generator = torch.Generator().manual_seed(0)

        def disturb(_module: object, _arguments: object, embedded: torch.Tensor) -> torch.Tensor:
            return embedded * (1 + disturbance * torch.randn(embedded.shape, generator=generator))

        model.get_input_embeddings().register_forward_hook(disturb)
    found = []
    with torch.no_grad():
        for number, ids in enumerate(sequences):
            target = work / f"reference-{int8_activations}-{disturbance}-{number}.npy"
            np.save(target, model(torch.tensor([ids]), use_cache=False).logits[0].numpy())
            found.append(np.load(target, mmap_mode="r"))
    return found


def file_hashes(path: Path, *patterns: str) -> dict[str, str]:
    """SHA-256 by file name, of a file or of a directory's files."""
    files = [path] if path.is_file() else sorted(file for pattern in patterns for file in path.rglob(pattern))
    return {file.name: sha256([file]) for file in files}


def processor() -> str:
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def clean(value: Any) -> Any:
    """JSON has no infinity or NaN: null."""
    if isinstance(value, dict):
        return {key: clean(item) for key, item in value.items()}
    if isinstance(value, list):
        return [clean(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def certificate_path(exported: Path) -> Path:
    """Beside a file, inside a directory."""
    return exported.with_suffix(".certificate.json") if exported.is_file() else exported / "certificate.json"


def judge(name: str, passed: bool) -> str:
    """A row's last column."""
    if name == "negative control":
        return "NOT told apart" if passed else "told apart, as it must be"
    return "within limits" if passed else "OUTSIDE limits"


def table(certificate: dict[str, Any]) -> str:
    """The certificate for a terminal."""
    weights = certificate["weights"]
    lines = [
        f"runtime   {certificate['runtime']}",
        f"weights   {weights['equal']} of {weights['total']} bitwise equal"
        + (f"; differing: {', '.join(weights['differing'][:3])}" if weights["differing"] else ""),
    ]
    if certificate["token_ids_equal"] is not None:
        lines.append(
            f"tokens    {'equal to' if certificate['token_ids_equal'] else 'DIFFERENT FROM'} the HF tokenizer's"
        )
    lines.append(f"{'':18}{'KL':>10} {'top-1':>7} {'ppl':>9} {'change':>8} {'|d logp|':>9}")
    rows = {"logits": certificate["logits"], **{f"{k} control": v for k, v in certificate["controls"].items()}}
    for name, row in rows.items():
        f = row["figures"]
        lines.append(
            f"{name:18}{f['kl']:10.2e} {f['top1']:7.4f} {f['perplexity']:9.4f} {f['perplexity_change']:+8.2%} "
            f"{f['logprob_difference_mean']:9.2e}  {judge(name, row['passed'])}"
        )
    lines.append(f"verdict   {certificate['verdict'].upper()}")
    return "\n".join(lines)
