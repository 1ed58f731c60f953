"""The fused checkpoint: the hand-over from training to every exporter, and the only one.

A directory:

    model.safetensors      or shards with the usual index; per quantized weight NAME (its HF parameter name)
                             NAME.codes   uint8    [O, I]  unsigned, unpacked
                             NAME.scales  float16  [O, G]  exactly as the wire stores them
                             NAME.zeros, NAME.sub_scales ...  whatever else the grid stores: `Grid.parts`
                           and every other parameter under its HF name, in its own dtype
    fused.json             {"format": "lrqat-fused", "version": 1,
                            "weights": {NAME: {"grid", "shape", "sha256"}}, "provenance": {...}}
    config.json, generation_config.json, tokenizer and chat-template files, as they came

`load` opens nothing but headers; each tensor is read, and its hash checked, when it is asked for. So an
export takes the memory of the largest tensor, not of the model. Refuses unknown versions and grids,
truncated files, tensors that the index does not know and the reverse.
"""

from __future__ import annotations

import glob
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lrqat.errors import LrqatError
from lrqat.grid import Grid, Part, dequantize
from lrqat.jsonfile import read_json, write_json
from lrqat.safestream import DTYPE_NAMES, Entry, tensor_bytes, write_model

VERSION = 1
UNFINISHED = ".lrqat-unfinished"  # ending of directories that are being written, or put aside
TORCH_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}

# Everything beside the weights that a Hugging Face model directory carries to its users.
ASSETS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


@dataclass(frozen=True)
class FusedTensor:
    """One quantized weight.

    Attributes:
        codes_OI: uint8 [O, I], unsigned codes of the grid.
        parts: scales, zeros and whatever else the grid stores (`Grid.parts`), in the wire's own dtypes.
        grid: the grid these codes lie on.
    """

    codes_OI: Tensor
    parts: Mapping[str, Tensor]
    grid: Grid

    @classmethod
    def make(cls, codes_OI: Tensor, parts: Mapping[str, Tensor], grid: Grid) -> FusedTensor:
        """From parts in any float dtype that holds the wire's values."""
        wire = grid.parts(*codes_OI.shape)
        return cls(
            codes_OI.cpu(), {name: parts[name].detach().cpu().to(part.dtype) for name, part in wire.items()}, grid
        )

    def dequantize(self) -> Tensor:
        """s * level + m, float32 [O, I], exact."""
        return dequantize(self.grid.decode(self.codes_OI), self.grid.affine(self.parts))

    def rows(self, rows: slice) -> FusedTensor:
        """Some rows of it."""
        return FusedTensor(self.codes_OI[rows], {name: part[rows] for name, part in self.parts.items()}, self.grid)

    @classmethod
    def stacked(cls, tiles: Sequence[FusedTensor]) -> FusedTensor:
        """What `rows` has taken apart."""
        parts = {name: torch.cat([tile.parts[name] for tile in tiles]) for name in tiles[0].parts}
        return cls(torch.cat([tile.codes_OI for tile in tiles]), parts, tiles[0].grid)

    def sha256(self) -> str:
        """Hash over the bytes of codes and parts, in the grid's order."""
        digest = hashlib.sha256(tensor_bytes(self.codes_OI))
        for name in self.grid.parts(*self.codes_OI.shape):
            digest.update(tensor_bytes(self.parts[name]))
        return digest.hexdigest()

    def check(self, name: str) -> None:
        """Refuse shapes, dtypes and codes that the grid does not have."""
        rows, columns = self.codes_OI.shape
        wire = self.grid.parts(rows, columns, name)
        if self.parts.keys() != wire.keys():
            raise LrqatError(f"{name}: grid {self.grid} has {', '.join(wire)}, got {', '.join(self.parts)}")
        wire = {"codes": Part(torch.uint8, (rows, columns), 0, self.grid.codes - 1), **wire}
        for key, part in wire.items():
            tensor = self.codes_OI if key == "codes" else self.parts[key]
            if tensor.dtype != part.dtype or tuple(tensor.shape) != part.shape:
                raise LrqatError(
                    f"{name}.{key}: expected {part.dtype} {list(part.shape)} for grid {self.grid}, "
                    f"got {tensor.dtype} {list(tensor.shape)}"
                )
            if part.low is None or part.high is None:
                if not torch.isfinite(tensor).all():
                    raise LrqatError(f"{name}.{key}: not finite")
            elif (most := int(tensor.max())) > part.high or (part.low and (most := int(tensor.min())) < part.low):
                raise LrqatError(f"{name}.{key}: {most} is no value of grid {self.grid}")


