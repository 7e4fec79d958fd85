"""Engines that take a training step: DeepSpeed ZeRO, pipeline, DP-SGD."""
