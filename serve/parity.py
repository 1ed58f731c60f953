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
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from exporters import dense, gguf
from exporters.compressed_tensors import meets_int8
from exporters.formats import FORMATS, as_stored, detect
from exporters.hf_directory import EMBEDDINGS, HEAD
from exporters.verify import count_equal
from lrqat.activations import round_inputs
from lrqat.console import log
from lrqat.data import blocks
from lrqat.errors import LrqatError
from lrqat.fused import FusedCheckpoint, FusedTensor, Lazy, read_assets
from lrqat.grid import to_latent
from lrqat.grids.affine import AffineGrid
from lrqat.models import fake_quant_model, fused_tokenizer
from lrqat.ranges import start
from lrqat.rounding import Rounding
from serve import certificate as certificates
from serve.certificate import clean
from serve.compare import EXACT, LLAMACPP, VLLM_BFLOAT16, VLLM_FLOAT16, Comparison, Limits, disturbed, within

TOLD_APART = 3  # a re-rounded model must be outside the limits, or at least so many times as far as the exported one
MIN_POSITIONS = 300  # below, or without controls, nothing is proven: top-1 .94 needs more than a handful
RE_ROUNDED_BITS = 5  # above, a second rounding moves logits less than the runtime's own arithmetic does
COARSE_BITS = 4
INT8_SCHEME = "CompressedTensorsW8A8Int8"  # vLLM's, on its int8 kernels
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
    tokenizes_like: Callable[[Path, Any], bool] | None  # None: it takes the tokenizer's own files


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

    def tokenizes_like(path: Path, tokenizer: Any) -> bool:
        """HARD_TEXT has the same ids; so has the end of a text, where there is one; chats have the same template."""
        template = tokenizer.chat_template
        template = template.get("default") if isinstance(template, dict) else template
        with LlamaCpp(path, 8, threads) as model:
            return (
                model.tokenize(HARD_TEXT, add_special=True) == tokenizer(HARD_TEXT)["input_ids"]
                and tokenizer.eos_token_id in (model.eos, None)
                and template == model.chat_template
            )

    return Runtime(
        "llama.cpp",
        LLAMACPP,
        False,
        gguf.read,
        lambda checkpoint, folder: gguf.write(checkpoint, folder / "requantized.gguf"),
        lambda checkpoint, folder: gguf.write(checkpoint, folder / "f32.gguf", dequantized=True),
        logits,
        tokenizes_like,
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
        schemes = ", ".join(result.schemes)
        if int8 and not exact and INT8_SCHEME not in result.schemes:  # near in figures, but other arithmetic
            raise LrqatError(f"{path}: vLLM serves it by {schemes}, expected {INT8_SCHEME}, which rounds activations")
        rows = [result.logprobs_TV(i) for i in range(len(sequences))]
        return f"vLLM {result.version} ({result.device}, {result.dtype}; {schemes})", rows

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
    Of more than RE_ROUNDED_BITS bits only COARSE_BITS are kept: levels are rounded to multiples.
    """

    def make(name: str) -> FusedTensor:
        fused, grid = checkpoint.tensors[name], checkpoint.specs[name].grid
        if grid.bits > RE_ROUNDED_BITS:
            step = 2.0 ** (grid.bits - COARSE_BITS)
            coarse_OI = grid.nearest((grid.decode(fused.codes_OI) / step).round_() * step)
            return replace(fused, codes_OI=grid.encode(coarse_OI))
        weight_OI = fused.dequantize()
        if isinstance(grid, AffineGrid) and grid.symmetric:
            groups_OGC = weight_OI.unflatten(1, (-1, grid.columns_per_group(weight_OI.shape[1], name)))
            parts = {"scales": grid.wire(groups_OGC.abs().amax(2) / ((grid.codes - 1) / 2))}
        else:
            wider = 2.0 if getattr(grid, "power_of_two", False) else grid.codes / (grid.codes - 1)
            parts = start(weight_OI * wider, grid, None, name)
        levels_OI = grid.nearest(to_latent(weight_OI, grid.affine(parts)))
        return FusedTensor.make(grid.encode(levels_OI), parts, grid)

    return replace(checkpoint, tensors=Lazy(checkpoint.specs, make))


def check_rounding(checkpoint: FusedCheckpoint, runtime: Runtime, as_served: bool) -> dict[str, str]:
    """What training and what the runtime rounds beside the weights, for the certificate.

    int8 activations that an exporter was told to add are the user's choice and stay in the reference.

    Raises:
        LrqatError: the runtime does not round what training did, and nobody said that this is meant.
    """
    trained, served = Rounding.trained(checkpoint.provenance), Rounding("int8" if runtime.int8_activations else None)
    others = (HEAD, *EMBEDDINGS)  # nobody rounds what flows into them
    linear = [spec.grid for name, spec in checkpoint.specs.items() if not any(part in name for part in others)]
    whole = trained.activations != "int8" or all(meets_int8(grid) for grid in linear)
    if trained and not (trained == served and whole) and not as_served:
        found = str(served) if trained != served else "int8 only where weights are on grid w8"
        raise LrqatError(
            f"{runtime.name}: the run was trained with {trained}, and this export is served with {found}: it is not "
            "the model that was trained; --as-served compares with the trained weights as they are served"
        )
    return {"trained": str(trained), "served": str(served)}


def certify(
    fused: Path,
    exported: Path,
    runtime: Runtime,
    *,
    texts: list[str],
    count: int,
    length: int,
    controls: bool,
    as_served: bool = False,
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
        as_served: the runtime need not round activations, keys and values as training did.
    """
    checkpoint = FusedCheckpoint.load(fused)
    rounding = check_rounding(checkpoint, runtime, as_served)
    log(f"weights: comparing {exported} with {fused}")
    equal, total, differing = count_equal(as_stored(checkpoint, detect(exported)), runtime.read(exported))
    tokenizer = fused_tokenizer(checkpoint)
    sequences = blocks(texts, tokenizer, length, count).tolist()
    if runtime.tokenizes_like:
        tokens_equal = runtime.tokenizes_like(exported, tokenizer)
    else:
        tokens_equal = tokenizer_files(read_assets(exported)) == tokenizer_files(checkpoint.assets)
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
            if runtime.tokenizes_like is None:
                figures["relative_l2"] = math.nan  # vLLM gives log-probabilities, which have another norm
                limits = replace(limits, relative_l2=math.inf)
            return build, {"figures": figures, "limits": asdict(limits), "passed": within(figures, limits)}

        build, logits = measure("logits", exported, limits, False)
        found_controls: dict[str, Any] = {}
        if controls:
            exact_path = runtime.write_exact(checkpoint, work)
            found_controls["positive"] = measure("positive control", exact_path, EXACT, True)[1]
            negative = measure("negative control", runtime.write(requantized(checkpoint), work), limits, False)[1]
            negative["passed"] &= negative["figures"]["kl"] < TOLD_APART * logits["figures"]["kl"]
            found_controls["negative"] = negative
    passed = equal == total and not differing and tokens_equal and logits["passed"]
    if controls:
        passed &= found_controls["positive"]["passed"] and not found_controls["negative"]["passed"]
    proven = controls and logits["figures"]["positions"] >= MIN_POSITIONS
    return clean(
        {
            "format": certificates.FORMAT,
            "version": certificates.VERSION,
            "verdict": "fail" if not passed else "pass" if proven else "unproven",
            "runtime": build,
            "weights": {"equal": equal, "total": total, "differing": differing},
            "token_ids_equal": tokens_equal,
            "rounding": rounding,
            "logits": logits,
            "controls": found_controls,
            "hashes": hashes(checkpoint, fused, exported),
            "settings": {"sequences": len(sequences), "tokens": length, "texts": texts or ["CPython documentation"]},
            "machine": certificates.machine(),
        }
    )


def tokenizer_files(assets: Mapping[str, bytes]) -> dict[str, bytes]:
    """A model's files that ids and chats depend on; how it is sampled is its user's business."""
    return {name: content for name, content in assets.items() if name != "generation_config.json"}


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


def hashes(checkpoint: FusedCheckpoint, fused: Path, exported: Path) -> dict[str, Any]:
    """What the certificate is about."""
    return {
        "base": checkpoint.provenance.get("base_sha256"),
        "fused": certificates.file_hashes(certificates.fused_directory(Path(fused))),
        "exported": certificates.file_hashes(Path(exported)),
    }


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
    if (rounding := certificate["rounding"])["trained"] != rounding["served"]:
        lines.append(f"rounding  trained with {rounding['trained']}; served with {rounding['served']}")
    lines.append(f"tokens    {'equal to' if certificate['token_ids_equal'] else 'DIFFERENT FROM'} the HF tokenizer's")
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
