"""What the tests of the safetensors formats share: small checkpoints, and every way in which a directory can lie."""

import copy
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lrqat.errors import LrqatError
from lrqat.fused import FusedCheckpoint, FusedSpec, FusedTensor, Spec
from lrqat.grid import Grid

LAYER = "model.layers.0.mlp.up_proj"
NORM = "model.norm.weight"


def fused(grid: Grid | str, rows: int, columns: int, seed: int = 0) -> FusedTensor:
    grid = Grid.parse(grid) if isinstance(grid, str) else grid
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, grid.codes, (rows, columns), dtype=torch.uint8, generator=generator)
    parts = {}
    for name, part in grid.parts(rows, columns).items():
        if part.dtype == torch.uint8:
            parts[name] = torch.randint(0, grid.codes, part.shape, dtype=torch.uint8, generator=generator)
        else:
            parts[name] = torch.randn(part.shape, generator=generator).bfloat16().half()
    return FusedTensor(codes, parts, grid)


def checkpoint(
    tensors: dict[str, FusedTensor], dense: dict[str, Tensor] | None = None, **config: object
) -> FusedCheckpoint:
    dense = dense or {}
    return FusedCheckpoint(
        tensors,
        dense,
        {name: FusedSpec(t.grid, (t.codes_OI.shape[0], t.codes_OI.shape[1])) for name, t in tensors.items()},
        {name: Spec(t.dtype, tuple(t.shape)) for name, t in dense.items()},
        {"architectures": ["LlamaForCausalLM"], "dtype": "float32", **config},
        {"tokenizer.json": b"{}"},
    )


def one(grid: str = "w4g32", rows: int = 32, columns: int = 64) -> FusedCheckpoint:
    return checkpoint({f"{LAYER}.weight": fused(grid, rows, columns)}, {NORM: torch.arange(64).half()})


