"""Safetensors, streamed: golden bytes, the library's own reader as oracle, nothing half-written."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, load_file, save
from torch import Tensor

from lrqat.fused import SafetensorsDirectory
from lrqat.safestream import DTYPE_NAMES, Entry, tensor_bytes, write_file, write_model

# u64 length of the header, 88; JSON, filled with spaces to a multiple of 8; the int16 values 1 and -2.
GOLDEN = (
    b"\x58\x00\x00\x00\x00\x00\x00\x00"
    b'{"__metadata__":{"format":"pt"},"w":{"dtype":"I16","shape":[2,1],"data_offsets":[0,4]}} '
    b"\x01\x00\xfe\xff"
)


def entry(name: str, tensor: Tensor) -> Entry:
    """An entry that gives `tensor`."""
    return Entry(name, tensor.dtype, tuple(tensor.shape), lambda: tensor)


def sample(dtype: torch.dtype, *shape: int) -> Tensor:
    """Values of any dtype."""
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def test_the_bytes_are_those_of_the_specification(tmp_path: Path) -> None:
    path = tmp_path / "one.safetensors"
    write_file(path, [entry("w", torch.tensor([[1], [-2]], dtype=torch.int16))], {"format": "pt"})
    assert path.read_bytes() == GOLDEN
    assert load(GOLDEN)["w"].tolist() == [[1], [-2]]


SHAPES = st.lists(st.integers(0, 5), max_size=3)


@settings(max_examples=40)
@given(st.dictionaries(st.text(min_size=1, max_size=8), st.tuples(st.sampled_from(list(DTYPE_NAMES)), SHAPES)))
def test_a_file_means_what_the_librarys_own_file_means(
    tmp_path_factory: pytest.TempPathFactory, content: dict[str, tuple[torch.dtype, list[int]]]
) -> None:
    content.pop("__metadata__", None)
    tensors = {name: sample(dtype, *shape) for name, (dtype, shape) in content.items()}
    path = tmp_path_factory.mktemp("stream") / "m.safetensors"
    write_file(path, [entry(name, t) for name, t in tensors.items()], {"format": "pt"})
    ours, theirs = load_file(path), load(save(tensors, {"format": "pt"}))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor)


def test_views_are_written_row_by_row(tmp_path: Path) -> None:
    tensor = torch.arange(12.0).view(3, 4)
    write_file(tmp_path / "t", [entry("t", tensor.T), entry("s", tensor[:, ::2])], {})
    found = load_file(tmp_path / "t")
    assert torch.equal(found["t"], tensor.T) and torch.equal(found["s"], tensor[:, ::2])


def test_bytes_of_a_contiguous_tensor_are_no_copy() -> None:
    tensor = torch.arange(4, dtype=torch.int32)
    view = tensor_bytes(tensor)
    tensor[0] = 0x01020304
    assert bytes(view[:4]) == b"\x04\x03\x02\x01"


def test_tensors_are_made_one_at_a_time_in_the_order_of_the_file(tmp_path: Path) -> None:
    made: list[str] = []

    def make(name: str) -> Tensor:
        made.append(name)
        return torch.zeros(3)

    names = ["b", "a", "c"]
    write_file(tmp_path / "m", [Entry(n, torch.float32, (3,), partial(make, n)) for n in names], {})
    assert made == names


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, OSError(28, "No space left on device")])
def test_an_interrupted_file_leaves_nothing(tmp_path: Path, error: BaseException | type[BaseException]) -> None:
    def fail() -> Tensor:
        raise error

    entries = [entry("a", torch.zeros(1000)), Entry("b", torch.float32, (1,), fail)]
    with pytest.raises(error if isinstance(error, type) else type(error)):
        write_file(tmp_path / "m.safetensors", entries, {})
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_file_leaves_the_one_before_it_whole(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    write_file(path, [entry("a", torch.ones(2))], {})
    with pytest.raises(ZeroDivisionError):
        write_file(path, [Entry("a", torch.float32, (2,), lambda: 1 / 0)], {})  # type: ignore[arg-type,return-value]
    assert torch.equal(load_file(path)["a"], torch.ones(2))


def test_a_tensor_that_is_not_what_was_announced_is_refused(tmp_path: Path) -> None:
    for shape, dtype in (((2, 3), torch.float32), ((3, 2), torch.float16)):
        with pytest.raises(ValueError, match="w was announced as"):
            write_file(tmp_path / "m", [Entry("w", dtype, shape, lambda: torch.zeros(3, 2))], {})
    with pytest.raises(ValueError, match="w occurs twice"):
        write_file(tmp_path / "m", [entry("w", torch.zeros(1))] * 2, {})
    assert list(tmp_path.iterdir()) == []


def test_shards_hold_every_tensor_once_and_the_index_says_where(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((10,), float(i)) for i in range(7)}
    paths = write_model(tmp_path, [entry(n, t) for n, t in tensors.items()], {"format": "pt"}, max_shard_bytes=100)
    assert [p.name for p in paths] == [f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)]
    assert all(sum(t.nbytes for t in load_file(p).values()) <= 100 for p in paths)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 280} and index["weight_map"].keys() == tensors.keys()
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], tensors[name])
    files = SafetensorsDirectory(tmp_path)
    assert all(torch.equal(files.get(name), tensor) for name, tensor in tensors.items())


def test_transformers_loads_our_shards(tmp_path: Path, tiny_model_dir: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    weights = {n: t for n, t in model.state_dict().items() if n != "lm_head.weight"}
    write_model(tmp_path, [entry(n, t) for n, t in weights.items()], {"format": "pt"}, max_shard_bytes=10**6)
    (tmp_path / "config.json").write_bytes((tiny_model_dir / "config.json").read_bytes())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())


def test_a_tensor_larger_than_a_shard_has_one_of_its_own(tmp_path: Path) -> None:
    sizes = {"a": 2, "b": 100, "c": 2}
    paths = write_model(tmp_path, [entry(n, torch.zeros(k)) for n, k in sizes.items()], {}, max_shard_bytes=50)
    assert [list(load_file(p)) for p in paths] == [["a"], ["b"], ["c"]]


def test_one_shard_needs_no_index(tmp_path: Path) -> None:
    assert write_model(tmp_path, [entry("a", torch.zeros(2))], {}) == [tmp_path / "model.safetensors"]
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
