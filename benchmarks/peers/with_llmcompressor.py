"""llm-compressor: GPTQ, or AWQ, as a compressed-tensors checkpoint (`weight_packed`, `weight_scale`).

The library's defaults (GPTQ: static activation order, dampening 0.01; AWQ: 20 grid points, duo scaling), its W4A16
scheme with another group size or number of bits. AWQ's own scheme is W4A16_ASYM: ask for w4g32-asym.
Calibration: the sizes of the library's examples are 512 x 2048 tokens (GPTQ) and 256 x 512 (AWQ).

    python benchmarks/peers/with_llmcompressor.py MODEL OUT --method gptq --grid w4g32 --text FILE...
"""

from __future__ import annotations

from importlib.metadata import version

import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from shared import Cost, Grid, blocks, finish, float32, fresh, parser, tensors
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer


def recipe(method: str, grid: Grid) -> list[GPTQModifier | AWQModifier | QuantizationModifier]:
    """Every linear layer but the head."""
    weights = QuantizationArgs(
        num_bits=grid.bits,
        type="int",
        symmetric=not grid.asymmetric,
        strategy="group" if grid.group else "channel",
        group_size=grid.group,
    )
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
    if method == "gptq":
        return [GPTQModifier(config_groups=groups, ignore=["lm_head"])]
    return [AWQModifier(), QuantizationModifier(config_groups=groups, ignore=["lm_head"])]


def dequantized(packed: dict[str, Tensor], grid: Grid) -> dict[str, Tensor]:
    """The checkpoint's tensors, each packed weight as s * (q - z) in float32."""
    found: dict[str, Tensor] = {}
    for name, value in packed.items():
        stem, _, part = name.rpartition(".")
        if not part.startswith("weight_"):
            found[name] = value
        if part != "weight_packed":
            continue
        rows, columns = packed[f"{stem}.weight_shape"].tolist()
        scales_OG = packed[f"{stem}.weight_scale"].float()
        # Codes and zeros both come back signed: the offset 2^(bits - 1) that packing adds is taken off.
        codes_OI = unpack_from_int32(value, grid.bits, torch.Size((rows, columns))).float()
        codes_OGI = codes_OI.unflatten(1, (scales_OG.shape[1], -1))
        if grid.asymmetric:
            zeros = packed[f"{stem}.weight_zero_point"]
            zeros_OG = unpack_from_int32(zeros, grid.bits, scales_OG.shape, packed_dim=0).float()
            codes_OGI = codes_OGI - zeros_OG[:, :, None]
        found[f"{stem}.weight"] = (scales_OG[:, :, None] * codes_OGI).flatten(1)
    return found


def main() -> None:
    """Quantize, and decode what was saved."""
    arguments = parser(__doc__ or "")
    arguments.add_argument("--method", choices=("gptq", "awq"), default="gptq")
    arguments.add_argument("--samples", type=int, default=512, help="calibration blocks (512)")
    arguments.add_argument("--seq-len", type=int, default=2048, help="tokens of each (2048)")
    float32(arguments)
    args = arguments.parse_args()
    out = fresh(args.out)
    if not torch.accelerator.is_available():  # AWQ pins memory for copies to one, and fails where there is none
        IntermediatesCache.pin_memory = lambda *_: None
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    ids = blocks(tokenizer, args.text, args.samples, args.seq_len)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
    own = model.dtype
    oneshot(
        model=model.float() if args.float32 else model,
        tokenizer=tokenizer,
        recipe=recipe(args.method, args.grid),
        dataset=Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()}),
        num_calibration_samples=args.samples,
        max_seq_length=args.seq_len,
    )
    model.to(own).save_pretrained(str(out / "packed"))  # finds the same codes again
    cost = Cost.so_far()
    weights = dequantized(tensors(out / "packed"), args.grid)
    finish(
        out,
        args.model,
        weights,
        cost,
        tool="llm-compressor",
        version=version("llmcompressor"),
        method=args.method,
        settings=f"{args.samples} x {args.seq_len} tokens{', float32' * args.float32}, all else default",
        **args.grid.account(weights),
    )


if __name__ == "__main__":
    main()
