"""What a run file can be for."""

from __future__ import annotations

from typing import Literal, get_args

Recipe = Literal["finetune", "lora", "pretrain", "audit"]
RECIPES: tuple[Recipe, ...] = get_args(Recipe)
