"""Hugging Face causal language models in and out, seen as one loss, or a few signals, per token."""
