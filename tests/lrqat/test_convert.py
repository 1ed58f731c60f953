"""A checkpoint in another dtype is mapped, and is the model that transformers makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_architectures import ARCHITECTURES, MIXTURE, SIZES
from transformers import AutoConfig, AutoModelForCausalLM

from lrqat.convert import conversion, converted_model
from lrqat.models import Base, locate
from lrqat.pages import in_file

MODELS: dict[str, dict[str, Any]] = {
    **{name: ARCHITECTURES[name] for name in ("llama", "qwen3", "gemma3_text", "qwen3_moe")},
    "lfm2_moe": {**MIXTURE, "layer_types": ["full_attention"] * 2, "num_dense_layers": 1, "use_expert_bias": True},
}


def saved(model_type: str, folder: Path, dtype: torch.dtype, **how: Any) -> Base:
    """A random model's directory; the tokenizer is only looked for."""
    config = AutoConfig.for_model(model_type, **{**SIZES, **MODELS[model_type]})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(torch.rand(tensor.shape, generator=torch.Generator().manual_seed(1)) / 9)
    model.to(dtype).save_pretrained(folder, **how)
    (folder / "tokenizer.json").write_text("{}")
    return locate(str(folder))


@pytest.mark.parametrize("model_type", MODELS)
@pytest.mark.parametrize(("stored", "wanted"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_a_converted_model_is_what_transformers_makes(
    model_type: str, stored: str, wanted: str, tmp_path: Path
) -> None:
    base, dtype = saved(model_type, tmp_path / "model", getattr(torch, stored)), getattr(torch, wanted)
    entries, folder = conversion(base, dtype), tmp_path / "run" / "converted"
    theirs = base.model(dtype)
    if model_type == "lfm2_moe" and wanted == "bfloat16":  # its bias of experts stays float32
        assert not entries and {t.dtype for t in theirs.state_dict().values()} == {torch.float32, torch.bfloat16}
        return
    folder.mkdir(parents=True)
    (folder / "left.partial").touch()  # by an attempt that was killed
    ours = converted_model(base, dtype, entries, folder)
    assert not folder.exists()
    assert in_file(ours.get_input_embeddings().weight) and not in_file(theirs.get_input_embeddings().weight)
    for found, expected in (
        (dict(ours.named_parameters()), dict(theirs.named_parameters())),
        (dict(ours.named_buffers()), dict(theirs.named_buffers())),
    ):
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def test_shards_are_converted_and_what_the_model_does_not_load_converts_nothing(tmp_path: Path) -> None:
    base = saved("llama", tmp_path / "model", torch.bfloat16, max_shard_size="50KB")
    assert len(base.files) > 1
    ours = converted_model(base, torch.float32, conversion(base, torch.float32), tmp_path / "converted")
    theirs = base.model(torch.float32)
    assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in ours.state_dict().items())
    assert conversion(base, torch.bfloat16) == []
    first = base.files[0]
    save_file({**load_file(first), "rotary_emb.inv_freq": torch.ones(8)}, first, {"format": "pt"})
    assert conversion(base, torch.bfloat16) == []


def test_nothing_is_left_where_writing_fails(tmp_path: Path) -> None:
    base = saved("llama", tmp_path / "model", torch.bfloat16)
    entries = conversion(base, torch.float32)
    base.files[0].write_bytes(base.files[0].read_bytes()[:-9])
    with pytest.raises(Exception, match="safetensors"):
        converted_model(base, torch.float32, entries, tmp_path / "converted")
    assert not (tmp_path / "converted").exists()
