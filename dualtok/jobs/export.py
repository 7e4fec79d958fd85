"""``dualtok export``: from a DeepSpeed checkpoint of any ZeRO stage to a Hugging Face folder."""

from __future__ import annotations

import json
import re
import shutil
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

from dualtok.engine.checkpoint import STAGES_FILE, find_checkpoint
from dualtok.engine.train import ADAPTER_FOLDER, CHECKPOINTS, RUN_FILE, START_FOLDER
from dualtok.errors import CheckpointError, ConfigError
from dualtok.files import sync_folder, write_text
from dualtok.model.adapters import CONFIG_FILE, WEIGHTS_FILE, adapter_weights, write_adapter
from dualtok.model.load import DTYPES, read_model_config
from dualtok.model.stages import StageNames, empty_causal_lm, tied_weights

if TYPE_CHECKING:
    from dualtok.engine.checkpoint import SavedCheckpoint

PREFIX = "causal_lm."
MODEL_STATES = "mp_rank_00_model_states.pt"
OPTIMIZER_STATES = "*zero_pp_rank_*_optim_states.pt"
MODEL_FILES = ("config.json", "generation_config.json")
"""What an adapter's folder must not hold: transformers would take it for a whole model's."""
WEIGHTS_PATTERN = "model{suffix}.safetensors"


def export(
    run_dir: Path, target: Path, *, which: str = "best", precision: str = "fp32", shard_size: str = "4GB",
    merge: bool = False,
) -> Path:  # fmt: skip
    """Write a checkpoint's weights, config and tokenizer as a Hugging Face folder; for LoRA, a peft adapter folder.

    Args:
        run_dir: a run's ``output_dir``.
        target: folder to make; it appears only when complete.
        which: ``best``, ``latest`` or a checkpoint's tag.
        precision: ``fp32`` (the master weights) or ``bf16``.
        shard_size: largest weight file.
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
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for file in start.iterdir():
        weights_file = file.suffix in (".safetensors", ".bin") or file.name.endswith(".index.json")
        if file.is_file() and not weights_file and not (adapter is not None and file.name in MODEL_FILES):
            shutil.copy2(file, temporary)
    with TemporaryDirectory() as scratch:
        state = _state_dict(saved, Path(scratch))
        if adapter is None:
            tied = tied_weights(empty_causal_lm(read_model_config(start), "eager"))  # a folder holds them once
            _write_weights(state, temporary, DTYPES[precision], shard_size, tied=set(tied))
            _set_dtype(temporary / "config.json", precision)
        else:
            found = adapter_weights(state)
            weights = {name: value.contiguous().to(DTYPES[precision]) for name, value in found.items()}
            write_adapter(weights, adapter, temporary)
    if merge:
        _merge(temporary, run_dir, DTYPES[precision], shard_size)
    temporary.replace(target)
    sync_folder(target.parent)
    return target


def _merge(folder: Path, run_dir: Path, dtype: torch.dtype, shard_size: str) -> None:
    """Turn an adapter's folder into one of the whole model; the base is read in float32, and held in memory."""
    import peft
    import yaml

    from dualtok.model.load import load_causal_lm

    run = yaml.safe_load((run_dir / RUN_FILE).read_text(encoding="utf-8"))
    base = load_causal_lm(run["model"]["path"] or run_dir / START_FOLDER)
    merged = peft.PeftModel.from_pretrained(base, str(folder)).merge_and_unload(safe_merge=True)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        (folder / name).unlink()
    merged.config.use_cache = True
    merged.to(dtype).save_pretrained(folder, max_shard_size=shard_size)


def _state_dict(saved: SavedCheckpoint, scratch: Path) -> dict[str, Any]:
    """Return the checkpoint's parameters under Hugging Face names; partitioned ones are still to be gathered.

    Args:
        saved: the checkpoint.
        scratch: an empty folder for views of it, to be kept until the parameters are gathered.
    """
    if saved.stages == 1:
        state = _stage_state_dict(saved.folder, saved.zero_stage)
        return {name.removeprefix(PREFIX): value for name, value in state.items()}
    names = _stage_names(saved.folder / STAGES_FILE)
    whole: dict[str, Any] = {}
    for stage in range(saved.stages):
        state = _stage_state_dict(_view_of_stage(saved.folder, stage, scratch), saved.zero_stage)
        prefix = f"{stage}.{PREFIX}"  # DeepSpeed numbers the layers of a pipeline, and a stage is one of them
        whole |= {names.whole(name.removeprefix(prefix), stage): value for name, value in state.items()}
    return whole


def _stage_names(path: Path) -> StageNames:
    try:
        return StageNames(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); choose another checkpoint") from None


def _view_of_stage(folder: Path, stage: int, scratch: Path) -> Path:
    """Return a folder in which one pipeline stage's files look like those of a job without a pipeline."""
    view = scratch / f"stage-{stage}"
    view.mkdir()
    for file in folder.glob(f"*mp_rank_{stage:02d}_*.pt"):
        (view / file.name.replace(f"mp_rank_{stage:02d}_", "mp_rank_00_")).symlink_to(file.resolve())
    return view


def _stage_state_dict(folder: Path, zero_stage: int) -> dict[str, Any]:
    """Return the parameters of one pipeline stage, or of a job without a pipeline, under their names there."""
    state: dict[str, Any]
    if zero_stage == 0:
        state = _load(folder / MODEL_STATES)["module"]
        return state
    optimizer_states = sorted(folder.glob(OPTIMIZER_STATES), key=_rank)
    if "zero_stage" not in _load(optimizer_states[0])["optimizer_state_dict"]:
        return _bf16_masters(optimizer_states, _load(folder / MODEL_STATES)["param_shapes"])
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):  # it prints its progress
        state = get_fp32_state_dict_from_zero_checkpoint(str(folder.parent), tag=folder.name, lazy_mode=True)
    return state


@dataclass(frozen=True)
class _Pieces:
    """A parameter in flat pieces on disk, put together when it is written."""

    parts: list[torch.Tensor]
    shape: torch.Size

    def contiguous(self) -> torch.Tensor:
        return torch.cat(self.parts).view(self.shape)


def _bf16_masters(files: list[Path], shapes: list[dict[str, torch.Size]]) -> dict[str, _Pieces]:
    """Find the fp32 master weights of DeepSpeed's BF16_Optimizer, which its own converter does not read.

    That is stage 1 with bf16 weights and fp32 gradient accumulation; its files name no ZeRO stage. Each rank has
    one flat tensor per parameter group, and says where in it which parameter's piece lies; pieces follow each other in
    rank order.
    """
    pieces: dict[str, list[torch.Tensor]] = {}
    for file in files:
        state = _load(file)["optimizer_state_dict"]
        groups = zip(state["single_partition_of_fp32_groups"], state["param_slice_mappings"], strict=True)
        for flat, addresses in groups:
            for name, address in addresses.items():
                piece = flat.detach()[address.start : address.start + address.numel]
                pieces.setdefault(name, []).append(piece)
    return {name: _Pieces(pieces[name], shape) for group in shapes for name, shape in group.items()}


def _load(path: Path) -> dict[str, Any]:
    """Read a file that DeepSpeed pickled; the checkpoint's checksums were compared before."""
    content: dict[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=False)
    return content


def _rank(path: Path) -> int:
    found = re.search(r"rank_(\d+)", path.name)
    assert found is not None
    return int(found[1])


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
