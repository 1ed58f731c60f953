"""GGUF for other architectures: a llama.cpp checkout of the user's own names the tensors, lrqat packs the integers.

llama.cpp's converter has a class for each architecture, whose `modify_tensors` renames, permutes, splits and stacks
float weights. Quantized weights are not passed through it. It gets tags in their place, one for each position:

    tag[row, column] = row * 2^20 + column          rows counted through all weights of the model

Where the tags come out tells which rows of which weight a GGUF tensor holds. Rows that stay whole are then taken from
codes and parts and packed as in `exporters/gguf.py`: no quantized value is ever a float. What does not keep rows whole
(a transposed weight, a changed value) is refused. All other tensors pass through as they are and are stored in F32.
The tokenizer is ours where exporters/gguf_tokenizer.py knows it, else llama.cpp's.

The checkout's Python is run, in a process of its own: only ever the one that the user names.

Source: ggml-org/llama.cpp conversion/__init__.py (get_model_class) and conversion/base.py (ModelBase), since 2026.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exporters.gguf import QUANTIZED_BY, checked_name, put
from exporters.gguf_blocks import BlockType, pack
from exporters.gguf_carry import block_type, restate
from exporters.gguf_tokenizer import tokenizer_fields
from lrqat.errors import LrqatError
from lrqat.fused import FusedCheckpoint, FusedTensor

ROW = 1 << 20  # a row's tags are this far apart: more than any weight has columns


def write(checkpoint: FusedCheckpoint, out: Path, llama_cpp: Path) -> Path:
    """Write `out` with the model classes of a llama.cpp checkout; it appears under its name only when complete.

    Args:
        checkpoint: what training handed over.
        out: path of the file, ending in .gguf.
        llama_cpp: the checkout.
    """
    out, llama_cpp = checked_name(out), Path(llama_cpp).resolve()
    for part in ("conversion/__init__.py", "gguf-py/gguf/__init__.py"):
        if not (llama_cpp / part).is_file():
            raise LrqatError(f"{llama_cpp}: no {part}; name a checkout of llama.cpp of 2026 or later")
    for name, spec in checkpoint.specs.items():
        block_type(spec.grid, spec.shape, name)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
            fused, unfinished = checkpoint.save(Path(folder) / "fused"), Path(folder) / out.name
            command = [sys.executable, "-m", "exporters.gguf_foreign", str(fused), str(unfinished), str(llama_cpp)]
            root = Path(__file__).resolve().parents[1]
            environment = {
                **os.environ,
                "PYTHONPATH": os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")])),
            }
            child = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
            if child.returncode:
                last = (child.stderr.strip().splitlines() or ["no message"])[-1]
                raise LrqatError(f"{llama_cpp}: its converter stopped: {last}; export with --format gptq")
            put(unfinished, out)
    except OSError as error:
        raise LrqatError(f"{out}: cannot be written ({error}); free some space or choose another --out") from None
    return out


def passing(base: Any, checkpoint: FusedCheckpoint) -> Any:
    """A subclass of one of llama.cpp's model classes that keeps quantized weights as they are."""

    class Passing(base):
        model_arch = base.model_arch

        def index_tensors(self, remote_hf_model_id: str | None = None) -> dict[str, Callable[[], Tensor]]:
            self.sources: dict[str, tuple[str, int]] = {}  # their name -> ours, and the number of its first row
            self.tags: dict[str, Tensor] = {}
            tensors: dict[str, Callable[[], Tensor]] = {}
            first = 0
            for name in (*checkpoint.specs, *checkpoint.dense_specs):
                quantized = name in checkpoint.specs
                make = partial(torch.empty, 0) if quantized else partial(checkpoint.dense.__getitem__, name)
                if (kept := self.filter_tensors((name, make))) is None:
                    continue
                tensors[kept[0]] = kept[1]
                if quantized:
                    self.sources[kept[0]] = (name, first)
                    first += checkpoint.specs[name].shape[0]
            return tensors

        def modify_tensors(self, data_torch: Tensor, name: str, bid: int | None) -> Iterable[tuple[str, Tensor]]:
            if name not in self.sources:
                yield from super().modify_tensors(data_torch, name, bid)
                return
            source, first = self.sources[name]
            rows, columns = checkpoint.specs[source].shape
            tags_OI = torch.arange(first, first + rows)[:, None] * ROW + torch.arange(columns)
            self.tags.update(super().modify_tensors(tags_OI, name, bid))

        def prepare_tensors(self) -> None:
            super().prepare_tensors()
            import gguf

            starts = sorted((first, source) for source, first in self.sources.values())
            weights: dict[int, int] = {}
            for name, tags in self.tags.items():
                packed, kind = _packed(checkpoint, starts, name, tags)
                self.gguf_writer.add_tensor(name, packed.numpy(), raw_dtype=gguf.GGMLQuantizationType(kind.ggml_type))
                weights[kind.file_type] = weights.get(kind.file_type, 0) + packed.numel()
            if weights:
                self.mostly = gguf.LlamaFileType(max(weights, key=lambda kind: weights[kind]))

        def prepare_metadata(self, vocab_only: bool) -> None:
            self.ftype: Any = getattr(self, "mostly", self.ftype)
            super().prepare_metadata(vocab_only)
            self.gguf_writer.add_string(QUANTIZED_BY, "lrqat")

        def set_vocab(self) -> None:
            tensors = {name: info for part in self.gguf_writer.tensors for name, info in part.items()}
            size = tensors["token_embd.weight"].shape[0]  # Gemma's class drops rows that no token has
            try:
                tokenizer_fields(checkpoint.assets, {**checkpoint.hf_config, "vocab_size": size}).add_to(
                    self.gguf_writer
                )
            except LrqatError:
                super().set_vocab()

    return Passing


