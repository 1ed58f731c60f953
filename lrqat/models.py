"""Load a base model: a Hugging Face directory, a hub id, or a GGUF file.

Only safetensors and GGUF are read, and no remote code is run. Everything that can be refused is refused from
headers, before weights are loaded.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from lrqat.errors import LrqatError
from lrqat.fused import (
    FusedCheckpoint,
    SafetensorsDirectory,
    fresh_directory,
    read_assets,
    read_json,
    write_json,
)
from lrqat.gguf_file import GgufFile
from lrqat.hashing import sha256
from lrqat.layers import dense_tensors
from lrqat.pretokenizers import restore
from lrqat.safestream import Entry, write_model
from lrqat.sites import checkpoint_tensors

HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt"]
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True)
class Base:
    """A base model, located and checked but not yet loaded.

    Attributes:
        source: what the user named.
        path: the directory or the GGUF file.
        files: the weight files.
    """

    source: str
    path: Path
    files: tuple[Path, ...]

    @property
    def is_gguf(self) -> bool:
        """The weights are in one GGUF file."""
        return self.path.is_file()

    def pretrained(self) -> tuple[str, dict[str, Any]]:
        """Arguments of `from_pretrained` that name the model."""
        if self.is_gguf:
            return str(self.path.parent), {"gguf_file": self.path.name, "trust_remote_code": False}
        return str(self.path), {"trust_remote_code": False}

    def model(self, dtype: torch.dtype) -> Any:
        """The transformers model, in evaluation mode."""
        from transformers import AutoModelForCausalLM, GgufConfig
        from transformers.utils import logging

        if not sys.stderr.isatty():
            logging.disable_progress_bar()
        where, options = self.pretrained()
        if self.is_gguf:
            options["quantization_config"] = GgufConfig(dequantize=True)
            options["config"] = build_config(self.config, self.source)
        else:
            options["use_safetensors"] = True
        try:
            model, report = AutoModelForCausalLM.from_pretrained(
                where, dtype=dtype, output_loading_info=True, **options
            )
        except (ValueError, KeyError, OSError, RuntimeError) as error:
            raise LrqatError(f"{self.source}: transformers cannot load it: {first_line(error)}") from None
        if missing := sorted(report["missing_keys"]):
            raise LrqatError(
                f"{self.source}: {len(missing)} weights of {type(model).__name__} are not in it, the first is "
                f"{missing[0]}; is config.json another model's?"
            )
        model._weight_conversions = None  # names are the architecture's, whatever this file's were
        return model.eval()

    @cached_property
    def tokenizer(self) -> Any:
        """The transformers tokenizer."""
        from transformers import AutoTokenizer

        where, options = self.pretrained()
        try:
            tokenizer = AutoTokenizer.from_pretrained(where, **options)
        except (ValueError, KeyError, OSError) as error:
            raise LrqatError(f"{self.source}: transformers cannot load its tokenizer: {first_line(error)}") from None
        if self.is_gguf and (name := GgufFile(self.path).metadata.get("tokenizer.ggml.pre")) not in (None, "default"):
            restore(tokenizer, str(name))
        return tokenizer

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json; of a GGUF file, as transformers reads its metadata."""
        if not self.is_gguf:
            return read_json(self.path / "config.json")
        from transformers import AutoConfig
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        where, options = self.pretrained()
        try:
            config = AutoConfig.from_pretrained(where, **options)
        except (ValueError, KeyError, OSError) as error:
            raise LrqatError(f"{self.source}: transformers cannot read it: {first_line(error)}") from None
        content: dict[str, Any] = json.loads(config.to_json_string(use_diff=True))
        content = {k: v for k, v in content.items() if k != "quantization_config" and not k.startswith("_")}
        content["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[content["model_type"]]]
        return content

    @cached_property
    def assets(self) -> dict[str, bytes]:
        """Tokenizer, chat template and generation files, as they came; of a GGUF file, as transformers writes them."""
        if not self.is_gguf:
            return read_assets(self.path)
        from transformers import GenerationConfig

        with tempfile.TemporaryDirectory() as folder:
            self.tokenizer.save_pretrained(folder)
            GenerationConfig.from_model_config(build_config(self.config, self.source)).save_pretrained(folder)
            return read_assets(Path(folder))

    def skeleton(self, dtype: torch.dtype | None = None) -> Any:
        """The model without weights (on the meta device): its modules and their shapes."""
        from transformers import AutoModelForCausalLM

        try:
            with torch.device("meta"):
                return AutoModelForCausalLM.from_config(build_config(self.config, self.source), dtype=dtype)
        except (ValueError, KeyError) as error:
            raise LrqatError(f"{self.source}: no causal language model: {first_line(error)}") from None

    def sha256(self) -> str:
        """Hash over the weight files' bytes, in the order of their names."""
        return sha256(self.files)


def save_directory(base: Base, directory: Path, dtype: torch.dtype) -> Path:
    """The base model as a Hugging Face directory, for a GGUF file that is to be loaded more than once."""
    dense = dense_tensors(base.model(dtype))
    entries = [Entry(name, t.dtype, tuple(t.shape), partial(dense.__getitem__, name)) for name, t in dense.items()]
    with fresh_directory(directory) as fresh:
        write_model(fresh, entries, {"format": "pt"})
        for name, content in base.assets.items():
            (fresh / name).write_bytes(content)
        write_json(fresh / "config.json", {**base.config, "dtype": str(dtype).removeprefix("torch.")})
    return directory


def locate(source: str) -> Base:
    """Find a model and check its files' headers; hub ids are downloaded (safetensors only).

    Raises:
        LrqatError: no such path, no safetensors weights, a truncated file, no tokenizer, no config.
    """
    path = Path(source).expanduser()
    if path.is_file():
        GgufFile(path)  # refuses what is not a whole GGUF file
        return Base(source, path, (path,))
    if not path.is_dir():
        path = _download(source)
    if not (path / "config.json").is_file():
        raise LrqatError(f"{source}: no config.json; expected a Hugging Face model directory")
    if not any((path / name).is_file() for name in TOKENIZERS):
        raise LrqatError(
            f"{source}: no tokenizer ({' or '.join(TOKENIZERS)}); copy the base model's tokenizer files into it"
        )
    if (quantized := read_json(path / "config.json").get("quantization_config")) is not None:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        raise LrqatError(f"{source}: is quantized already ({method}); start from the full-precision model")
    files = SafetensorsDirectory(path)
    return Base(source, path, tuple(files.paths))


def _download(source: str) -> Path:
    if source.count("/") != 1 or source.startswith((".", "/", "~")) or source.endswith("/"):
        raise LrqatError(f"{source}: no such file or directory")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=HUB_FILES))
    except Exception as error:  # the hub client raises whatever its HTTP library raises
        raise LrqatError(f"{source}: no such directory, and the hub does not give it ({first_line(error)})") from None


