"""The fused checkpoint: what is loaded is what was saved, lazily, hashed; everything unknown is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from lrqat.errors import LrqatError
from lrqat.fused import VERSION, FusedCheckpoint, FusedSpec, FusedTensor, Lazy, Spec, fresh_directory
from lrqat.grid import Grid

UP, DOWN = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"


def tensor(spelling: str, rows: int = 6, columns: int = 64, seed: int = 0) -> FusedTensor:
    """Random codes and parts, scales of both signs."""
    grid = Grid.parse(spelling)
    g = torch.Generator().manual_seed(seed)
    codes_OI = torch.randint(0, grid.codes, (rows, columns), generator=g, dtype=torch.uint8)
    parts = {}
    for name, part in grid.parts(rows, columns).items():
        if part.low is None or part.high is None:
            parts[name] = torch.randn(part.shape, generator=g).bfloat16()
        else:
            parts[name] = torch.randint(part.low, part.high + 1, part.shape, generator=g)
    return FusedTensor.make(codes_OI, parts, grid)


def checkpoint(*spellings: str, dense: dict[str, Tensor] | None = None) -> FusedCheckpoint:
    """A checkpoint of one weight per grid, a norm and an embedding."""
    tensors = {f"model.layers.{i}.mlp.up_proj.weight": tensor(s, seed=i) for i, s in enumerate(spellings)}
    dense = dense or {
        "model.norm.weight": torch.ones(64, dtype=torch.bfloat16),
        "model.embed.weight": torch.rand(9, 64),
    }
    return FusedCheckpoint(
        tensors=tensors,
        dense=dense,
        specs={n: FusedSpec(t.grid, (t.codes_OI.shape[0], t.codes_OI.shape[1])) for n, t in tensors.items()},
        dense_specs={n: Spec(t.dtype, tuple(t.shape)) for n, t in dense.items()},
        hf_config={"model_type": "llama", "tie_word_embeddings": True},
        assets={"tokenizer.json": b"{}", "chat_template.jinja": "naïve ✓".encode()},
        provenance={"method": "test", "settings": {"rank": 3}},
    )


def same(found: FusedTensor, expected: FusedTensor) -> bool:
    """Equal in every field and bit."""
    pairs = [(found.codes_OI, expected.codes_OI), *((found.parts[k], part) for k, part in expected.parts.items())]
    return (found.grid, found.parts.keys()) == (expected.grid, expected.parts.keys()) and all(
        a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs
    )


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return checkpoint("w4g32", "w3-asym", "w8g16-fp16").save(tmp_path / "fused")


@given(st.lists(st.integers(2, 8), min_size=1, max_size=3), st.sampled_from(["", "g16", "g32"]), st.booleans())
@settings(max_examples=15)
def test_what_is_loaded_is_what_was_saved(
    tmp_path_factory: pytest.TempPathFactory, widths: list[int], group: str, asymmetric: bool
) -> None:
    before = checkpoint(*(f"w{bits}{group}{'-asym' if asymmetric else ''}" for bits in widths))
    after = FusedCheckpoint.load(before.save(tmp_path_factory.mktemp("fused") / "fused"))
    assert after.specs == before.specs and after.dense_specs == before.dense_specs
    assert after.hf_config == before.hf_config and after.assets == before.assets
    assert after.provenance == before.provenance and after.counts() == before.counts()
    assert all(same(after.tensors[name], before.tensors[name]) for name in before.tensors)
    for name, dense in before.dense.items():
        assert after.dense[name].dtype == dense.dtype and torch.equal(after.dense[name], dense)


def test_the_same_checkpoint_is_always_the_same_bytes(tmp_path: Path) -> None:
    dense = {"b": torch.ones(3), "a": torch.zeros(2)}
    one, two = (checkpoint("w4g32", dense=dense).save(tmp_path / name) for name in ("one", "two"))
    assert {p.name: p.read_bytes() for p in one.iterdir()} == {p.name: p.read_bytes() for p in two.iterdir()}


def test_dequantization_of_an_asymmetric_weight_uses_its_zeros() -> None:
    found = tensor("w4g32-asym")
    scale, zero = (found.parts[part][0, 1].double() for part in ("scales", "zeros"))
    first = scale * (found.codes_OI[0, 40].double() - zero)
    assert found.dequantize()[0, 40].double() == first


def test_the_files_are_those_of_the_design(saved: Path) -> None:
    content = load_file(saved / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    assert {k: v.dtype for k, v in content.items() if k.startswith(name)} == {
        f"{name}.codes": torch.uint8,
        f"{name}.scales": torch.float16,
        f"{name}.zeros": torch.uint8,
    }
    index = json.loads((saved / "fused.json").read_text())
    assert (index["format"], index["version"]) == ("lrqat-fused", 1)
    entry = index["weights"][name]
    assert entry["grid"] == "w3-asym" and entry["shape"] == [6, 64] and len(entry["sha256"]) == 64
    assert {p.name for p in saved.iterdir()} == {
        "model.safetensors",
        "fused.json",
        "config.json",
        "tokenizer.json",
        "chat_template.jinja",
    }


def test_the_hash_is_over_codes_scales_and_zeros_in_this_order() -> None:
    import hashlib

    found = tensor("w4g32-asym")
    parts = (found.codes_OI, found.parts["scales"], found.parts["zeros"])
    assert found.sha256() == hashlib.sha256(b"".join(p.numpy().tobytes() for p in parts)).hexdigest()


def test_a_run_is_taken_for_the_checkpoint_it_holds(tmp_path: Path) -> None:
    checkpoint("w4g32").save(tmp_path / "run" / "fused")
    assert FusedCheckpoint.load(tmp_path / "run").counts() == checkpoint("w4g32").counts()


def test_loading_reads_no_tensor_and_reading_notices_what_was_changed(saved: Path) -> None:
    path = saved / "model.safetensors"
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    data[start] ^= 1  # a code of the first weight: still on its grid
    path.write_bytes(data)
    loaded = FusedCheckpoint.load(saved)
    first, second, third = loaded.tensors
    with pytest.raises(LrqatError, match=rf"^[^\n]*{first} does not match its SHA-256[^\n]*changed$"):
        loaded.tensors[first]
    assert loaded.tensors[second].grid.bits == 3 and loaded.tensors[third].grid.bits == 8


@pytest.mark.parametrize("part", ["scales", "zeros", "codes"])
def test_a_changed_part_of_a_weight_is_noticed(saved: Path, part: str) -> None:
    content = load_file(saved / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    changed = content[f"{name}.{part}"]
    changed[0, 0] = changed[0, 0] * 2 if part == "scales" else 7 - changed[0, 0]
    save_file(content, saved / "model.safetensors")
    loaded = FusedCheckpoint.load(saved)
    with pytest.raises(LrqatError, match=f"{name} does not match its SHA-256"):
        loaded.tensors[name]


def edit(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change fused.json."""
    path = directory / "fused.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda i: i.update(version=VERSION + 1),
            f"expected format lrqat-fused version {VERSION}, got .*{VERSION + 1}",
        ),
        (lambda i: i.update(version=str(VERSION)), "version '1'"),
        (lambda i: i.update(format="other"), "'other'"),
        (lambda i: i.pop("version"), "version None"),
        (lambda i: i["weights"][UP].update(grid="q9_k"), "grid 'q9_k'"),
        (lambda i: i["weights"][UP].update(grid="w4g48"), "group_size 48 does not divide in_features 64"),
        (lambda i: i["weights"].update({DOWN: i["weights"][UP]}), f"{DOWN}.codes is in fused.json but"),
        (lambda i: i["weights"].pop(UP), f"tensor {UP}.codes belongs to no weight"),
        (lambda i: i["weights"][UP].pop("grid"), "grid"),
        (lambda i: i["weights"][UP].update(shape=[6]), "shape"),
        (lambda i: i.pop("weights"), "weights"),
        (lambda i: i.pop("provenance"), "provenance"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_index_that_lrqat_does_not_know_is_refused_in_one_line(
    saved: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    edit(saved, change)
    with pytest.raises(LrqatError, match=rf"^[^\n]*{message}[^\n]*$"):
        FusedCheckpoint.load(saved)


@pytest.mark.parametrize(("shape", "grid"), [([6, 32], "w4g32"), ([6, 64], "w4g16"), ([6, 64], "w3g32")])
def test_a_tensor_that_contradicts_the_index_is_refused_when_read(saved: Path, shape: list[int], grid: str) -> None:
    edit(saved, lambda i: i["weights"][UP].update(shape=shape, grid=grid))
    with pytest.raises(LrqatError, match=rf"^[^\n]*{UP}[^\n]*$"):
        FusedCheckpoint.load(saved).tensors[UP]


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1])
def test_a_truncated_file_is_refused_in_one_line_that_names_it(saved: Path, keep: int) -> None:
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(LrqatError, match=r"^[^\n]*model\.safetensors: not a whole safetensors file[^\n]*$"):
        FusedCheckpoint.load(saved)


