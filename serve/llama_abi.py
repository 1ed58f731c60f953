"""llama.cpp's C interface, as xllamacpp's shared object exports it: structures, prototypes, the library itself.

C structures have no version of their own. So their layouts are pinned to one release of xllamacpp, and are compared
with the defaults that this very library returns before anything is called with them.

Source: ggml-org/llama.cpp include/llama.h; the pointer after `abort_callback_data` is newer than any public header that
was at hand: it is never read here, its place follows from the disassembly of llama_context_default_params.

Refuses: other releases of xllamacpp, other layouts.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Mapping
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int8, c_int32, c_size_t, c_uint32, c_void_p
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lrqat.errors import LrqatError

XLLAMACPP = "2026.10.11549"
INSTALL = "pip install 'lrqat[llamacpp]'"
GGML_F32, GGML_F16 = 0, 1
FLASH_ATTENTION_OFF = 0
LOG_WARN, LOG_ERROR, LOG_CONTINUED = 3, 4, 5  # ggml_log_level
ERROR_LINES = 4  # of llama.cpp's log that go into a message

LogCallback = ctypes.CFUNCTYPE(None, ctypes.c_int, c_char_p, c_void_p)


class ModelParams(ctypes.Structure):
    """llama_model_params."""

    _fields_ = (
        ("devices", c_void_p),
        ("tensor_buft_overrides", c_void_p),
        ("n_gpu_layers", c_int32),
        ("split_mode", c_int32),
        ("load_mode", c_int32),
        ("lazy_mode", c_int32),
        ("main_gpu", c_int32),
        ("tensor_split", c_void_p),
        ("progress_callback", c_void_p),
        ("progress_callback_user_data", c_void_p),
        ("kv_overrides", c_void_p),
        ("vocab_only", c_bool),
        ("check_tensors", c_bool),
        ("use_extra_bufts", c_bool),
        ("no_host", c_bool),
        ("no_alloc", c_bool),
        ("load_mtp", c_bool),
    )


class ContextParams(ctypes.Structure):
    """llama_context_params."""

    _fields_ = (
        ("n_ctx", c_uint32),
        ("n_batch", c_uint32),
        ("n_ubatch", c_uint32),
        ("n_seq_max", c_uint32),
        ("n_rs_seq", c_uint32),
        ("n_outputs_max", c_uint32),
        ("n_outputs_max_per_seq", c_uint32),
        ("n_threads", c_int32),
        ("n_threads_batch", c_int32),
        ("ctx_type", c_int32),
        ("rope_scaling_type", c_int32),
        ("pooling_type", c_int32),
        ("attention_type", c_int32),
        ("flash_attn_type", c_int32),
        ("rope_freq_base", c_float),
        ("rope_freq_scale", c_float),
        ("yarn_ext_factor", c_float),
        ("yarn_attn_factor", c_float),
        ("yarn_beta_fast", c_float),
        ("yarn_beta_slow", c_float),
        ("yarn_orig_ctx", c_uint32),
        ("defrag_thold", c_float),
        ("cb_eval", c_void_p),
        ("cb_eval_user_data", c_void_p),
        ("type_k", c_int32),
        ("type_v", c_int32),
        ("abort_callback", c_void_p),
        ("abort_callback_data", c_void_p),
        ("unnamed", c_void_p),
        ("embeddings", c_bool),
        ("offload_kqv", c_bool),
        ("no_perf", c_bool),
        ("op_offload", c_bool),
        ("swa_full", c_bool),
        ("kv_unified", c_bool),
        ("samplers", c_void_p),
        ("n_samplers", c_size_t),
        ("ctx_other", c_void_p),
    )


class Batch(ctypes.Structure):
    """llama_batch."""

    _fields_ = (
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", POINTER(c_float)),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    )


# The defaults that are not zero: what the library must return if the layouts above are its own.
MODEL_DEFAULTS = {"n_gpu_layers": -1, "split_mode": 1, "load_mode": -1, "lazy_mode": 1, "use_extra_bufts": True}
CONTEXT_DEFAULTS = {
    "n_ctx": 512,
    "n_batch": 2048,
    "n_ubatch": 512,
    "n_seq_max": 1,
    "n_outputs_max_per_seq": 1,
    "n_threads": 4,
    "n_threads_batch": 4,
    "rope_scaling_type": -1,
    "pooling_type": -1,
    "attention_type": -1,
    "flash_attn_type": -1,
    "yarn_ext_factor": -1.0,
    "yarn_attn_factor": -1.0,
    "yarn_beta_fast": -1.0,
    "yarn_beta_slow": -1.0,
    "defrag_thold": -1.0,
    "type_k": GGML_F16,
    "type_v": GGML_F16,
    "offload_kqv": True,
    "no_perf": True,
    "op_offload": True,
    "swa_full": True,
}

PROTOTYPES: dict[str, tuple[Any, list[Any]]] = {
    "llama_backend_init": (None, []),
    "llama_log_set": (None, [LogCallback, c_void_p]),
    "llama_version": (c_char_p, []),
    "ggml_version": (c_char_p, []),
    "llama_model_default_params": (ModelParams, []),
    "llama_context_default_params": (ContextParams, []),
    "llama_model_load_from_file": (c_void_p, [c_char_p, ModelParams]),
    "llama_model_free": (None, [c_void_p]),
    "llama_model_get_vocab": (c_void_p, [c_void_p]),
    "llama_model_n_ctx_train": (c_int32, [c_void_p]),
    "llama_model_chat_template": (c_char_p, [c_void_p, c_char_p]),
    "llama_vocab_n_tokens": (c_int32, [c_void_p]),
    "llama_vocab_eos": (c_int32, [c_void_p]),
    "llama_init_from_model": (c_void_p, [c_void_p, ContextParams]),
    "llama_free": (None, [c_void_p]),
    "llama_get_memory": (c_void_p, [c_void_p]),
    "llama_memory_clear": (None, [c_void_p, c_bool]),
    "llama_batch_init": (Batch, [c_int32, c_int32, c_int32]),
    "llama_batch_free": (None, [Batch]),
    "llama_decode": (c_int32, [c_void_p, Batch]),
    "llama_get_logits_ith": (POINTER(c_float), [c_void_p, c_int32]),
    "llama_tokenize": (c_int32, [c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool]),
}

_log: deque[str] = deque(maxlen=ERROR_LINES)


def check_xllamacpp() -> None:
    """Refuse another release of xllamacpp than the one that is known."""
    try:
        installed = version("xllamacpp")
    except PackageNotFoundError:
        raise LrqatError(f"llama.cpp: the package xllamacpp is missing; {INSTALL}") from None
    if installed != XLLAMACPP:
        raise LrqatError(f"llama.cpp: xllamacpp {installed} is installed, lrqat knows {XLLAMACPP} only; {INSTALL}")


@cache
def library() -> ctypes.CDLL:
    """llama.cpp's library with checked layouts, silent."""
    check_xllamacpp()
    lib = ctypes.CDLL(str(_shared_object()))
    for name, (result, arguments) in PROTOTYPES.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    lib.llama_log_set(_keep_log, None)
    check_layout(lib.llama_model_default_params(), MODEL_DEFAULTS)
    check_layout(lib.llama_context_default_params(), CONTEXT_DEFAULTS)
    lib.llama_backend_init()
    return lib


