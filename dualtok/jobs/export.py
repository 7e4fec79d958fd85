"""``dualtok export``: from a checkpoint of any layout to a Hugging Face folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dualtok.engine.checkpoint import find_checkpoint
from dualtok.engine.train import ADAPTER_FOLDER, CHECKPOINTS, RUN_FILE, START_FOLDER
from dualtok.errors import CheckpointError, ConfigError
from dualtok.files import atomic_folder, grant_as_umask_does, write_text
from dualtok.model.adapters import CONFIG_FILE, WEIGHTS_FILE, adapter_weights, write_adapter
from dualtok.model.load import DTYPES

if TYPE_CHECKING:
    from dualtok.engine.checkpoint_files import CheckpointReader

MODEL_FILES = ("config.json", "generation_config.json")
"""What an adapter's folder must not hold: transformers would take it for a whole model's."""
WEIGHTS_PATTERN = "model{suffix}.safetensors"


def export(
    run_dir: Path, target: Path, *, which: str = "best", precision: str = "fp32", shard_size: str = "900MB",
    merge: bool = False,
) -> Path:  # fmt: skip
    """Write a checkpoint's weights, config and tokenizer as a Hugging Face folder; for LoRA, a peft adapter folder.

    Args:
        run_dir: a run's ``output_dir``.
        target: folder to make; it appears only when complete.
        which: ``best``, ``latest`` or a checkpoint's tag.
        precision: ``fp32`` (the master weights) or ``bf16``.
        shard_size: largest weight file (a larger parameter has one to itself), and so the memory that is needed.
        merge: of a run with LoRA adapters, write the whole model with the adapters added to its weights.

    Returns:
        The folder.

    Raises:
        CheckpointError: no such complete checkpoint, or ``target`` exists.
        ConfigError: ``merge`` is asked of a run without adapters.
    """
    if target.exists():
        raise CheckpointError(f"{target}: exists already; remove it or choose another folder")
    saved = find_checkpoint(run_dir / CHECKPOINTS, which)
    start = run_dir / START_FOLDER
    if not (start / "config.json").is_file():
        raise CheckpointError(
            f"{start}: no model configuration beside the checkpoints; is {run_dir} a run's output_dir?"
        )
    adapter = start / ADAPTER_FOLDER if (start / ADAPTER_FOLDER).is_dir() else None
    if merge and adapter is None:
        raise ConfigError(f"--merge: has no effect, as {run_dir} trained the whole model (no model.lora)")
    with atomic_folder(target) as folder:
        for file in start.iterdir():
            weights_file = file.suffix in (".safetensors", ".bin") or file.name.endswith(".index.json")
            if file.is_file() and not weights_file and not (adapter is not None and file.name in MODEL_FILES):
                shutil.copyfile(file, folder / file.name)
        reader = saved.reader()
        if adapter is None:
            _write_weights(reader, folder, DTYPES[precision], shard_size)
            _set_dtype(folder / "config.json", precision)
        else:
            found = adapter_weights({name: reader.whole(name) for name in reader.parameters})
            write_adapter({name: value.to(DTYPES[precision]) for name, value in found.items()}, adapter, folder)
        if merge:
            _merge(folder, run_dir, DTYPES[precision], shard_size)
    return target


def _merge(folder: Path, run_dir: Path, dtype: torch.dtype, shard_size: str) -> None:
    """Turn an adapter's folder into one of the whole model; the base is read in float32, and held in memory."""
    import peft
    import yaml

    from dualtok.model.load import load_causal_lm

    run = yaml.safe_load((run_dir / RUN_FILE).read_text(encoding="utf-8"))
    trusted = bool(run["model"].get("trust_remote_code"))
    base = load_causal_lm(run["model"]["path"] or run_dir / START_FOLDER, trust_remote_code=trusted)
    merged = peft.PeftModel.from_pretrained(base, str(folder)).merge_and_unload(safe_merge=True)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        (folder / name).unlink()
    merged.config.use_cache = True
    merged.to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    for file in folder.glob("*.safetensors"):
        grant_as_umask_does(file)


def _write_weights(reader: CheckpointReader, folder: Path, dtype: torch.dtype, shard_size: str) -> None:
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    shapes = {name: torch.empty(entry.shape, dtype=dtype, device="meta") for name, entry in reader.parameters.items()}
    plan = split_torch_state_dict_into_shards(shapes, filename_pattern=WEIGHTS_PATTERN, max_shard_size=shard_size)
    for file, members in plan.filename_to_tensors.items():
        # One file's parameters at a time: memory is bounded by the larger of shard_size and the largest parameter.
        save_file({name: reader.whole(name).to(dtype) for name in members}, folder / file, metadata={"format": "pt"})
        grant_as_umask_does(folder / file)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        write_text(folder / "model.safetensors.index.json", json.dumps(index, indent=1, sort_keys=True))


def _set_dtype(path: Path, precision: str) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    config["dtype"] = str(DTYPES[precision]).removeprefix("torch.")
    write_text(path, json.dumps(config, indent=2, sort_keys=True) + "\n")
