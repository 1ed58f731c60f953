"""Low-rank quantization-aware training: from a Hugging Face model to fused integer weights."""

__version__ = "0.1.0"
