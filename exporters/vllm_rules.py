"""Which kernel of vLLM takes a linear, and why none does: the rules of vLLM 0.32.0 as pure functions.

A linear is asked about as vLLM sees it: q, k, v and gate, up fused (`SHARDS`), and cut for tensor parallelism. K is
in_features, N out_features of what one rank holds; "row-parallel" linears (`ROW_PARALLEL`) are cut along K, all others
along N. Sources, in vllm/model_executor:

    layers/quantization/auto_gptq.py        TYPE_MAP; verify_marlin_supported on every platform
    layers/quantization/auto_awq.py         TYPE_MAP; awq_triton.py AWQ_TRITON_SUPPORTED_GROUP_SIZES
    layers/quantization/compressed_tensors/schemes/compressed_tensors_wNa16.py, ..._w8a8_int8.py, compressed_tensors.py
                                            (_is_dynamic_token_w8a8: symmetric weights, channel strategy)
    layers/quantization/utils/marlin_utils.py   MARLIN_SUPPORTED_GROUP_SIZES, _query_cpu_marlin_supported_quant_types
    kernels/linear/mixed_precision/*.py     `can_implement` of each kernel in KERNELS
    kernels/linear/scaled_mm/cpu.py         CPUInt8ScaledMM: any shape
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from exporters.refusal import Refusal
from lrqat.fused import FusedCheckpoint
from lrqat.grid import Grid
from lrqat.grids.affine import AffineGrid

LAYOUTS = ("gptq", "awq", "compressed-tensors")
DEVICES = ("cpu", "gpu")
SHARDS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
ROW_PARALLEL = ("o_proj", "down_proj", "out_proj", "c_proj", "dense", "dense_4h_to_h", "fc2", "w2")
MARLIN_GROUPS = (-1, 32, 64, 128)
WORD_BITS = 32
NO_FLOAT16 = ("gemma2", "gemma3", "gemma3_text", "plamo2", "glm4")  # config/model.py _FLOAT16_NOT_SUPPORTED_MODELS
MIXTURE = "mixture of experts (its kernels not checked)"

_EXPERT = re.compile(r"^(.*\.experts)\.\d+\.")


@dataclass(frozen=True)
class Kernel:
    """What one kernel takes.

    Attributes:
        name: vLLM's class, without LinearKernel.
        symmetric: widths without zeros.
        asymmetric: widths with zeros.
        groups: group sizes; None: any even one that divides K.
        k: K is a multiple of it.
        n: N is a multiple of it.
        needs: what it needs beside an ordinary machine of its kind.
    """

    name: str
    symmetric: tuple[int, ...]
    asymmetric: tuple[int, ...]
    groups: tuple[int, ...] | None = None
    k: int = 1
    n: int = 1
    needs: str = ""

    def against(self, grid: AffineGrid, rows: int, columns: int) -> str | None:
        """Why it does not take this linear, or None."""
        widths = self.symmetric if grid.symmetric else self.asymmetric
        if grid.bits not in widths:
            kind = "symmetric" if grid.symmetric else "asymmetric"
            return f"takes no {grid.bits}-bit {kind} weights"
        if self.groups is not None and grid.group_size not in self.groups:
            return f"takes groups of {', '.join(map(str, self.groups[1:]))} or a whole row"
        if grid.group_size != -1 and grid.group_size % 2:
            return "takes even groups"
        if columns % self.k:
            return f"takes in_features that are a multiple of {self.k}, not {columns}"
        if rows % self.n:
            return f"takes (fused) out_features that are a multiple of {self.n}, not {rows}"
        return None


# In the order in which they are asked; those that need something special come last.
KERNELS = {
    "cpu": (Kernel("CPUWNA16", (4,), (4,), None, 32, 32),),
    "gpu": (
        Kernel("Marlin", (4, 8), (4,), MARLIN_GROUPS),
        Kernel("TritonW4A16", (4,), (4,), (*MARLIN_GROUPS, 256), 1, 8),
        Kernel("Machete", (4, 8), (4, 8), (-1, 64, 128), 64, 128, "compute capability 9.0"),
        Kernel("Humming", tuple(range(2, 9)), tuple(range(2, 9)), None, 1, 1, "the humming package"),
    ),
}
INT8_KERNELS = {"cpu": Kernel("CPUInt8ScaledMM", (8,), ()), "gpu": Kernel("CutlassInt8ScaledMM", (8,), ())}


def kernel(
    layout: str,
    grid: Grid,
    shape: tuple[int, int],
    device: str = "cpu",
    *,
    activations: str | None = None,
    name: str = "weight",
) -> Kernel | Refusal:
    """The kernel that runs this grid from this layout, or why none does.

    Args:
        layout: one of LAYOUTS, which can store the grid.
        grid: the weight's grid.
        shape: [N, K], fused and per rank.
        device: one of DEVICES.
        activations: "int8" (compressed-tensors only) or None.
        name: named in the refusal.
    """
    rows, columns = shape
    if not isinstance(grid, AffineGrid) or grid.zero == "minimum":
        return Refusal(f"{name}: vLLM has no kernel for grid {grid}", "use --grid w4g32, or serve it with llama.cpp")
    if activations == "int8":
        if grid.symmetric and grid.bits == 8 and grid.group_size == -1:
            return INT8_KERNELS[device]
        return Refusal(
            f"{name}: int8 activations need symmetric 8-bit weights per channel, not {grid}", "use --grid w8"
        )
    if refusal := _loader(layout, grid, device, name):
        return refusal
    if layout == "awq" and device == "gpu" and grid.group_size not in MARLIN_GROUPS:
        if grid.group_size == columns:
            return Kernel("AWQ", (4,), (4,))
        return Refusal(
            f"{name}: vLLM's AWQ takes groups of 32, 64, 128 or a whole row on GPUs", "use --grid w4g32-asym"
        )
    # AWQ stores zeros whatever the grid.
    asked = AffineGrid(grid.bits, grid.group_size, "integer" if layout == "awq" else grid.zero)
    reasons = []
    for candidate in KERNELS[device]:
        if (reason := candidate.against(asked, rows, columns)) is None:
            return candidate
        reasons.append(f"{candidate.name} {reason}")
    if device == "cpu" and grid.bits != 4:
        return Refusal(f"{name}: vLLM runs {grid.bits}-bit weights on GPUs only", "serve it there, or use --grid w4g32")
    return Refusal(f"{name}: no kernel of vLLM takes {grid} here: {'; '.join(reasons)}", "keep it dense (--skip)")


def _loader(layout: str, grid: AffineGrid, device: str, name: str) -> Refusal | None:
    """What a layout's loader refuses before any kernel is asked."""
    if layout == "gptq":
        if not grid.symmetric:
            return Refusal(f"{name}: vLLM loads symmetric GPTQ only, not {grid}", "export it as compressed-tensors")
        if grid.bits not in (4, 8):
            return Refusal(f"{name}: vLLM loads GPTQ with 4 or 8 bits, not {grid.bits}", "use --grid w4g32")
        if grid.group_size not in MARLIN_GROUPS:
            return Refusal(f"{name}: vLLM's GPTQ takes groups of 32, 64, 128 or a whole row", "use --grid w4g32")
    if layout == "awq" and grid.bits != 4:
        return Refusal(f"{name}: vLLM loads AWQ with 4 bits, not {grid.bits}", "use --grid w4g32")
    return None


