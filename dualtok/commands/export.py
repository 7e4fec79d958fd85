"""``dualtok export``: from a checkpoint of any layout to a Hugging Face folder."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import torch
import yaml

from dualtok.commands.model_card import write_card
from dualtok.errors import CheckpointError, ConfigError
from dualtok.files import atomic_folder
from dualtok.model.adapters import CONFIG_FILE, WEIGHTS_FILE, adapter_weights, write_adapter
from dualtok.model.folder.save import write_config, write_weights
from dualtok.model.load import DTYPES, load_causal_lm, read_model_config
from dualtok.train.checkpoints.writer import find_checkpoint
from dualtok.train.folder import ADAPTER_FOLDER, CHECKPOINTS, FACTS_FILE, RUN_FILE, START_FOLDER

if TYPE_CHECKING:
    from pathlib import Path

# Imported where they are used, for what they take to load: peft (3 s).

MODEL_FILES = ("config.json", "generation_config.json")
"""What an adapter's folder must not hold: transformers would take it for a whole model's."""


def export(
    run_dir: Path,
    target: Path,
    *,
    which: str = "best",
    precision: str = "fp32",
    shard_size: str = "900MB",
    merge: bool = False,
) -> Path:
    """Write a checkpoint's weights, config and tokenizer as a Hugging Face folder; adapters as a folder of peft's.

    Args:
        run_dir: a run's ``output_dir``.
        target: folder to make; it appears only when complete.
        which: ``best``, ``latest`` or a checkpoint's tag.
        precision: ``fp32`` (the master weights) or ``bf16``.
        shard_size: largest weight file (a larger parameter has one to itself), and so the memory that is needed.
        merge: of a run with adapters, write the whole model with the adapters merged into its weights.

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
        raise ConfigError(f"--merge: has no effect, as {run_dir} trained the whole model (no model.lora or model.ia3)")
    run = yaml.safe_load((run_dir / RUN_FILE).read_text(encoding="utf-8"))
    with atomic_folder(target) as folder:
        for file in start.iterdir():
            weights_file = file.suffix in (".safetensors", ".bin") or file.name.endswith(".index.json")
            left_out = weights_file or file.name == FACTS_FILE or (adapter is not None and file.name in MODEL_FILES)
            if file.is_file() and not left_out:
                shutil.copyfile(file, folder / file.name)
        # Not through DeepSpeed's zero_to_fp32: what ZeRO-1 saves with bf16 weights and fp32 accumulation
        # (BF16_Optimizer, 0.19.8) it calls "not a zero checkpoint".
        reader = saved.reader()
        if adapter is None:
            config = read_model_config(start, trust_remote_code=bool(run["model"].get("trust_remote_code")))
            shapes = {name: torch.Size(entry.shape) for name, entry in reader.parameters.items()}
            write_weights(config, shapes, reader.whole, folder, dtype=DTYPES[precision], shard_size=shard_size)
            _set_dtype(folder, precision)
        else:
            state = {name: reader.whole(name) for name in reader.parameters}
            found = adapter_weights(state, norms=trained_norms(adapter))
            write_adapter({name: value.to(DTYPES[precision]) for name, value in found.items()}, adapter, folder)
        if merge:
            _merge(folder, run, run_dir, precision, shard_size)
        write_card(run_dir, run, saved.manifest.step, folder, adapter=adapter is not None and not merge)
    return target


def trained_norms(settings: Path) -> list[str]:
    """Return the last parts of the names of the normalization layers that a folder's adapter has trained."""
    content = json.loads((settings / CONFIG_FILE).read_text(encoding="utf-8"))
    return list(content.get("modules_to_save") or ())


def _merge(folder: Path, run: dict[str, Any], run_dir: Path, precision: str, shard_size: str) -> None:
    """Turn an adapter's folder into one of the whole model; the base is read in float32, and held in memory."""
    import peft

    trusted = bool(run["model"].get("trust_remote_code"))
    base = load_causal_lm(run["model"]["path"] or run_dir / START_FOLDER, trust_remote_code=trusted)
    merged = peft.PeftModel.from_pretrained(base, str(folder)).merge_and_unload(safe_merge=True)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        (folder / name).unlink()
    weights = dict(merged.named_parameters())
    shapes = {name: weight.shape for name, weight in weights.items()}
    write_weights(
        merged.config,
        shapes,
        lambda name: weights[name].detach(),
        folder,
        dtype=DTYPES[precision],
        shard_size=shard_size,
    )
    for name in MODEL_FILES:
        if (run_dir / START_FOLDER / name).is_file():
            shutil.copyfile(run_dir / START_FOLDER / name, folder / name)
    # DP-SGD gives the head a weight of its own, which no adapter changes: the whole model is tied as its base is.
    _set_dtype(folder, precision, tied=base.config.tie_word_embeddings)


def _set_dtype(folder: Path, precision: str, *, tied: bool | None = None) -> None:
    """Note the precision of the weights in a model's config.json, and, where it is given, whether they are tied."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)  # its older name
    for part in (config, config.get("text_config")):
        if tied is not None and isinstance(part, dict) and "tie_word_embeddings" in part:
            part["tie_word_embeddings"] = tied
    write_config({**config, "dtype": str(DTYPES[precision]).removeprefix("torch.")}, folder)
