"""Checkpoints that any layout writes and any other reads."""
