"""Every architecture of GGUF export: llama.cpp computes what transformers does, and what it would not is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf as reference
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from exporters import gguf, gguf_arch
from exporters.gguf_families import FAMILIES
from exporters.verify import verify
from lrqat.errors import LrqatError
from lrqat.fused import FusedCheckpoint, FusedSpec, Lazy, SafetensorsDirectory, read_assets, read_json
from lrqat.gguf_file import GgufFile
from lrqat.grid import Grid
from lrqat.ptq import rtn

# float32 noise: up to 5 layers of sums over at most 256 terms, 2^-24 * sqrt(256) each, with room for the softmax.
F32_TOLERANCE = 1e-5
# ggml's table of GELU is in float16: the noise above moves some values by one of its steps, 2^-11.
GELU_TOLERANCE = 1e-4
# llama.cpp rounds activations to 8 bits (Q8_0) before each matrix: 2^-8 / sqrt(3) of their block's maximum.
Q8_TOLERANCE = 5e-2
ROUTED_TOLERANCE = 2e-1  # and may so choose another expert for a token
TOKENS = [int(t) for t in np.random.default_rng(0).integers(0, 400, 100)]

SMALL = {
    "vocab_size": 448,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}


def rope(kind: str, theta: float = 5000.0, **settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **settings}}


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=64)
LINEAR = rope("linear", factor=4.0)
PARTIAL = {"partial_rotary_factor": 0.75}
LONG = {
    "short_factor": [1.0 + i / 16 for i in range(16)],
    "long_factor": [2.0 + i / 4 for i in range(16)],
    "original_max_position_embeddings": 256,
}
GEMMA_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 50000.0, "factor": 2.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 2000.0},
}
GEMMA = {
    "head_dim": 64,
    "query_pre_attn_scalar": 64,
    "num_hidden_layers": 4,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "rope_parameters": GEMMA_ROPE,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}

# architecture, model_type, what its config.json says beside SMALL
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-yarn": ("LlamaForCausalLM", "llama", YARN),
    "mistral": ("MistralForCausalLM", "mistral", {"head_dim": 64, "sliding_window": None}),
    "mistral-llama3": ("MistralForCausalLM", "mistral", {"sliding_window": None, **rope("llama3", **LLAMA3)}),
    "mixtral": ("MixtralForCausalLM", "mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": ("Qwen2ForCausalLM", "qwen2", {"tie_word_embeddings": True}),
    "qwen2-yarn": ("Qwen2ForCausalLM", "qwen2", YARN),
    "qwen3": ("Qwen3ForCausalLM", "qwen3", {"head_dim": 64}),
    "qwen3-linear": ("Qwen3ForCausalLM", "qwen3", {"head_dim": 32, **LINEAR}),
    "qwen3-moe": ("Qwen3MoeForCausalLM", "qwen3_moe", {"head_dim": 32, **EXPERTS}),
    "gemma3": ("Gemma3ForCausalLM", "gemma3_text", GEMMA),
    "gemma3-global": (
        "Gemma3ForCausalLM",
        "gemma3_text",
        {**GEMMA, "num_hidden_layers": 2, "layer_types": ["full_attention"] * 2, "final_logit_softcapping": 3.0},
    ),
    "gemma3-local": (
        "Gemma3ForCausalLM",
        "gemma3_text",
        {**GEMMA, "num_hidden_layers": 2, "layer_types": ["sliding_attention"] * 2, "final_logit_softcapping": 3.0},
    ),
    "phi3": ("Phi3ForCausalLM", "phi3", {}),
    "phi3-partial": ("Phi3ForCausalLM", "phi3", rope("default", **PARTIAL)),
    "phi3-longrope": ("Phi3ForCausalLM", "phi3", {"max_position_embeddings": 1024, **rope("longrope", **LONG)}),
    "smollm3": ("SmolLM3ForCausalLM", "smollm3", {"num_hidden_layers": 5}),
    "olmo2": ("Olmo2ForCausalLM", "olmo2", {}),
}


def is_linear(name: str, spec: Any) -> bool:
    """The decoder's matrices, without routers."""
    return name.startswith("model.layers.") and len(spec.shape) == 2 and not name.endswith(".gate.weight")


