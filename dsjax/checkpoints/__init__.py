"""Weights and tokenizers: GGUF, Hugging Face folders, orbax."""