@dataclass(frozen=True)
class Spec:
    """Dtype and shape of a dense tensor, known without reading it."""

    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class FusedSpec:
    """Grid and [O, I] of a quantized weight, known without reading it."""

    grid: Grid
    shape: tuple[int, int]

    @property
    def weights(self) -> int:
        """How many they are."""
        return self.shape[0] * self.shape[1]

    @property
    def bits(self) -> float:
        """Of all of them on the wire, scales included."""
        return self.grid.bits_per_weight(*self.shape) * self.weights

    def parts(self, name: str) -> dict[str, Spec]:
        """What the weight is made of on disk: codes first."""
        wire = self.grid.parts(*self.shape, name)
        return {"codes": Spec(torch.uint8, self.shape), **{k: Spec(part.dtype, part.shape) for k, part in wire.items()}}


V = TypeVar("V")


@dataclass(frozen=True)
class Lazy(Mapping[str, V]):
    """Tensors by name, each made when asked for and never kept."""

    specs: Mapping[str, Any]
    make: Callable[[str], V]

    def __getitem__(self, name: str) -> V:
        if name not in self.specs:
            raise KeyError(name)
        return self.make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)


@dataclass(frozen=True)
class FusedCheckpoint:
    """A quantized model; its tensors are lazy whether they come from a live model or from disk.

    Attributes:
        tensors: quantized weights by HF parameter name.
        dense: all other parameters by HF name.
        specs: grid and shape of every quantized weight.
        dense_specs: dtype and shape of every dense tensor.
        hf_config: the model's config.json.
        assets: file name -> bytes: tokenizer, chat template, generation config.
        provenance: method, hyper-parameters, base model and its hash, data, tool versions.
    """

    tensors: Mapping[str, FusedTensor]
    dense: Mapping[str, Tensor]
    specs: Mapping[str, FusedSpec]
    dense_specs: Mapping[str, Spec]
    hf_config: dict[str, Any]
    assets: dict[str, bytes]
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def tied_head(self) -> bool:
        """The output head shares the embedding's tensor."""
        return bool(self.hf_config.get("tie_word_embeddings", False))

    def counts(self) -> dict[str, int | float]:
        """Parameters that are quantized, skipped on request, and dense by nature; bits of all of them, on average."""
        quantized = sum(s.weights for s in self.specs.values())
        numel = {name: torch.Size(s.shape).numel() for name, s in self.dense_specs.items()}
        skipped = sum(numel.get(name, 0) for name in self.provenance.get("skipped", ()))
        bits = sum(s.bits for s in self.specs.values())
        bits += sum(8 * s.dtype.itemsize * numel[name] for name, s in self.dense_specs.items())
        return {
            "quantized_weights": len(self.specs),
            "quantized": quantized,
            "skipped": skipped,
            "dense": sum(numel.values()) - skipped,
            "bits_per_weight": bits / (quantized + sum(numel.values())),
        }

    def save(self, directory: Path) -> Path:
        """Write the directory; it appears under its name only when complete, replacing a previous one."""
        hashes: dict[str, str] = {}

        @lru_cache(maxsize=1)  # a weight's parts follow each other: it is made once, then let go
        def fused(name: str) -> FusedTensor:
            tensor = self.tensors[name]
            tensor.check(name)
            hashes[name] = tensor.sha256()
            return tensor

        entries: list[Entry] = []
        for name, spec in self.specs.items():
            for part, of in spec.parts(name).items():
                entries.append(Entry(f"{name}.{part}", of.dtype, of.shape, partial(_part, fused, name, part)))
        for name, dense in self.dense_specs.items():
            entries.append(Entry(name, dense.dtype, dense.shape, partial(self.dense.__getitem__, name)))
        with fresh_directory(directory, lambda path: (path / "fused.json").is_file()) as fresh:
            write_model(fresh, entries, {"format": "pt"})
            weights = {
                name: {"grid": str(spec.grid), "shape": list(spec.shape), "sha256": hashes[name]}
                for name, spec in self.specs.items()
            }
            write_json(
                fresh / "fused.json",
                {"format": "lrqat-fused", "version": VERSION, "weights": weights, "provenance": self.provenance},
            )
            self.write_assets(fresh)
        return directory

    def write_assets(self, directory: Path, **config_changes: Any) -> None:
        """Write config.json (with changes) and the tokenizer files as they came."""
        for name, content in self.assets.items():
            (directory / name).write_bytes(content)
        write_json(directory / "config.json", {**self.hf_config, **config_changes})

    @classmethod
    def load(cls, directory: Path) -> FusedCheckpoint:
        """Open a fused checkpoint, or the one in a run; tensors are read, and their hashes checked, when asked for."""
        directory = Path(directory)
        if (directory / "fused" / "fused.json").is_file():
            directory = directory / "fused"
        if not directory.is_dir():
            raise LrqatError(f"{directory}: no such directory; expected a fused checkpoint as `lrqat train` writes it")
        index_path = directory / "fused.json"
        if not index_path.is_file():
            raise LrqatError(f"{directory}: no fused.json; expected a fused checkpoint (RUN/fused of `lrqat train`)")
        index = read_json(index_path)
        if index.get("format") != "lrqat-fused" or index.get("version") != VERSION:
            raise LrqatError(
                f"{index_path}: expected format lrqat-fused version {VERSION}, got {index.get('format')!r} "
                f"version {index.get('version')!r}; use the lrqat that wrote it"
            )
        files = SafetensorsDirectory(directory)
        try:
            weights, provenance = dict(index["weights"]), dict(index["provenance"])
            hashes = {name: str(w["sha256"]) for name, w in weights.items()}
            shapes = {name: tuple(map(int, w["shape"])) for name, w in weights.items()}
            specs = {name: FusedSpec(Grid.parse(w["grid"]), shapes[name]) for name, w in weights.items()}  # type: ignore[arg-type]
            if strange := [name for name, shape in shapes.items() if len(shape) != 2 or min(shape) < 1]:
                raise ValueError(f"shape of {strange[0]}")
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise LrqatError(f"{index_path}: damaged ({type(error).__name__}: {error}); copy it again") from None
        parts = {f"{name}.{part}" for name, spec in specs.items() for part in spec.parts(name)}
        missing = parts - files.specs.keys()
        if missing:
            raise LrqatError(f"{directory}: tensor {min(missing)} is in fused.json but in no safetensors file")
        dense_specs = {name: spec for name, spec in files.specs.items() if name not in parts}
        stray = [n for n in dense_specs if n.endswith(".codes") or n.rpartition(".")[0] in specs]
        if stray:
            raise LrqatError(f"{directory}: tensor {stray[0]} belongs to no weight of fused.json")

        def fused(name: str) -> FusedTensor:
            spec = specs[name]
            wire = {part: files.get(f"{name}.{part}") for part in spec.parts(name)}
            found = FusedTensor(wire.pop("codes"), wire, spec.grid)
            found.check(name)
            if tuple(found.codes_OI.shape) != specs[name].shape or found.sha256() != hashes[name]:
                raise LrqatError(f"{directory}: {name} does not match its SHA-256 in fused.json; the file was changed")
            return found

        return cls(
            tensors=Lazy(specs, fused),
            dense=Lazy(dense_specs, files.get),
            specs=specs,
            dense_specs=dense_specs,
            hf_config=read_json(directory / "config.json"),
            assets=read_assets(directory),
            provenance=provenance,
        )


