"""vLLM against Hugging Face on the weights that were trained; `vllm` tests need vLLM in this very environment."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from exporters import gptq
from lrqat.errors import LrqatError
from lrqat.fused import FusedCheckpoint, FusedSpec, FusedTensor, Spec
from lrqat.grid import Grid
from serve import vllm_logprobs

# Mean KL(HF in float32 || vLLM in float16) of the model below: measured 6.5e-6 (w4g32) and 7.2e-6 (w4), the
# rounding of activations and logits to 11 bits. 16 rows x 32 columns with the wrong sign in one layer: 4.5e-2.
MAX_KL = 3e-5
MIN_KL_OF_OTHER_WEIGHTS = 100 * MAX_KL
TOKENS = 96


def tiny_llama() -> "torch.nn.Module":
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,  # GQA: q, k and v differ in height
        head_dim=64,
        max_position_embeddings=256,
        initializer_range=0.1,  # peaked distributions, as a trained model has
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
    )
    return LlamaForCausalLM(config).float().eval()


def quantize(model: "torch.nn.Module", grid: Grid, dense_leaf: str = "") -> FusedCheckpoint:
    """Round to nearest; every second group has a negative scale, its codes mirrored."""
    tensors, dense = {}, {}
    for name, parameter in model.named_parameters():
        weight = parameter.detach()
        if "proj" not in name or (dense_leaf and dense_leaf in name):
            dense[name] = weight
            continue
        rows, columns = weight.shape
        groups = weight.view(rows, -1, grid.columns_per_group(columns))
        top = grid.midpoint - 1
        scales_OG = grid.to_wire(groups.abs().amax(-1) / top)
        scales_OG[:, ::2] *= -1
        codes = (groups / scales_OG[:, :, None]).round().clamp(-top, top) + grid.midpoint
        tensors[name] = FusedTensor(codes.to(torch.uint8).view(rows, columns), scales_OG.half(), None, grid)
    return FusedCheckpoint(
        tensors,
        dense,
        {name: FusedSpec(grid, tuple(t.codes_OI.shape)) for name, t in tensors.items()},
        {name: Spec(t.dtype, tuple(t.shape)) for name, t in dense.items()},
        model.config.to_dict(),
        {},
    )


def logprobs_TV(model: "torch.nn.Module", weights: dict[str, Tensor], tokens: list[int]) -> Tensor:
    model.load_state_dict(weights, strict=False)
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)


def mean_kl(reference_TV: Tensor, other_TV: Tensor) -> float:
    return (reference_TV.exp() * (reference_TV - other_TV)).sum(-1).mean().item()


@pytest.mark.vllm
@pytest.mark.parametrize(("grid", "dense_leaf"), [("w4g32", ""), ("w4", "layers.1.mlp.down_proj")])
def test_vllm_serves_the_weights_that_were_trained(tmp_path: Path, grid: str, dense_leaf: str) -> None:
    model = tiny_llama()
    fused = quantize(model, Grid.parse(grid), dense_leaf)
    assert gptq.vllm_limits(fused) is None
    out = gptq.write(fused, tmp_path / "exported")
    tokens = torch.randint(0, 512, (TOKENS,), generator=torch.Generator().manual_seed(0)).tolist()

    served = vllm_logprobs.run(out, [tokens, tokens[:3]], tmp_path / "work")

    ours_TV = torch.from_numpy(served.logprobs_TV(0).copy())
    weights = dict(gptq.read(out))
    reference_TV = logprobs_TV(model, weights, tokens)
    assert mean_kl(reference_TV, ours_TV) <= MAX_KL
    assert served.logprobs_TV(1).shape == (2, 512)
    assert served.version and served.device in ("cpu", "cuda")

    name = "model.layers.0.mlp.up_proj.weight"
    others = {**weights, name: weights[name].clone()}
    others[name][:16, :32] *= -1
    assert mean_kl(logprobs_TV(model, others, tokens), ours_TV) >= MIN_KL_OF_OTHER_WEIGHTS


@pytest.mark.vllm
def test_vllm_certifies_a_gptq_directory_and_both_controls_speak(trained_model_dir: Path, tmp_path: Path) -> None:
    from lrqat.models import locate
    from lrqat.ptq import quantize as round_to_nearest
    from serve.parity import certify, runtime_for

    fused = round_to_nearest(locate(str(trained_model_dir)), Grid.parse("w4g32"), 3.5, (), torch.bfloat16, tmp_path)
    out = gptq.write(FusedCheckpoint.load(fused), tmp_path / "exported")
    runtime = runtime_for(out, None, threads=1, python=sys.executable, dtype="float16")

    certificate = certify(fused, out, runtime, texts=[], count=2, length=192, controls=True)

    assert certificate["verdict"] == "pass"
    assert certificate["weights"] == {"equal": 14, "total": 14, "differing": []}
    assert certificate["controls"]["positive"]["passed"]
    assert not certificate["controls"]["negative"]["passed"]


@pytest.mark.vllm
def test_what_vllm_refuses_arrives_as_one_line(tmp_path: Path) -> None:
    out = gptq.write(quantize(tiny_llama(), Grid.parse("w3g32")), tmp_path / "exported")
    with pytest.raises(LrqatError, match=r"Unsupported quantization config: bits=3, sym=True") as caught:
        vllm_logprobs.run(out, [[1, 2, 3]], tmp_path / "work")
    assert "\n" not in str(caught.value)


def interpreter(tmp_path: Path, says: str, status: int = 1) -> Path:
    path = tmp_path / "python"
    path.write_text(f"#!/bin/sh\ncat <<'EOF'\n{says}\nEOF\nexit {status}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("says", "line"),
    [
        ("ModuleNotFoundError: No module named 'vllm'", "has no vLLM; `pip install vllm`"),
        ("INFO fine\n(EngineCore pid=1) ERROR [core.py:1] ValueError: no kernel\nbye", "ValueError: no kernel"),
        ("  assert k % 2 == 0\nAssertionError", "status 1: AssertionError"),
        (
            "ValidationError: 1 validation error\n  Value error, Unsupported\n    For more",
            "error Value error, Unsupported;",
        ),
        ("killed for lack of memory", "status 1: killed for lack of memory"),
        ("", "status 1: no output"),
    ],
)
def test_a_crash_of_vllm_becomes_the_line_that_says_why(tmp_path: Path, says: str, line: str) -> None:
    with pytest.raises(LrqatError) as caught:
        vllm_logprobs.run(tmp_path, [[1, 2, 3]], tmp_path / "work", python=interpreter(tmp_path, says))
    assert line in str(caught.value) and "\n" not in str(caught.value)


def test_an_interpreter_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(LrqatError, match="nowhere: No such file or directory; give --python"):
        vllm_logprobs.run(tmp_path, [[1, 2, 3]], tmp_path / "work", python="nowhere")


@pytest.mark.parametrize("sequences", [[], [[1, 2, 3], [1, 2]]])
def test_prompts_below_three_tokens_are_refused(tmp_path: Path, sequences: list[list[int]]) -> None:
    with pytest.raises(LrqatError, match="under 3 tokens"):
        vllm_logprobs.run(tmp_path, sequences, tmp_path / "work")
