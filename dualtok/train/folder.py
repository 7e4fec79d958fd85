"""Names in a training run's ``output_dir``."""

from __future__ import annotations

RUN_FILE = "run.yaml"
START_FOLDER = "start"
ADAPTER_FOLDER = "adapter"
"""Folder within it that holds the settings of a run's LoRA adapters."""
FACTS_FILE = "facts.json"
CHECKPOINTS = "checkpoints"