def save_model(directory: Path, tokenizer: Path, model_type: str, settings: dict[str, Any]) -> Path:
    """A random model: weights that make a difference, in bfloat16 values as checkpoints have them."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = CONFIG_MAPPING[model_type](**{"tie_word_embeddings": False, **SMALL, **settings})
        model = AutoModelForCausalLM.from_config(config).float()
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data += 0.2 * torch.randn_like(parameter)
            parameter.data = parameter.data.bfloat16().float()
    model.save_pretrained(directory)
    for name, content in read_assets(tokenizer).items():
        if "token" in name:
            (directory / name).write_bytes(content)
    return directory


def fuse(directory: Path, grid: str = "w4g32", **config: Any) -> FusedCheckpoint:
    """The model of a directory, its linears rounded to nearest."""
    files = SafetensorsDirectory(directory)
    specs = {
        name: FusedSpec(Grid.parse(grid), (spec.shape[0], spec.shape[1]))
        for name, spec in files.specs.items()
        if is_linear(name, spec)
    }
    dense = {name: spec for name, spec in files.specs.items() if name not in specs}
    tensors = Lazy(specs, lambda name: rtn(files.get(name), specs[name].grid, None, name))
    hf_config = {**read_json(directory / "config.json"), **config}
    return FusedCheckpoint(tensors, Lazy(dense, files.get), specs, dense, hf_config, read_assets(directory))


def reference_logits(checkpoint: FusedCheckpoint, directory: Path, tokens: list[int]) -> np.ndarray:
    """What transformers computes in float32 with the weights of the checkpoint."""
    from transformers import AutoModelForCausalLM

    directory.mkdir()
    weights = {name: tensor.float().contiguous() for name, tensor in checkpoint.dense.items()}
    weights |= {name: tensor.dequantize() for name, tensor in checkpoint.tensors.items()}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(checkpoint.hf_config))
    model, info = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    if checkpoint.hf_config["model_type"] == "gemma3_text":
        for layer in model.model.layers:
            layer.mlp.act_fn = GgmlGelu()
    with torch.no_grad():
        return model.eval()(torch.tensor([tokens])).logits[0].numpy()


class GgmlGelu(torch.nn.Module):
    """ggml looks tanh-GELU up in a table of float16: ggml_vec_gelu_f32 in ggml/src/ggml-cpu/vec.h."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()


