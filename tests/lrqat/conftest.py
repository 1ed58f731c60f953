"""Fixtures of the tests that train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """More tokens than the runs need."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"The {i}th row says that {i} and {i % 7} are numbers.\n" for i in range(300)))
    return path


@pytest.fixture(scope="session")
def large_model_dir(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    """A random Llama of 150 million weights in bfloat16: 300 MB, of which a linear layer is 8."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=9,
        num_attention_heads=8,
        tie_word_embeddings=True,
    )
    directory = tmp_path_factory.mktemp("large_model")
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.uniform_(-0.05, 0.05)
    model.tie_weights()
    model.save_pretrained(directory)
    tiny_tokenizer.save_pretrained(directory)
    return directory