def family(name: str) -> tuple[str, list[str]]:
    """(the layer that vLLM loads this weight into, the weights that it is fused of)."""
    parent, _, leaf = name.removesuffix(".weight").rpartition(".")
    for fused, leaves in SHARDS.items():
        if leaf in leaves:
            return f"{parent}.{fused}", [f"{parent}.{member}.weight" for member in leaves]
    return name.removesuffix(".weight"), [name]


def experts(name: str) -> str | None:
    """The layer into which vLLM loads this weight with all other experts' (`...mlp.experts`), or None."""
    match = _EXPERT.match(name)
    return match[1] if match else None


def with_fused(layers: Sequence[str]) -> list[str]:
    """Layers, and the fused layers of which all shards are among them: vLLM matches patterns against those."""
    found = dict.fromkeys(layers)
    for layer in layers:
        if together := experts(layer):
            found[together] = None
        fused, members = family(f"{layer}.weight")
        if all(member.removesuffix(".weight") in found for member in members):
            found[fused] = None
    return list(found)


def limits(
    layout: str,
    checkpoint: FusedCheckpoint,
    device: str = "cpu",
    tensor_parallel: int = 1,
    activations: str | None = None,
) -> Refusal | None:
    """Why vLLM would not serve this checkpoint from this layout, or None: the first weight that stands in the way."""
    found = kernels(layout, checkpoint, device, tensor_parallel, activations)
    return found if isinstance(found, Refusal) else None


