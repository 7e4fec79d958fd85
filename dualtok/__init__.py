"""dualtok: train language models on private text, and measure what they give away about it."""

__version__ = "0.2.0"
