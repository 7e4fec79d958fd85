"""``dualtok export``: from a DeepSpeed checkpoint of any ZeRO stage to a Hugging Face folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dualtok.engine.checkpoint import find_checkpoint
from dualtok.engine.train import CHECKPOINTS, START_FOLDER
from dualtok.errors import CheckpointError
from dualtok.files import sync_folder, write_text
from dualtok.model.load import DTYPES

if TYPE_CHECKING:
    from dualtok.engine.checkpoint import SavedCheckpoint

PREFIX = "causal_lm."
WEIGHTS_PATTERN = "model{suffix}.safetensors"


def export(
    run_dir: Path, target: Path, *, which: str = "best", precision: str = "fp32", shard_size: str = "4GB"
) -> Path:
    """Write a checkpoint's weights, config and tokenizer as a Hugging Face folder.

    Args:
        run_dir: a run's ``output_dir``.
        target: folder to make; it appears only when complete.
        which: ``best``, ``latest`` or a checkpoint's tag.
        precision: ``fp32`` (the master weights) or ``bf16``.
        shard_size: largest weight file.

    Returns:
        The folder.

    Raises:
        CheckpointError: no such complete checkpoint, or ``target`` exists.
    """
    if target.exists():
        raise CheckpointError(f"{target}: exists already; remove it or choose another folder")
    saved = find_checkpoint(run_dir / CHECKPOINTS, which)
    start = run_dir / START_FOLDER
    if not (start / "config.json").is_file():
        raise CheckpointError(
            f"{start}: no model configuration beside the checkpoints; is {run_dir} a run's output_dir?"
        )
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for file in start.iterdir():
        if file.is_file() and file.suffix not in (".safetensors", ".bin") and not file.name.endswith(".index.json"):
            shutil.copy2(file, temporary)
    _write_weights(_state_dict(saved), temporary, DTYPES[precision], shard_size, tied=_tied(start))
    _set_dtype(temporary / "config.json", precision)
    temporary.replace(target)
    sync_folder(target.parent)
    return target


def _state_dict(saved: SavedCheckpoint) -> dict[str, Any]:
    """Return the checkpoint's parameters under Hugging Face names; partitioned ones are still to be gathered."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    if saved.zero_stage == 0:
        path = saved.folder / "mp_rank_00_model_states.pt"
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=False)["module"]
    else:
        state = get_fp32_state_dict_from_zero_checkpoint(str(saved.folder.parent), tag=saved.tag, lazy_mode=True)
    return {name.removeprefix(PREFIX): value for name, value in state.items()}


def _tied(start: Path) -> set[str]:
    """Return the parameters that share another one's storage, which a Hugging Face folder holds only once."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(start)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    if not config.get_text_config().tie_word_embeddings:
        return set()
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return set(tied)


def _write_weights(state: dict[str, Any], folder: Path, dtype: torch.dtype, shard_size: str, tied: set[str]) -> None:
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    names = [name for name in state if name not in tied]
    shapes = {name: torch.empty(state[name].shape, dtype=dtype, device="meta") for name in names}
    plan = split_torch_state_dict_into_shards(shapes, filename_pattern=WEIGHTS_PATTERN, max_shard_size=shard_size)
    for file, members in plan.filename_to_tensors.items():
        # One file's parameters are gathered at a time: memory is bounded by shard_size, not by the model.
        tensors = {name: state[name].contiguous().to(dtype).clone() for name in members}
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        write_text(folder / "model.safetensors.index.json", json.dumps(index, indent=1, sort_keys=True))


def _set_dtype(path: Path, precision: str) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    config["dtype"] = str(DTYPES[precision]).removeprefix("torch.")
    write_text(path, json.dumps(config, indent=2, sort_keys=True) + "\n")