def config_dtype(hf_config: Mapping[str, Any]) -> str | None:
    """What config.json says of its tensors' dtype, under transformers 5's key or the one before."""
    return hf_config.get("dtype") or hf_config.get("torch_dtype")


def is_fused(source: str | Path) -> bool:
    """A fused checkpoint, or a run that holds one."""
    return any((Path(source).expanduser() / name).is_file() for name in ("fused.json", "fused/fused.json"))


def _part(fused: Callable[[str], FusedTensor], name: str, part: str) -> Tensor:
    found = fused(name)
    return found.codes_OI if part == "codes" else found.parts[part]


class SafetensorsDirectory:
    """All tensors of a directory's safetensors files: headers now, values when asked for."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        index = directory / "model.safetensors.index.json"
        weight_map = read_json(index).get("weight_map", {}) if index.is_file() else {}
        if (directory / "model.safetensors").is_file():
            paths = [directory / "model.safetensors"]
        else:
            paths = sorted({directory / str(name) for name in weight_map.values()} or directory.glob("*.safetensors"))
        if not paths:
            raise LrqatError(
                f"{directory}: no safetensors file (pickled .bin weights are not read; convert them first)"
            )
        if lost := [path for path in paths if path.parent != directory or not path.is_file()]:
            raise LrqatError(f"{lost[0]}: named by {index.name}, but not there; copy or download it again")
        self.paths = paths
        self.file_of: dict[str, Path] = {}
        self.specs: dict[str, Spec] = {}
        for path in paths:
            with open_safetensors(path) as file:
                for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                    if name in self.file_of:
                        raise LrqatError(f"{path}: tensor {name} occurs in {self.file_of[name].name} too")
                    part = file.get_slice(name)
                    dtype = TORCH_DTYPES.get(part.get_dtype())
                    if dtype is None:
                        raise LrqatError(
                            f"{path}: tensor {name} has dtype {part.get_dtype()}, which lrqat does not know"
                        )
                    self.file_of[name] = path
                    self.specs[name] = Spec(dtype, tuple(part.get_shape()))

    def get(self, name: str) -> Tensor:
        """Read one tensor."""
        with open_safetensors(self.file_of[name]) as file:
            return file.get_tensor(name)


@contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """`safe_open` for the CPU, with its errors as one line that names the file."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise LrqatError(f"{path}: not a whole safetensors file ({error}); copy or download it again") from None