@pytest.mark.parametrize("content", ["", "{", "[]", '"x"', "\x00"])
def test_a_damaged_index_is_one_line(saved: Path, content: str) -> None:
    (saved / "fused.json").write_text(content)
    with pytest.raises(LrqatError, match=r"^[^\n]*fused\.json: [^\n]*JSON[^\n]*$"):
        FusedCheckpoint.load(saved)


@pytest.mark.parametrize(
    ("remove", "message"),
    [("model.safetensors", "no safetensors file"), ("config.json", "config.json: no such file"), ("fused.json", "RUN")],
)
def test_a_missing_file_is_one_line(saved: Path, remove: str, message: str) -> None:
    (saved / remove).unlink()
    with pytest.raises(LrqatError, match=rf"^[^\n]*{message}[^\n]*$"):
        FusedCheckpoint.load(saved)


def test_a_missing_directory_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(LrqatError, match=r"^[^\n]*none: no such directory[^\n]*$"):
        FusedCheckpoint.load(tmp_path / "none")


def test_missing_and_stray_tensors_are_refused(saved: Path) -> None:
    path = saved / "model.safetensors"
    content = load_file(path)
    scales = content.pop(f"{UP}.scales")
    save_file(content, path)
    with pytest.raises(LrqatError, match=rf"{UP}\.scales is in fused\.json but in no safetensors file"):
        FusedCheckpoint.load(saved)
    save_file(content | {f"{UP}.scales": scales, f"{UP}.zeros": torch.zeros(6, 2, dtype=torch.uint8)}, path)
    with pytest.raises(LrqatError, match=rf"{UP}\.zeros belongs to no weight"):
        FusedCheckpoint.load(saved)