def quantization_config(directory: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((directory / "config.json").read_text())["quantization_config"]
    return config


def stored(directory: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = load_file(directory / "model.safetensors")
    return tensors


def same_tensors(found: FusedCheckpoint, expected: FusedCheckpoint) -> bool:
    """All of it, bit by bit."""
    return (
        found.tensors.keys() == expected.tensors.keys()
        and found.dense.keys() == expected.dense.keys()
        and all(torch.equal(found.tensors[n].dequantize(), expected.tensors[n].dequantize()) for n in found.tensors)
        and all(torch.equal(found.dense[n], expected.dense[n]) for n in found.dense)
    )


def mutated(directory: Path, **parts: Tensor | None) -> Path:
    """Some tensors of LAYER replaced or taken away."""
    tensors = stored(directory)
    for part, tensor in parts.items():
        tensors.pop(f"{LAYER}.{part}", None)
        if tensor is not None:
            tensors[f"{LAYER}.{part}"] = tensor
    save_file(tensors, directory / "model.safetensors")
    return directory


def refused_or_right(read: Callable[[Path], FusedCheckpoint], exported: Path, expected: FusedCheckpoint) -> int:
    """Read hundreds of damaged copies; returns how many were refused.

    Another name or another shape that nothing contradicts is no wrong answer: nobody can know what it was.
    """
    shapes = {name: spec.shape for name, spec in {**expected.specs, **expected.dense_specs}.items()}
    size = (exported / "model.safetensors").stat().st_size
    refused = count = 0
    for label in mutants(exported):
        count += 1
        try:
            found = read(exported)
            assert all(s.shape[0] * s.shape[1] <= 32 * size for s in found.specs.values()), label
            weights = {n: t.dequantize() for n, t in found.tensors.items()} | dict(found.dense)
            found_shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        except LrqatError as error:
            assert "\n" not in str(error), label
            refused += 1
        else:
            if found_shapes == shapes:
                assert same_tensors(found, expected), label
    assert count >= 200
    return refused


def mutants(directory: Path) -> Iterator[str]:
    """The directory, damaged in place in one way after the other, and whole again at the end."""
    file, config = directory / "model.safetensors", directory / "config.json"
    whole, words, generator = file.read_bytes(), config.read_text(), random.Random(0)
    header = 8 + int.from_bytes(whole[:8], "little")
    for keep in sorted({0, 7, 8, header - 1, header, len(whole) - 1, *generator.sample(range(len(whole)), 20)}):
        file.write_bytes(whole[:keep])
        yield f"first {keep} bytes"
    for place in [*range(8), *generator.sample(range(8, header), 100)]:
        byte = generator.choice([b for b in b'0123456789{}[],:"IFU \x00\xff' if b != whole[place]])
        file.write_bytes(whole[:place] + bytes([byte]) + whole[place + 1 :])
        yield f"byte {place} = {byte}"
    file.write_bytes(whole + b"\0" * 64)
    yield "64 bytes more"
    tensors = load_file(file) if file.write_bytes(whole) else {}
    for label, others in tensor_lies(tensors):
        save_file(others, file)
        yield label
    file.write_bytes(whole)
    shutil.copy(file, directory / "other.safetensors")
    yield "a second file"  # model.safetensors alone is read, as transformers does
    file.rename(directory / "first.safetensors")
    yield "the same tensors in two files"
    (directory / "first.safetensors").rename(file)
    (directory / "other.safetensors").unlink()
    for label, lie in config_lies(json.loads(words)):
        config.write_text(json.dumps(lie))
        yield label
    for text in ("", "[]", words[:50], '{"quantization_config": 1}', "\x00"):
        config.write_text(text)
        yield f"config.json {text[:20]!r}"
    config.write_text(words)


def tensor_lies(tensors: dict[str, Tensor]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    for name, tensor in tensors.items():
        rest = {n: t for n, t in tensors.items() if n != name}
        if name != NORM:
            yield f"no {name}", rest
        changes: dict[str, Tensor] = {
            "flat": tensor.flatten(),
            "cube": tensor[None].clone(),
            "empty": tensor.new_empty(0),
            "scalar": tensor.flatten()[0].clone(),
            "no rows": tensor[:0].clone(),
            "short": tensor[:-1].clone(),
            "long": torch.cat([tensor, tensor]),
            "int16": tensor.to(torch.int16),
            "int64": tensor.to(torch.int64),
            "bool": tensor != 0,
        }
        if tensor.ndim == 2:
            changes["transposed"] = tensor.T.contiguous()
            changes["narrow"] = tensor[:, :-1].contiguous()
        if tensor.is_floating_point():
            changes["nan"] = torch.full_like(tensor, torch.nan)
            changes["not half"] = tensor.float() + 1e-6
        for label, other in changes.items():
            if name != NORM and not (other.shape == tensor.shape and torch.equal(other, tensor)):
                yield f"{name} {label}", {**rest, name: other}
    yield "a weight twice", {**tensors, f"{LAYER}.weight": torch.zeros(32, 64)}
    yield "a stray part", {**tensors, "model.layers.1.mlp.up_proj.qzeros": torch.zeros(2, 4, dtype=torch.int32)}
    yield "no tensor", {}


def config_lies(whole: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every field of quantization_config, at any depth, of another value or gone."""

    def paths(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
        if path:
            yield path
        for key, item in value.items() if isinstance(value, dict) else ():
            yield from paths(item, (*path, key))

    gone = object()
    values = [gone, None, -1, 0, 1, 2, 3, 8, 16, 10**30, 3.5, True, False, "x", [], {}, [1], {"a": 1}]
    for path in paths(whole["quantization_config"]):
        for value in values:
            lie = copy.deepcopy(whole)
            place = lie["quantization_config"]
            for key in path[:-1]:
                place = place[key]
            if value is gone:
                del place[path[-1]]
            else:
                place[path[-1]] = value
            yield f"{'.'.join(path)} = {value!r}", lie
