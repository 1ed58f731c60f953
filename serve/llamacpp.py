"""llama.cpp in this process, through the C API that xllamacpp's shared object exports.

xllamacpp is a Python wheel around llama.cpp's server; ctypes reaches the library below it (serve/llama_abi.py), and
with it what no HTTP endpoint gives: logits of every position, and an exact mode (float32 KV cache, no flash attention).

Refuses: files that are not whole, sequences longer than the context, token ids that the file does not have.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from ctypes import c_int32
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from lrqat.errors import LrqatError
from lrqat.gguf_file import GgufFile
from serve.llama_abi import FLASH_ATTENTION_OFF, GGML_F32, XLLAMACPP, forget_errors, last_errors, library

if TYPE_CHECKING:
    import numpy as np

LOGITS_BATCH = 512  # positions computed at once


class LlamaCpp:
    """A GGUF model in llama.cpp; a context manager, for one sequence at a time.

    Args:
        path: the GGUF file.
        n_ctx: positions that a sequence may have.
        threads: threads to compute with.
        exact: float32 KV cache and no flash attention, on the CPU: the setting in which an F32 file reproduces the
            Hugging Face model to float32 noise.
    """

    def __init__(self, path: Path, n_ctx: int = 2048, threads: int = 1, *, exact: bool = False) -> None:
        self._model = self._context = None
        self.path, self.n_ctx = Path(path), n_ctx
        _check_file(GgufFile(self.path))
        self._lib = library()
        model_params = self._lib.llama_model_default_params()
        if exact:
            model_params.n_gpu_layers = 0
        forget_errors()
        self._model = self._lib.llama_model_load_from_file(str(self.path).encode(), model_params)
        if not self._model:
            raise LrqatError(f"{path}: llama.cpp cannot load it: {last_errors()}")
        self._vocab = self._lib.llama_model_get_vocab(self._model)
        self.vocab_size = int(self._lib.llama_vocab_n_tokens(self._vocab))
        params = self._lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_outputs_max_per_seq = n_ctx, min(n_ctx, LOGITS_BATCH), 0
        params.n_threads = params.n_threads_batch = threads
        if exact:
            params.type_k = params.type_v = GGML_F32
            params.flash_attn_type = FLASH_ATTENTION_OFF
            params.offload_kqv = params.op_offload = False
        self._context = self._lib.llama_init_from_model(self._model, params)
        if not self._context:
            self.close()
            raise LrqatError(f"{path}: llama.cpp cannot make a context of {n_ctx} positions: {last_errors()}")

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Free the model."""
        if self._context:
            self._lib.llama_free(self._context)
        if self._model:
            self._lib.llama_model_free(self._model)
        self._context = self._model = None

    @property
    def build(self) -> str:
        """Versions of what computes."""
        llama, ggml = (getattr(self._lib, name)().decode() for name in ("llama_version", "ggml_version"))
        return f"llama.cpp {llama} (ggml {ggml}, xllamacpp {XLLAMACPP})"

    @property
    def eos(self) -> int:
        """The id that ends a text; -1 without one."""
        return int(self._lib.llama_vocab_eos(self._vocab))

    @property
    def chat_template(self) -> str | None:
        """Jinja that conversations are put through."""
        template = self._lib.llama_model_chat_template(self._model, None)
        return None if template is None else str(template.decode())

    def tokenize(self, text: str, add_special: bool) -> list[int]:
        """Token ids; special tokens in the text are recognized, as Hugging Face tokenizers do.

        Args:
            text: any string.
            add_special: put BOS and EOS where the model's tokenizer does.
        """
        data = text.encode()
        room = len(data) + 3  # at most a token a byte, a space in front, BOS and EOS
        tokens = (c_int32 * room)()
        count = self._lib.llama_tokenize(self._vocab, data, len(data), tokens, room, add_special, True)
        if count < 0:
            raise LrqatError(f"{self.path}: llama.cpp cannot tokenize the text: {last_errors()}")
        return list(tokens[:count])

    def logits(self, token_ids: Sequence[int]) -> np.ndarray:
        """Logits after every token of one sequence, float32 [T, V]."""
        import numpy as np

        self._check(token_ids, len(token_ids))
        self._clear()
        logits_TV = np.empty((len(token_ids), self.vocab_size), dtype=np.float32)
        for start in range(0, len(token_ids), LOGITS_BATCH):
            part = token_ids[start : start + LOGITS_BATCH]
            self._decode(part, start, all_logits=True)
            for row in range(len(part)):
                logits_TV[start + row] = self._row(row)
        return logits_TV

    def greedy(self, token_ids: Sequence[int], n: int) -> list[int]:
        """The `n` tokens that follow, each the likeliest; the end of the text is not looked for."""
        self._check(token_ids, len(token_ids) + n)
        self._clear()
        found: list[int] = []
        for start in range(0, len(token_ids), LOGITS_BATCH):
            self._decode(token_ids[start : start + LOGITS_BATCH], start, all_logits=False)
        while len(found) < n:
            found.append(int(self._row(-1).argmax()))
            if len(found) < n:
                self._decode(found[-1:], len(token_ids) + len(found) - 1, all_logits=False)
        return found

    def _check(self, token_ids: Sequence[int], positions: int) -> None:
        if self._context is None:
            raise LrqatError(f"{self.path}: the model was closed")
        if not token_ids or positions > self.n_ctx:
            raise LrqatError(f"{self.path}: {positions} positions, where n_ctx is {self.n_ctx}; use shorter text")
        if min(token_ids) < 0 or max(token_ids) >= self.vocab_size:
            raise LrqatError(
                f"{self.path}: token ids {min(token_ids)} to {max(token_ids)}, where the file has {self.vocab_size}"
            )

    def _clear(self) -> None:
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)

    def _decode(self, token_ids: Sequence[int], start: int, *, all_logits: bool) -> None:
        batch = self._lib.llama_batch_init(len(token_ids), 0, 1)
        try:
            batch.n_tokens = len(token_ids)
            for i, token in enumerate(token_ids):
                batch.token[i], batch.pos[i] = token, start + i
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
                batch.logits[i] = all_logits or i == len(token_ids) - 1
            forget_errors()
            if self._lib.llama_decode(self._context, batch):
                raise LrqatError(f"{self.path}: llama.cpp cannot compute position {start}: {last_errors()}")
        finally:
            self._lib.llama_batch_free(batch)

    def _row(self, index: int) -> np.ndarray:
        """llama.cpp's own logits of one output: copy before the next call."""
        import numpy as np

        pointer = self._lib.llama_get_logits_ith(self._context, index)
        if not pointer:
            raise LrqatError(f"{self.path}: llama.cpp gives no logits: {last_errors()}")
        return np.ctypeslib.as_array(pointer, shape=(self.vocab_size,))


def _check_file(file: GgufFile) -> None:
    """Refuse what makes llama.cpp abort, and this process with it, instead of giving an error.

    GgufFile refused most of 750 files with damaged headers; of those it let through, these alone aborted.
    """
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    tokens = tokens if isinstance(tokens, list) else []
    counts = Counter(str(token).partition("\0")[0] for token in tokens)  # C strings end at a NUL
    twice = next((token for token, count in counts.items() if count > 1 and token), None)
    if twice is not None:
        raise LrqatError(f"{file.path}: token {twice!r} occurs twice; export it again")