@contextmanager
def fresh_directory(final: Path, ours: Callable[[Path], bool] = lambda _: False) -> Iterator[Path]:
    """A directory to fill; renamed to `final` if all went well, else removed.

    Args:
        final: the name it gets. What is there already is replaced if it is empty or `ours` says so.
        ours: tells whether an existing directory is an earlier result of the same kind.

    Raises:
        LrqatError: `final` holds something that lrqat did not write.
    """
    if final.exists() and not (final.is_dir() and (ours(final) or not any(final.iterdir()))):
        raise LrqatError(f"{final}: exists, and is not an earlier result of this command; name another --out")
    final.parent.mkdir(parents=True, exist_ok=True)
    for left in final.parent.glob(f".{glob.escape(final.name)}.*{UNFINISHED}"):  # of a run that was killed
        shutil.rmtree(left, ignore_errors=True)
    partial, old = (Path(tempfile.mkdtemp(UNFINISHED, f".{final.name}.", final.parent)) for _ in range(2))
    partial.chmod(0o777 & ~_umask())
    try:
        yield partial
        if final.exists():
            os.replace(final, old / "old")
        os.replace(partial, final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def read_assets(directory: Path) -> dict[str, bytes]:
    """The files of ASSETS that exist, but for config.json."""
    found = {name: directory / name for name in ASSETS if name != "config.json"}
    return {name: path.read_bytes() for name, path in found.items() if path.is_file()}