def test_a_tensor_in_two_files_is_refused(saved: Path) -> None:
    content = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").unlink()
    for number in (1, 2):
        (saved / f"model-{number}.safetensors").write_bytes(content)
    with pytest.raises(LrqatError, match=r"occurs in model-1\.safetensors too"):
        FusedCheckpoint.load(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codes_OI": torch.full((6, 64), 16, dtype=torch.uint8)}, r"codes: 16 is no value of grid w4g32"),
        ({"codes_OI": torch.zeros(6, 64, dtype=torch.int32)}, "expected torch.uint8"),
        ({"parts": {"scales": torch.ones(6, 2)}}, "expected torch.float16"),
        ({"parts": {"scales": torch.ones(6, 1, dtype=torch.float16)}}, r"\[6, 2\]"),
        ({"parts": {"scales": torch.full((6, 2), torch.nan, dtype=torch.float16)}}, "not finite"),
        ({"parts": {}}, "grid w4g32 has scales, got $"),
        ({"grid": Grid.parse("w4g32-asym")}, "grid w4g32-asym has scales, zeros, got scales"),
    ],
)
def test_a_tensor_off_its_grid_is_never_saved(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    good = checkpoint("w4g32")
    bad = replace(good, tensors={UP: replace(good.tensors[UP], **changes)})
    with pytest.raises(LrqatError, match=message):
        bad.save(tmp_path / "fused")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_save_leaves_nothing_or_the_one_before(tmp_path: Path, error: type[BaseException]) -> None:
    good = checkpoint("w4g32", "w3")

    def make(name: str) -> FusedTensor:
        if "layers.1" in name:
            raise error
        return good.tensors[name]

    broken = replace(good, tensors=Lazy(good.specs, make))
    with pytest.raises(error):
        broken.save(tmp_path / "fused")
    assert list(tmp_path.iterdir()) == []
    good.save(tmp_path / "fused")
    with pytest.raises(error):
        broken.save(tmp_path / "fused")
    assert [p.name for p in tmp_path.iterdir()] == ["fused"]
    assert same(FusedCheckpoint.load(tmp_path / "fused").tensors[UP], good.tensors[UP])


def test_a_new_checkpoint_takes_the_place_of_the_old_one_whole(tmp_path: Path) -> None:
    checkpoint("w4g32", "w4g32").save(tmp_path / "fused")
    (tmp_path / "fused" / "stray.safetensors").write_bytes(b"")
    checkpoint("w3").save(tmp_path / "fused")
    assert [str(s.grid) for s in FusedCheckpoint.load(tmp_path / "fused").specs.values()] == ["w3"]
    assert [p.name for p in tmp_path.iterdir()] == ["fused"]


def test_what_an_earlier_kill_left_is_in_no_ones_way(tmp_path: Path) -> None:
    left = tmp_path / ".fused.x1.lrqat-unfinished"
    for _ in range(2):
        left.mkdir()
        (left / "model.safetensors").write_bytes(b"half")
        FusedCheckpoint.load(checkpoint("w4g32").save(tmp_path / "fused"))
        assert [p.name for p in tmp_path.iterdir()] == ["fused"]


def test_neighbours_that_look_like_leftovers_are_let_alone(tmp_path: Path) -> None:
    for name in ("fused.old", "fused.partial", "fused.bak"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("precious")
    for _ in range(2):
        checkpoint("w4g32").save(tmp_path / "fused")
    assert {p.name for p in tmp_path.iterdir()} == {"fused", "fused.old", "fused.partial", "fused.bak"}
    assert all((tmp_path / name / "mine").is_file() for name in ("fused.old", "fused.partial", "fused.bak"))


def test_a_directory_appears_only_when_it_is_complete(tmp_path: Path) -> None:
    with fresh_directory(tmp_path / "a" / "b") as fresh:
        (fresh / "x").write_text("x")
        assert not (tmp_path / "a" / "b").exists()
    assert (tmp_path / "a" / "b" / "x").read_text() == "x"


def test_a_weight_is_made_once_and_let_go(tmp_path: Path) -> None:
    good, made = checkpoint("w4g32", "w3-asym"), []

    def make(name: str) -> FusedTensor:
        made.append(name)
        return good.tensors[name]

    replace(good, tensors=Lazy(good.specs, make)).save(tmp_path / "fused")
    assert made == list(good.specs)


def test_names_that_are_not_there_are_a_key_error(saved: Path) -> None:
    loaded = FusedCheckpoint.load(saved)
    assert "no.such" not in loaded.tensors and UP in loaded.tensors
    with pytest.raises(KeyError):
        loaded.tensors["no.such"]


def test_a_tied_head_is_stored_once(tiny_model_dir: Path, tmp_path: Path) -> None:
    from lrqat.models import fake_quant_model, locate
    from lrqat.ptq import quantize

    path = quantize(locate(str(tiny_model_dir)), Grid.parse("w4g32"), None, (), torch.float32, tmp_path)
    loaded = FusedCheckpoint.load(path)
    assert loaded.tied_head and len(loaded.specs) == 14
    assert "model.embed_tokens.weight" in loaded.dense and "lm_head.weight" not in loaded.dense
    model = fake_quant_model(loaded)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for name, weight in loaded.tensors.items():
        assert torch.equal(model.get_parameter(name), weight.dequantize())


def test_a_directory_that_lrqat_did_not_write_is_never_replaced(saved: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "precious.txt").write_text("x")
    with pytest.raises(LrqatError, match=r"theirs: exists, and is not an earlier result"):
        FusedCheckpoint.load(saved).save(theirs)
    assert (theirs / "precious.txt").read_text() == "x"
    FusedCheckpoint.load(saved).save(saved)  # an earlier result is
