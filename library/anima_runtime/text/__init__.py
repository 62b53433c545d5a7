"""Captions on their way to the text context: tokenizers, Qwen3, caches."""
