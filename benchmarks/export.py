"""How fast is an export, and how much memory does it take? One process per format, one JSON line at the end.

A Llama of two layers with random codes is written in every packed format: megabytes of output a second (the write
itself; reading codes from disk and syncing to it are shown apart), and peak memory beyond the open checkpoint, in
units of the largest tensor.

    python benchmarks/export.py [--hidden 2048] [--only q4_k,awq]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CASES = {  # name: (format, grid, options)
    "gptq-w4g32": ("gptq", "w4g32", {}),
    "gptq-w2g64": ("gptq", "w2g64", {}),
    "gptq-w3g64": ("gptq", "w3g64", {}),
    "gptq-w8": ("gptq", "w8", {}),
    "awq-w4g32-asym": ("awq", "w4g32-asym", {}),
    "ct-w4g32": ("compressed-tensors", "w4g32", {}),
    "ct-w4g32-asym": ("compressed-tensors", "w4g32-asym", {}),
    "ct-w3g64": ("compressed-tensors", "w3g64", {}),
    "ct-w8": ("compressed-tensors", "w8", {}),
    "ct-w8a8": ("compressed-tensors", "w8", {"activations": "int8"}),
    **{f"gguf-{name}": ("gguf", name, {}) for name in ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_0")},
    **{f"gguf-{name}": ("gguf", name, {}) for name in ("tq2_0", "iq4_nl", "mxfp4")},
    **{f"gguf-{name}": ("gguf", name, {}) for name in ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k")},
}
LAYERS = 2


def one(name: str, hidden: int) -> dict[str, Any]:
    """Write one case in this process."""
    import torch

    torch.set_num_threads(1)
    from exporters.formats import FORMATS
    from lrqat.fused import FusedCheckpoint, FusedSpec, FusedTensor, Lazy, Spec
    from lrqat.grid import Grid
    from lrqat.memory import keep_freed_memory

    keep_freed_memory()  # as every command does
    form, spelling, options = CASES[name]
    grid = Grid.parse(spelling)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64,
        "vocab_size": 512,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "dtype": "float16",
    }
    shapes = {"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (hidden, hidden)}
    shapes |= {"self_attn.v_proj": (hidden, hidden), "self_attn.o_proj": (hidden, hidden)}
    shapes |= {"mlp.gate_proj": (4 * hidden, hidden), "mlp.up_proj": (4 * hidden, hidden)}
    shapes |= {"mlp.down_proj": (hidden, 4 * hidden)}
    specs = {
        f"model.layers.{layer}.{leaf}.weight": FusedSpec(grid, shape)
        for layer in range(LAYERS)
        for leaf, shape in shapes.items()
    }
    made: dict[tuple[int, int], FusedTensor] = {}
    for shape in set(shapes.values()):  # one weight a shape: making codes is not what is measured
        codes = torch.randint(0, grid.codes, shape, dtype=torch.uint8)
        parts = {}
        for part, wire in grid.parts(*shape).items():
            if wire.low is None or wire.high is None:
                parts[part] = torch.rand(wire.shape) + 0.5
            else:
                parts[part] = torch.randint(max(wire.low, -30), min(wire.high, 30) + 1, wire.shape)
        made[shape] = FusedTensor.make(codes, parts, grid)
    norms = [
        f"model.layers.{i}.{n}.weight" for i in range(LAYERS) for n in ("input_layernorm", "post_attention_layernorm")
    ]
    dense = {name: torch.ones(hidden, dtype=torch.float16) for name in [*norms, "model.norm.weight"]}
    dense["model.embed_tokens.weight"] = torch.rand(512, hidden).half()
    checkpoint = FusedCheckpoint(
        tensors=Lazy(specs, lambda name: made[specs[name].shape]),
        dense=dense,
        specs=specs,
        dense_specs={name: Spec(t.dtype, tuple(t.shape)) for name, t in dense.items()},
        hf_config=config,
        assets={"tokenizer.json": tokenizer()},
    )
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / ("x.gguf" if form == "gguf" else "x")
        FORMATS[form].write(checkpoint, out, **options)  # warm up: imports, page cache
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        started, cpu = time.monotonic(), time.process_time()
        FORMATS[form].write(checkpoint, out, **options)
        cpu, wall = time.process_time() - cpu, time.monotonic() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        files = [out] if out.is_file() else list(out.glob("*.safetensors"))
        size = sum(file.stat().st_size for file in files)
    largest = max(t.codes_OI.nbytes for t in made.values())
    return {
        "MB": round(size / 1e6, 1),
        "MB_per_cpu_second": round(size / 1e6 / cpu),
        "MB_per_second": round(size / 1e6 / wall),
        "peak_MB": round(peak / 1e3),
        "grown_in_units_of_largest": round((peak - before) * 1024 / largest, 2),
    }


def tokenizer() -> bytes:
    """A byte-level BPE without merges, of 512 entries."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {
        token: index for index, token in enumerate([*alphabet, *(f"<{i}>" for i in range(512 - len(alphabet)))])
    }
    built = Tokenizer(models.BPE(vocabulary, []))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    text: str = built.to_str()
    return text.encode()


def main() -> None:
    """All cases, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=2048, help="width of the model (2048: 100 MB at 4 bits)")
    parser.add_argument("--only", help="some cases, by parts of their names, separated by commas")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(args.one, args.hidden)))
        return
    results = {}
    for name in CASES:
        if args.only and not any(part in name for part in args.only.split(",")):
            continue
        command = [sys.executable, __file__, "--one", name, "--hidden", str(args.hidden)]
        results[name] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        row = results[name]
        print(
            f"{name:16} {row['MB']:7.1f} MB  {row['MB_per_cpu_second']:5} MB per CPU second  "
            f"{row['MB_per_second']:5} MB/s  peak {row['peak_MB']} MB"
        )
    print(json.dumps({"benchmark": "export", "hidden": args.hidden, "results": results}))


if __name__ == "__main__":
    main()