def _shared_object() -> Path:
    spec = find_spec("xllamacpp")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
    for folder in folders:
        for suffix in ("so", "pyd"):
            if found := sorted(folder.glob(f"xllamacpp*.{suffix}")):
                return found[0]
    raise LrqatError(f"llama.cpp: xllamacpp has no shared object; {INSTALL}")


def check_layout(params: ctypes.Structure, defaults: Mapping[str, float]) -> None:
    """Refuse structures whose default values are not the expected ones: their fields lie elsewhere."""
    for name in (field[0] for field in params._fields_):
        value = getattr(params, name) or 0
        if value != defaults.get(name, 0):
            raise LrqatError(
                f"llama.cpp: {type(params).__name__}.{name} is {value} by default, expected {defaults.get(name, 0)}: "
                f"this build's structures are others; {INSTALL}"
            )


@LogCallback
def _keep_log(level: int, text: bytes, _: int) -> None:
    """Keep warnings and errors for messages; say nothing."""
    line = text.decode(errors="replace").strip()
    if level in (LOG_WARN, LOG_ERROR) and line:
        _log.append(line)
    elif level == LOG_CONTINUED and _log and line:
        _log[-1] += " " + line


def forget_errors() -> None:
    """Start a new message."""
    _log.clear()


def last_errors() -> str:
    """The last warnings and errors of llama.cpp, in one line."""
    return " | ".join(_log) or "it gave no reason"