def relative_l2(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


@pytest.fixture(scope="module", params=MODELS)
def model_dir(request: pytest.FixtureRequest, tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    _, model_type, settings = MODELS[request.param]
    return save_model(tmp_path_factory.mktemp(request.param), tiny_model_dir, model_type, settings)


def one(name: str, tiny_model_dir: Path, tmp_path: Path) -> Path:
    """The directory of one model."""
    (tmp_path / "model").mkdir()
    _, model_type, settings = MODELS[name]
    return save_model(tmp_path / "model", tiny_model_dir, model_type, settings)


def test_every_architecture_of_the_table_is_tried() -> None:
    assert {architecture for architecture, _, _ in MODELS.values()} == FAMILIES.keys()


def test_llama_cpp_computes_what_transformers_does(model_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason="pip install 'lrqat[llamacpp]'")
    from serve.llamacpp import LlamaCpp

    checkpoint = fuse(model_dir)
    theirs = reference_logits(checkpoint, tmp_path / "dequantized", TOKENS)
    assert len(set(theirs.argmax(-1).tolist())) > 20  # no model that always says the same
    with LlamaCpp(gguf.write(checkpoint, tmp_path / "f32.gguf", dequantized=True), n_ctx=256, exact=True) as runtime:
        ours = runtime.logits(TOKENS)
    gelu = checkpoint.hf_config["model_type"] == "gemma3_text"
    assert relative_l2(ours, theirs) < (GELU_TOLERANCE if gelu else F32_TOLERANCE)
    assert np.array_equal(ours.argmax(-1), theirs.argmax(-1))
    with LlamaCpp(gguf.write(checkpoint, tmp_path / "q4_0.gguf"), n_ctx=256) as runtime:
        routed = "num_experts_per_tok" in checkpoint.hf_config
        assert relative_l2(runtime.logits(TOKENS), theirs) < (ROUTED_TOLERANCE if routed else Q8_TOLERANCE)


def test_what_is_read_back_is_what_was_trained_bit_for_bit(model_dir: Path, tmp_path: Path) -> None:
    checkpoint = fuse(model_dir)
    path = gguf.write(checkpoint, tmp_path / "x.gguf")
    assert verify(gguf_arch.as_stored(checkpoint), gguf.read(path), path) == len(checkpoint.specs)


def test_names_are_those_of_ggufs_tensor_map(model_dir: Path) -> None:
    ours = gguf_arch.architecture(read_json(model_dir / "config.json"))
    arch = next(kind for kind, name in reference.MODEL_ARCH_NAMES.items() if name == ours.family.name)
    theirs = reference.get_tensor_name_map(arch, ours.blocks)
    for gguf_name, names in ours.names().items():
        merged = names[0].replace(".experts.0.", ".experts.")  # as their converter calls a stack
        if "block_sparse_moe.experts" in merged:
            merged = merged.replace("model.layers", "layers").replace("block_sparse_moe", "feed_forward")
        assert theirs.get_name(merged, try_suffixes=(".weight", ".bias")) == gguf_name


def test_longrope_takes_its_long_factors_beyond_the_original_context(tiny_model_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason="pip install 'lrqat[llamacpp]'")
    from serve.llamacpp import LlamaCpp

    checkpoint, tokens = fuse(one("phi3-longrope", tiny_model_dir, tmp_path)), TOKENS * 3
    theirs = reference_logits(checkpoint, tmp_path / "dequantized", tokens)
    path = gguf.write(checkpoint, tmp_path / "f32.gguf", dequantized=True)
    with LlamaCpp(path, n_ctx=512, exact=True) as runtime:
        assert relative_l2(runtime.logits(tokens), theirs) < F32_TOLERANCE


def test_experts_are_stacked_in_their_order(tiny_model_dir: Path, tmp_path: Path) -> None:
    checkpoint = fuse(one("qwen3-moe", tiny_model_dir, tmp_path))
    path = gguf.write(checkpoint, tmp_path / "x.gguf")
    theirs = {t.name: t for t in reference.GGUFReader(path).tensors}["blk.1.ffn_down_exps.weight"]
    experts = reference.quants.dequantize(theirs.data, theirs.tensor_type)
    assert experts.shape == (4, 128, 64)
    for expert, values in enumerate(experts):
        ours = checkpoint.tensors[f"model.layers.1.mlp.experts.{expert}.down_proj.weight"].dequantize()
        assert np.array_equal(values, ours.numpy())


def test_experts_of_different_kinds_are_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    checkpoint = fuse(one("qwen3-moe", tiny_model_dir, tmp_path))
    name = "model.layers.0.mlp.experts.2.up_proj.weight"
    dense = {**checkpoint.dense, name: checkpoint.tensors[name].dequantize()}
    specs = {n: spec for n, spec in checkpoint.specs.items() if n != name}
    dense_specs = {
        **checkpoint.dense_specs,
        name: replace(next(iter(checkpoint.dense_specs.values())), shape=(64, 128)),
    }
    mixed = replace(checkpoint, dense=dense, specs=specs, dense_specs=dense_specs)
    with pytest.raises(
        LrqatError, match=r"^[^\n]*GGUF stores its 4 experts in one type; use one grid for all of them$"
    ):
        gguf.write(mixed, tmp_path / "new" / "x.gguf")
    assert not (tmp_path / "new").exists()


def test_rows_of_a_head_are_interleaved_for_llama_cpps_rope() -> None:
    rows = torch.tensor([0, 1, 10, 11, 20, 21, 30, 31])  # 2 heads: a0 a1 b0 b1
    ours = gguf_arch.Architecture(FAMILIES["LlamaForCausalLM"], 1, 2, 1)
    name = "model.layers.0.self_attn.q_proj.bias"
    assert ours.to_gguf(name, rows).tolist() == [0, 10, 1, 11, 20, 30, 21, 31]
    assert torch.equal(ours.to_hf(name, ours.to_gguf(name, rows)), rows)
    assert torch.equal(ours.to_gguf("model.layers.0.self_attn.v_proj.bias", rows), rows)
    neox = replace(ours, family=FAMILIES["Qwen2ForCausalLM"])
    assert torch.equal(neox.to_gguf(name, rows), rows)


def test_llama3_rope_factors_follow_transformers() -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = {"architectures": ["LlamaForCausalLM"], **SMALL, **rope("llama3", 500000.0, **LLAMA3)}
    plain = {**config, **rope("default", 500000.0)}
    scaled, unscaled = (LlamaRotaryEmbedding(LlamaConfig(**c)).inv_freq for c in (config, plain))
    factors = gguf_arch.extra_tensors(config)["rope_freqs.weight"]
    torch.testing.assert_close(factors, unscaled / scaled, rtol=1e-5, atol=0)  # float32 against double
    assert not gguf_arch.extra_tensors(plain)


@pytest.mark.parametrize(
    ("name", "config", "context"),
    [
        ("mistral", {"sliding_window": 128}, 128),
        ("mistral", {"sliding_window": 4096}, 512),
        ("phi3", {"sliding_window": 200}, 200),
        ("qwen2", {"sliding_window": 128, "use_sliding_window": True}, 128),
        ("qwen2", {"sliding_window": 128, "use_sliding_window": False}, 512),
        ("gemma3", {}, 512),
    ],
)
def test_the_context_ends_where_llama_cpp_would_leave_out_a_sliding_window(
    tiny_model_dir: Path, tmp_path: Path, name: str, config: dict[str, Any], context: int
) -> None:
    path = gguf.write(fuse(one(name, tiny_model_dir, tmp_path), **config), tmp_path / "x.gguf")
    metadata = GgufFile(path).metadata
    assert metadata[f"{metadata['general.architecture']}.context_length"] == context


def test_gemmas_norms_are_stored_plus_one(tiny_model_dir: Path, tmp_path: Path) -> None:
    checkpoint = fuse(one("gemma3", tiny_model_dir, tmp_path))
    tensors = {t.name: t.data for t in reference.GGUFReader(gguf.write(checkpoint, tmp_path / "x.gguf")).tensors}
    for gguf_name, hf in (("output_norm", "norm"), ("blk.1.attn_k_norm", "layers.1.self_attn.k_norm")):
        expected = checkpoint.dense[f"model.{hf}.weight"].float() + 1
        assert np.array_equal(tensors[f"{gguf_name}.weight"], expected.numpy())


@pytest.mark.parametrize(
    ("name", "config", "line"),
    [
        (
            "llama",
            {"architectures": ["MambaForCausalLM"]},
            "architecture MambaForCausalLM: GGUF export knows LlamaForC",
        ),
        ("llama", {"architectures": ["LlamaForCausalLM", "X"]}, "architecture LlamaForCausalLM, X: GGUF export knows"),
        ("llama", {"vocab_size": None}, "config.json: no vocab_size"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act gelu: llama.cpp's llama computes silu only"),
        ("llama", {**rope("yarn", factor=4.0)}, "rope_type yarn without original_max_position_embeddings"),
        ("llama-yarn", {**rope("yarn", **LLAMA3, beta_fast=16)}, "rope beta_fast 16: GGUF export carries 32 only"),
        (
            "llama-yarn",
            {**rope("yarn", **LLAMA3, truncate=False)},
            "rope truncate False: GGUF export carries True only",
        ),
        ("llama-yarn", {**rope("yarn", **LLAMA3, attention_factor=1.0)}, "rope attention_factor 1.0: GGUF export carr"),
        ("llama", rope("dynamic", factor=4.0), "GGUF export carries rope_type default, linear, yarn, llama3 of whole"),
        ("llama", rope("default", **PARTIAL), "of whole heads for llama"),
        ("mixtral", {"num_local_experts": 5}, "experts.4.w1.weight: missing from the fused checkpoint"),
        ("mixtral", {"num_local_experts": 3}, "experts.3.w1.weight: llama.cpp's llama has no such tensor"),
        ("mixtral", {"num_local_experts": 513}, "513 experts: llama.cpp takes 512 at most"),
        ("qwen2", {"head_dim": 64}, "head_dim 64: llama.cpp's qwen2 has hidden_size / heads only"),
        (
            "qwen2",
            rope("llama3", **LLAMA3),
            "GGUF export carries rope_type default, linear, yarn of whole heads for qw",
        ),
        ("qwen3", {"attention_bias": True}, "attention_bias True: llama.cpp's qwen3 computes False only"),
        ("qwen3", {"head_dim": 32}, "k_norm.weight: shape [64], but config.json says [32]"),
        ("qwen3-moe", {"norm_topk_prob": None}, "norm_topk_prob None: llama.cpp's qwen3moe computes True only"),
        ("qwen3-moe", {"mlp_only_layers": [0]}, "mlp_only_layers [0]: llama.cpp's qwen3moe computes [] only"),
        (
            "qwen3-moe",
            {"moe_intermediate_size": 32},
            "down_proj.weight: shape [128, 64], but config.json says [128, 32]",
        ),
        ("gemma3", {"query_pre_attn_scalar": 168}, "query_pre_attn_scalar 168: llama.cpp's gemma3 computes with 64"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0: llama.cpp's gemma3 computes None"),
        ("gemma3", {"layer_types": ["full_attention", "sliding_attention"] * 2}, "every n-th layer global"),
        (
            "gemma3",
            {"hidden_activation": "silu"},
            "hidden_activation silu: llama.cpp's gemma3 computes gelu_pytorch_tanh",
        ),
        ("gemma3", {"sliding_window": None}, "config.json: no sliding_window"),
        (
            "gemma3",
            {"rope_parameters": {**GEMMA_ROPE, "sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            "rope_type linear of sliding layers",
        ),
        (
            "phi3-longrope",
            rope("longrope", **{**LONG, "long_factor": [1.0]}),
            "rope_factors_long: 1 factors, expected 16",
        ),
        (
            "phi3",
            rope("yarn", factor=2.0, original_max_position_embeddings=64),
            "carries rope_type default, longrope for",
        ),
        ("smollm3", {"no_rope_layers": [1, 0, 1, 0, 1]}, "no_rope_layers [1, 0, 1, 0, 1]: llama.cpp has every fourth"),
        ("smollm3", {"mlp_bias": True}, "mlp_bias True: llama.cpp's smollm3 computes False only"),
        ("olmo2", {"tie_word_embeddings": True}, "tie_word_embeddings True: llama.cpp's olmo2 computes False only"),
    ],
)
def test_models_that_llama_cpp_would_run_otherwise_are_refused_before_anything_is_written(
    tiny_model_dir: Path, tmp_path: Path, name: str, config: dict[str, Any], line: str
) -> None:
    checkpoint = fuse(one(name, tiny_model_dir, tmp_path), **config)
    with pytest.raises(LrqatError, match=r"^[^\n]*$") as refused:
        gguf.write(checkpoint, tmp_path / "new" / "x.gguf")
    assert line in str(refused.value)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("key", ["block_count", "attention.head_count", "attention.head_count_kv", "expert_count"])
@pytest.mark.parametrize("value", [0, 1, 3, 2**31])
def test_a_file_whose_numbers_contradict_its_tensors_is_one_line(
    tiny_model_dir: Path, tmp_path: Path, key: str, value: int
) -> None:
    path = gguf.write(fuse(one("mixtral", tiny_model_dir, tmp_path)), tmp_path / "x.gguf")
    data, name = bytearray(path.read_bytes()), f"llama.{key}".encode()
    at = data.index(name) + len(name) + 4
    data[at : at + 4] = value.to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(LrqatError, match=r"^[^\n]*x\.gguf[^\n]*$"):
        verify(fuse(tmp_path / "model"), gguf.read(path), path)
