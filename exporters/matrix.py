"""Which format and runtime takes which grid: asked before training, by shape, and answered with what to do instead.

A *target* is a format, a runtime, or both:

    gguf  gptq  awq  compressed-tensors                        the format stores it exactly
    llama.cpp  vllm-cpu  vllm-gpu                              some format does, and the runtime has a kernel for it
    gptq@vllm-cpu  awq@vllm-gpu  compressed-tensors@vllm-cpu   this format there
    w8a8@vllm-cpu  w8a8@vllm-gpu                               compressed-tensors with activations in int8 too

Exactness comes from what each exporter checks before it writes, kernels from `vllm_rules` and from the ggml type.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from exporters import vllm_rules
from exporters.formats import FORMATS
from exporters.gguf_carry import block_type
from exporters.refusal import Refusal
from lrqat.errors import LrqatError
from lrqat.fused import FusedCheckpoint, FusedSpec
from lrqat.grid import Grid

RUNTIMES = {
    "llama.cpp": ("gguf",),
    "vllm-cpu": ("gptq", "awq", "compressed-tensors", "w8a8"),
    "vllm-gpu": ("gptq", "awq", "compressed-tensors", "w8a8"),
}
PAIRS = tuple(f"{form}@{runtime}" for runtime, forms in RUNTIMES.items() for form in forms)
TARGETS = (*FORMATS, *RUNTIMES, *PAIRS)
# Asked in this order when the user leaves the grid to the targets: small and good first.
CANDIDATES = ("w4g32", "w4g64", "w4g128", "w4", "w4g32-asym", "w4g32-min", "w8", "w8g32", "w3", "w2g64")
GRIDS = (
    *("w4g32", "w4g64", "w4g128", "w4", "w4g32-asym", "w4-asym", "w4g32-min", "w3g64", "w3", "w2g64", "w2"),
    *("w5g32", "w5g32-min", "w6g32", "w8g32", "w8", "iq4_nl", "mxfp4", "tq2_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k"),
)
SHAPE = (4096, 4096)  # of the matrix that is printed for no model in particular


@dataclass(frozen=True)
class Answer:
    """What a target makes of a model.

    Attributes:
        target: one of TARGETS.
        runs: the kernels or ggml types that take its weights, if all are taken.
        refusal: the first weight that is not, and what to do instead.
    """

    target: str
    runs: str
    refusal: Refusal | None


def answer(checkpoint: FusedCheckpoint, target: str, tensor_parallel: int = 1) -> Answer:
    """What one target makes of a checkpoint, of which nothing but names, shapes and grids is read."""
    if target in FORMATS:
        refusal = _stored(checkpoint, target)
        return Answer(target, "" if refusal else _types(checkpoint) if target == "gguf" else "stored", refusal)
    if target in RUNTIMES:
        answers = [answer(checkpoint, f"{form}@{target}", tensor_parallel) for form in RUNTIMES[target]]
        taken = [a for a in answers if a.refusal is None]
        if taken:
            return Answer(target, ", ".join(f"{a.target.partition('@')[0]} ({a.runs})" for a in taken), None)
        return Answer(target, "", answers[0].refusal)
    if target not in PAIRS:
        raise LrqatError(f"--for {target}: expected some of {', '.join(TARGETS)}")
    form, _, runtime = target.partition("@")
    activations = "int8" if form == "w8a8" else None
    layout = "compressed-tensors" if form == "w8a8" else form
    if (stored := _stored(checkpoint, layout, activations)) is not None:
        return Answer(target, "", stored)
    if runtime == "llama.cpp":
        return Answer(target, _types(checkpoint), None)
    found = vllm_rules.kernels(layout, checkpoint, runtime.removeprefix("vllm-"), tensor_parallel, activations)
    return Answer(target, "", found) if isinstance(found, Refusal) else Answer(target, "+".join(found), None)


def answers(checkpoint: FusedCheckpoint, tensor_parallel: int = 1) -> list[Answer]:
    """What each pair of format and runtime makes of a checkpoint."""
    return [answer(checkpoint, target, tensor_parallel) for target in PAIRS]


def one_weight(grid: Grid, shape: tuple[int, int] = SHAPE) -> FusedCheckpoint:
    """A checkpoint of a single linear that no runtime fuses, to ask about a grid and a shape."""
    return FusedCheckpoint({}, {}, {"linear.weight": FusedSpec(grid, shape)}, {}, {}, {})


def require(checkpoint: FusedCheckpoint, targets: Sequence[str], tensor_parallel: int = 1) -> list[Answer]:
    """The answers of all targets.

    Raises:
        LrqatError: one of them cannot take the checkpoint; names those of the other formats that can.
    """
    found = [answer(checkpoint, target, tensor_parallel) for target in targets]
    for each in found:
        if each.refusal:
            able = [a.target for a in answers(checkpoint, tensor_parallel) if a.refusal is None]
            others = f"; this grid goes to {', '.join(able)}" if able else ""
            raise LrqatError(f"{each.target}: {each.refusal}{others}")
    return found


def pick(
    on: Callable[[Grid], FusedCheckpoint], targets: Sequence[str], tensor_parallel: int = 1
) -> tuple[Grid, list[Answer]]:
    """The first grid of CANDIDATES that all targets take, for the model that `on` puts on a grid."""
    last: LrqatError | None = None
    for text in CANDIDATES:
        grid = Grid.parse(text)
        try:
            return grid, require(on(grid), targets, tensor_parallel)
        except LrqatError as error:
            last = last or error
    raise LrqatError(f"no common grid for {', '.join(targets)}: {last}")


def table(tensor_parallel: int = 1, grids: Sequence[str] = GRIDS) -> list[dict[str, str]]:
    """The matrix for a linear of SHAPE: one row a grid, with what runs it, or a dash."""
    rows = []
    for text in grids:
        grid = Grid.parse(text)
        row = {"grid": text, "bits": f"{grid.bits_per_weight(*SHAPE):.3g}"}
        for each in answers(one_weight(grid), tensor_parallel):
            row[each.target] = "-" if each.refusal else each.runs
        rows.append(row)
    return rows


def _stored(checkpoint: FusedCheckpoint, form: str, activations: str | None = None) -> Refusal | None:
    """What the exporter itself checks before it writes; of a single weight, what it can hold."""
    try:
        if checkpoint.hf_config or form != "gguf":
            FORMATS[form].check(checkpoint, **({"activations": activations} if activations else {}))
        else:
            for name, spec in checkpoint.specs.items():
                block_type(spec.grid, spec.shape, name)
    except LrqatError as error:
        reason, _, remedy = str(error).partition("; ")
        return Refusal(reason, remedy or "use another grid for it")
    return None


def _types(checkpoint: FusedCheckpoint) -> str:
    return "+".join(sorted({block_type(spec.grid, spec.shape, name).name for name, spec in checkpoint.specs.items()}))