def first_line(error: BaseException) -> str:
    """The first line of an error's text, for messages of one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def build_config(content: dict[str, Any], source: str) -> Any:
    """The transformers configuration of a config.json."""
    from transformers import AutoConfig

    options = {key: value for key, value in content.items() if key != "model_type"}
    if "model_type" not in content:
        raise LrqatError(f"{source}: config.json has no model_type; expected a Hugging Face model's configuration")
    try:
        return AutoConfig.for_model(content["model_type"], **options)
    except Exception as error:  # every configuration class validates in its own way
        reason = " ".join(str(error).split())
        raise LrqatError(f"{source}: no model that transformers can configure: {reason}") from None


def fake_quant_model(checkpoint: FusedCheckpoint, dtype: torch.dtype = torch.float32) -> Any:
    """The transformers model that holds the dequantized weights: the reference of every parity check."""
    from transformers import AutoModelForCausalLM

    config = build_config(checkpoint.hf_config, "fused checkpoint")
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).requires_grad_(False)
    for name, target in checkpoint_tensors(model).items():
        if name in checkpoint.tensors:
            target.copy_(checkpoint.tensors[name].dequantize())
        elif name in checkpoint.dense:
            target.copy_(checkpoint.dense[name])
        elif not (checkpoint.tied_head and name == "lm_head.weight"):
            raise LrqatError(f"fused checkpoint: {name} is missing, which {checkpoint.hf_config['model_type']} needs")
    model.tie_weights()
    return model.eval()


def fused_tokenizer(checkpoint: FusedCheckpoint) -> Any:
    """The transformers tokenizer of a fused checkpoint."""
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        checkpoint.write_assets(Path(folder))
        try:
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except (ValueError, KeyError, OSError) as error:
            raise LrqatError(f"fused checkpoint: its tokenizer cannot be loaded: {first_line(error)}") from None