def _packed(
    checkpoint: FusedCheckpoint, starts: list[tuple[int, str]], name: str, tags: Tensor
) -> tuple[Tensor, BlockType]:
    """Bytes of one GGUF tensor, uint8 [..., bytes of a row], and their type."""
    rows = tags[..., 0] // ROW
    if tags.dtype != torch.int64 or not torch.equal(tags, rows[..., None] * ROW + torch.arange(tags.shape[-1])):
        raise LrqatError(f"{name}: llama.cpp does not keep the rows of its weight whole")
    firsts = torch.tensor([first for first, _ in starts])
    owners = torch.searchsorted(firsts, rows.flatten(), right=True) - 1
    pieces: list[Tensor] = []
    kinds: list[BlockType] = []
    for owner, run in zip(*torch.unique_consecutive(owners, return_counts=True), strict=True):
        at = sum(piece.shape[0] for piece in pieces)
        first, source = starts[int(owner)]
        fused, chosen = checkpoint.tensors[source], rows.flatten()[at : at + int(run)] - first
        fused.check(source)
        if tags.shape[-1] != fused.codes_OI.shape[1]:
            raise LrqatError(f"{name}: llama.cpp does not keep the rows of {source} whole")
        parts = {part: values[chosen] for part, values in fused.parts.items()}
        kinds.append(block_type(fused.grid, checkpoint.specs[source].shape, source))
        pieces.append(pack(restate(FusedTensor(fused.codes_OI[chosen], parts, fused.grid), kinds[-1]), kinds[-1]))
    if any(kind is not kinds[0] for kind in kinds):
        raise LrqatError(f"{name}: GGUF stores its weights in one type; use one grid for all of them")
    return torch.cat(pieces).view(*rows.shape, -1), kinds[0]


def main(fused: str, out: str, llama_cpp: str) -> None:
    """The child: runs the checkout's code."""
    sys.path[:0] = [str(Path(llama_cpp) / "gguf-py"), llama_cpp]
    import conversion  # type: ignore[import-not-found]
    import gguf

    checkpoint = FusedCheckpoint.load(Path(fused))
    names = json.loads((Path(fused) / "config.json").read_text())["architectures"]
    model = passing(conversion.get_model_class(names[0]), checkpoint)
    stem = Path(out).stem
    model(Path(fused), gguf.LlamaFileType.ALL_F32, Path(out), eager=True, use_temp_file=True, model_name=stem).write()


if __name__ == "__main__":
    main(*sys.argv[1:])