def kernels(
    layout: str,
    checkpoint: FusedCheckpoint,
    device: str = "cpu",
    tensor_parallel: int = 1,
    activations: str | None = None,
) -> Refusal | list[str]:
    """What runs a checkpoint from this layout, or the first weight that stands in the way.

    With int8 activations only 8-bit weights meet them; all others stay weight-only.
    """
    model, specs = checkpoint.hf_config.get("model_type"), checkpoint.specs
    taken: dict[str, None] = {}
    for name, spec in specs.items():
        if model in NO_FLOAT16 and getattr(spec.grid, "scale_precision", "") == "fp16" and activations is None:
            remedy = "train on a grid without -fp16"
            return Refusal(
                f"{name}: vLLM does not serve {model} in float16, which the scales of {spec.grid} need", remedy
            )
        if together := experts(name):
            if refusal := _one_scheme(layout, checkpoint, together):
                return refusal
            taken[MIXTURE] = None
            continue
        layer, members = family(name)
        shards = [member for member in members if member in specs]
        leaves = ", ".join(member.split(".")[-2] for member in members)
        if any(member in checkpoint.dense_specs for member in members):
            return Refusal(
                f"{name}: vLLM fuses {leaves}, but some of them are dense", "quantize or --skip them together"
            )
        if len({_scheme(layout, specs[shard].grid) for shard in shards}) > 1:
            return Refusal(f"{name}: vLLM fuses {leaves}, but they are on different grids", "put them on one grid")
        zeros = layout == "compressed-tensors" and getattr(spec.grid, "zero", "") == "integer" and len(shards) > 1
        if zeros and any(specs[shard].shape[0] * spec.grid.bits % WORD_BITS for shard in shards):
            return Refusal(f"{name}: vLLM fuses {leaves}, whose zeros do not fill whole words each", "--skip them")
        cut = _cut(name, [specs[shard].shape for shard in shards], spec.grid, layer, tensor_parallel)
        if isinstance(cut, Refusal):
            return cut
        met = activations if spec.grid.bits == 8 else None
        if isinstance(found := kernel(layout, spec.grid, cut, device, activations=met, name=name), Refusal):
            return found
        taken[f"{found.name} (needs {found.needs})" if found.needs else found.name] = None
    return sorted(taken)


def _one_scheme(layout: str, checkpoint: FusedCheckpoint, together: str) -> Refusal | None:
    """All experts of a layer are one layer for vLLM, of which it looks at the first."""
    schemes = {_scheme(layout, s.grid) for n, s in checkpoint.specs.items() if n.startswith(f"{together}.")}
    if len(schemes) > 1 or any(name.startswith(f"{together}.") for name in checkpoint.dense_specs):
        return Refusal(
            f"{together}: vLLM loads all experts as one layer, but they are on different grids, or some are dense",
            "put them on one grid, or --skip all",
        )
    return None


def _scheme(layout: str, grid: Grid) -> tuple[object, ...]:
    """What shards of a fused linear must have in common; AWQ stores zeros for all."""
    return grid.bits, getattr(grid, "group_size", grid), layout == "awq" or getattr(grid, "zero", None)


def _cut(name: str, shapes: list[tuple[int, int]], grid: Grid, layer: str, ranks: int) -> tuple[int, int] | Refusal:
    """[N, K] of one rank."""
    rows, columns = sum(shape[0] for shape in shapes), shapes[0][1]
    if ranks == 1:
        return rows, columns
    remedy = "use fewer ranks"
    if layer.rpartition(".")[2] in ROW_PARALLEL:
        group = getattr(grid, "group_size", -1)
        if columns % ranks or columns // ranks * grid.bits % WORD_BITS or (group > 0 and columns // ranks % group):
            return Refusal(f"{name}: {ranks} ranks cut in_features {columns} inside a group or a word", remedy)
        return rows, columns // ranks
    if any(shape[0] % ranks or shape[0] // ranks * grid.bits % WORD_BITS for shape in shapes):
        return Refusal(f"{name}: {ranks} ranks cut out_features {rows} inside a word", remedy)
    return rows // ranks, columns
