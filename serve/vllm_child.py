"""Runs inside vLLM's own environment, as a script: the log-probabilities of every token of given prompts.

    python vllm_child.py JOB.json       {"model", "dtype", "sequences": [[id, ...], ...], "out"}

writes OUT/0000.npy, ... float32 [T - 1, V] (row t: distribution of token t + 1) and OUT/result.json, which also names
the classes that vLLM has chosen for the linear layers.

vLLM can return the full vocabulary itself (prompt_logprobs=-1), at 5.7 GB and 11 s for 512 tokens of a 49k
vocabulary: Python lists of 25 million floats. Instead `compute_logits`, which every vLLM model has, is
listened to while vLLM computes prompt_logprobs=1 (3.6 s, 0.1 GB); what it says of the tokens themselves
must agree with what was heard. Imports nothing of this project, which need not be installed here.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process, so that the model can be reached
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_INT4_W4A8": "0",  # with AMX the default rounds activations to 8 bits
    "VLLM_NO_USAGE_STATS": "1",
    "TORCH_COMPILE_DISABLE": "1",  # 40 s for one helper of prompt_logprobs
    "HF_HUB_OFFLINE": "1",
}
AGREEMENT = 1e-3  # float32 log-softmax here and in vLLM, of the same logits


def main(argv: list[str]) -> int:
    """Do the job that argv[0] describes."""
    os.environ.update(ENVIRONMENT)
    import numpy as np
    import vllm

    job = json.loads(Path(argv[0]).read_text(encoding="utf-8"))
    out = Path(job["out"])
    longest = max(map(len, job["sequences"]))
    llm = vllm.LLM(
        job["model"],
        dtype=job["dtype"],
        enforce_eager=True,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        max_model_len=longest + 1,
        max_num_batched_tokens=longest + 1,  # a prompt is never cut, so its logits come at once
        max_num_seqs=1,
    )
    heard: list[Any] = []
    llm.apply_model(lambda model: _listen(model, heard))
    sampling = vllm.SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1, detokenize=False)
    for index, sequence in enumerate(job["sequences"]):
        heard.clear()
        [output] = llm.generate([{"prompt_token_ids": sequence}], sampling, use_tqdm=False)
        [logits_TV] = [logits for logits in heard if len(logits) == len(sequence) - 1]
        logprobs_TV = logits_TV.log_softmax(-1)
        for t, token in enumerate(sequence[1:]):
            told = output.prompt_logprobs[t + 1][token].logprob
            if abs(told - float(logprobs_TV[t, token])) > AGREEMENT:
                raise RuntimeError(f"vLLM reports log-probability {told} at {t}, its logits {logprobs_TV[t, token]}")
        np.save(out / f"{index:04d}.npy", logprobs_TV.numpy())
        print(f"sequence {index + 1} of {len(job['sequences'])}", flush=True)
    [schemes] = llm.apply_model(_schemes)
    result = {
        "vllm": vllm.__version__,
        "device": vllm.platforms.current_platform.device_type,
        "schemes": schemes,
    }
    (out / "result.json").write_text(json.dumps(result), encoding="utf-8")
    return 0


def _schemes(model: Any) -> list[str]:
    """What computes the linear layers: compressed-tensors' schemes, else the quantization methods."""
    from vllm.model_executor.layers.linear import LinearBase

    linears = [module for module in model.modules() if isinstance(module, LinearBase)]
    chosen = (getattr(linear, "scheme", None) or linear.quant_method for linear in linears)
    return sorted({type(scheme).__name__ for scheme in chosen})


def _listen(model: Any, heard: list[Any]) -> None:
    compute = model.compute_logits

    def listening(*args: Any, **kwargs: Any) -> Any:
        logits = compute(*args, **kwargs)
        heard.append(logits.float().cpu())
        return logits

    model.compute_logits = listening


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
