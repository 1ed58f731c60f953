"""GGUF files that nobody has checked: one line that names the file, or a whole read; never another error."""

from __future__ import annotations

import random
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from exporters import gguf
from exporters.gguf_blocks import BLOCK_TYPES
from lrqat.errors import LrqatError
from lrqat.fused import FusedCheckpoint, FusedSpec, FusedTensor, Lazy, SafetensorsDirectory, read_assets, read_json
from lrqat.gguf_file import GgufFile
from lrqat.grid import Grid
from lrqat.ptq import rtn

GRIDS = {
    "q_proj": "w4g32",
    "k_proj": "q4_k",
    "v_proj": "w2",
    "o_proj": "mxfp4",
    "up_proj": "q3_k",
    "down_proj": "tq2_0",
    "gate_proj": "w5g32-min",
}
TYPES = [0, 1, 4, 5, 9, 30, 34, 41, 43, 99, 2**31, 2**32 - 1, *BLOCK_TYPES]
SIZES = [0, 1, 31, 128, 512, 2**31, 2**32, 2**62, 2**63, 2**64 - 1]
MOST_MEMORY = 400 << 20  # bytes that this process may grow by: a hundred times the file


@pytest.fixture(scope="module")
def written(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    files = SafetensorsDirectory(tiny_model_dir)
    specs = {
        name: FusedSpec(Grid.parse(GRIDS[name.split(".")[-2]]), (spec.shape[0], spec.shape[1]))
        for name, spec in files.specs.items()
        if name.endswith("_proj.weight")
    }
    dense = {name: spec for name, spec in files.specs.items() if name not in specs}

    def make(name: str) -> FusedTensor:
        return rtn(files.get(name), specs[name].grid, None, name)

    config, assets = read_json(tiny_model_dir / "config.json"), read_assets(tiny_model_dir)
    checkpoint = FusedCheckpoint(Lazy(specs, make), Lazy(dense, files.get), specs, dense, config, assets)
    return gguf.write(checkpoint, tmp_path_factory.mktemp("gguf") / "x.gguf")


def refused(path: Path, data: bytes) -> bool:
    """Whether a file with these bytes is refused, as it should be; otherwise it is read, all of it."""
    path.write_bytes(data)
    try:
        found = gguf.read(path)
        for name, fused in found.tensors.items():
            assert FusedSpec(fused.grid, tuple(fused.codes_OI.shape)) == found.specs[name]  # type: ignore[arg-type]
            fused.check(name)
        for name, dense in found.dense.items():
            assert (dense.dtype, tuple(dense.shape)) == (found.dense_specs[name].dtype, found.dense_specs[name].shape)
    except LrqatError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return True
    return False


def places(data: bytes, file: GgufFile) -> dict[str, int]:
    """Where the table of tensors has each name."""
    start = data.index(len("token_embd.weight").to_bytes(8, "little") + b"token_embd.weight")
    return {name: data.index(len(name).to_bytes(8, "little") + name.encode(), start) + 8 for name in file.tensors}


def with_number(data: bytes, at: int, value: int, size: int) -> bytes:
    return data[:at] + value.to_bytes(size, "little") + data[at + size :]


def damaged_tables(path: Path) -> Iterator[tuple[str, bytes]]:
    """Wrong numbers of dimensions, sizes, types, offsets and names in the table of tensors."""
    data, file, dice = path.read_bytes(), GgufFile(path), random.Random(0)
    where = places(data, file)
    names = list(where)
    for name in dice.sample(names[:-1], 8):
        at, dims = where[name] + len(name), len(file.tensors[name].shape)
        for value in (0, 3 - dims, 3, 4, 5, 2**32 - 1):
            yield "dims", with_number(data, at, value, 4)
        for value in SIZES:
            if value not in file.tensors[name].shape:
                yield "size", with_number(data, at + 4 + 8 * dice.randrange(dims), value, 8)
        for value in TYPES:
            if value != file.tensors[name].ggml_type:
                yield "type", with_number(data, at + 4 + 8 * dims, value, 4)
        for value in (1, 32, 2**40, 2**63, 2**64 - 32):
            yield "offset", with_number(data, at + 8 + 8 * dims, value, 8)
    for name in dice.sample([n for n in names if n.startswith("blk.0.")], 6):
        twin = name.replace("blk.0.", "blk.1.")
        for other in (twin, "?" * len(name), name.replace("blk.0.", "blk.7.")):
            yield "name", data[: where[name]] + other.encode() + data[where[name] + len(name) :]


def test_damaged_tensor_tables_are_refused(written: Path, tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    read = []
    cases = list(damaged_tables(written))
    for kind, data in cases:
        if not refused(tmp_path / "x.gguf", data):
            read.append(kind)
    assert len(cases) > 300
    assert set(read) <= {"type"}  # types whose blocks have the same size
    assert len(read) < 10
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10 < MOST_MEMORY


def test_flipped_bytes_are_refused_or_read(written: Path, tmp_path: Path) -> None:
    data, dice = written.read_bytes(), random.Random(1)
    header = min(info.offset for info in GgufFile(written).tensors.values())
    at = [dice.randrange(header) for _ in range(60)] + [dice.randrange(header - 2500, header) for _ in range(60)]
    at += [dice.randrange(header, len(data)) for _ in range(40)]
    flips = [(i, dice.choice([0, 1, 255, 128, data[i] ^ 1 << dice.randrange(8)])) for i in at]
    count = sum(refused(tmp_path / "x.gguf", data[:i] + bytes([value]) + data[i + 1 :]) for i, value in flips)
    assert count > 20


@pytest.mark.parametrize("cut", [0, 3, 4, 8, 20, 24, 100, 5000, -100_000, -1])
def test_a_truncated_file_is_refused(written: Path, tmp_path: Path, cut: int) -> None:
    assert refused(tmp_path / "x.gguf", written.read_bytes()[:cut])


@pytest.mark.parametrize(("at", "what"), [(8, "tensors"), (16, "metadata pairs"), (24, "bytes of a string")])
def test_absurd_counts_are_refused_before_anything_is_allocated(
    written: Path, tmp_path: Path, at: int, what: str
) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(with_number(written.read_bytes(), at, 2**60, 8))
    with pytest.raises(LrqatError, match=f"claims 1152921504606846976 {what}"):
        gguf.read(path)


def test_an_array_that_claims_more_than_the_file_is_refused(tmp_path: Path) -> None:
    key, array = b"k", (9).to_bytes(4, "little") + (0).to_bytes(4, "little") + (2**60).to_bytes(8, "little")
    counts = (0).to_bytes(8, "little") + (1).to_bytes(8, "little")
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF\x03\x00\x00\x00" + counts + (1).to_bytes(8, "little") + key + array)
    with pytest.raises(LrqatError, match="claims 1152921504606846976 array values where 0 bytes are left"):
        GgufFile(path)


def test_a_missing_weight_is_refused(written: Path, tmp_path: Path) -> None:
    """The last tensor left out of the table, which nothing else gives away."""
    data, file = written.read_bytes(), GgufFile(written)
    name = list(file.tensors)[-1]
    at = places(data, file)[name] - 8
    entry = 8 + len(name) + 4 + 8 * len(file.tensors[name].shape) + 4 + 8
    start = min(info.offset for info in file.tensors.values())
    table = with_number(data[:at], 8, len(file.tensors) - 1, 8) + data[at + entry : start]
    path = tmp_path / "x.gguf"
    path.write_bytes(table.rstrip(b"\0") + b"\0" * (start - len(table.rstrip(b"\0"))) + data[start:])
    with pytest.raises(LrqatError, match=rf"x\.gguf: .*{name}' is missing"):
        gguf.read(path)


@pytest.mark.parametrize(
    ("layer", "value", "line"),
    [("attn_q", b"\x00\x7c", "not finite"), ("attn_output", b"\xff", "255 is no value of grid mxfp4")],
)
def test_scales_that_their_grid_does_not_have_are_refused(
    written: Path, tmp_path: Path, layer: str, value: bytes, line: str
) -> None:
    data, at = written.read_bytes(), GgufFile(written).tensors[f"blk.0.{layer}.weight"].offset
    path = tmp_path / "x.gguf"
    path.write_bytes(data[:at] + value + data[at + len(value) :])
    with pytest.raises(LrqatError, match=rf"x\.gguf: model\.layers\.0\..*{line}"):
        list(gguf.read(path).tensors.values())


def test_a_code_that_ternary_blocks_do_not_have_is_refused(written: Path, tmp_path: Path) -> None:
    data, at = written.read_bytes(), GgufFile(written).tensors["blk.0.ffn_down.weight"].offset
    path = tmp_path / "x.gguf"
    path.write_bytes(data[:at] + b"\xff" + data[at + 1 :])
    with pytest.raises(LrqatError, match="3 is no value of grid tq2_0"):
        list(gguf.read(path).tensors.values())
