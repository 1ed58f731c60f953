"""Low-rank quantization-aware training: from a Hugging Face model to fused integer weights."""
