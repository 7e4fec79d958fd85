"""A planned layout as files that dualtok loads: a DeepSpeed JSON and the run's YAML with that layout."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import yaml

from dualtok.commands.plan.inputs import SETTINGS
from dualtok.config.train import PipelineConfig
from dualtok.distributed.deepspeed_config import read_deepspeed_json
from dualtok.files import write_text

if TYPE_CHECKING:
    from pathlib import Path

    from dualtok.config.run import RunConfig
    from dualtok.distributed.deepspeed_config import Json
    from dualtok.plan.layouts import Option
    from dualtok.plan.memory import Job

JSON_FILE, RUN_FILE = "deepspeed.json", "run.yaml"
NVME_PATH = "/local/nvme"
"""Where a layout with an optimizer in files puts them, unless the run's own JSON names a folder."""


def write_layout(run: RunConfig, option: Option, folder: Path) -> tuple[Path, Path]:
    """Write ``deepspeed.json`` and ``run.yaml`` of a layout and return their paths.

    Everything but the layout is the run's: the blocks of a step, precision, objective, reference. Where the layout has
    another number of micro-batches, or states in files, the YAML says at its top what follows from it.
    """
    json_file, run_file = folder / JSON_FILE, folder / RUN_FILE
    nvme = nvme_path(None if run.train is None else run.train.deepspeed)
    write_text(json_file, json.dumps(deepspeed_json(option.job, nvme), indent=2) + "\n")
    planned = with_layout(run, option.job, json_file)
    assert run.train is not None
    before, now = run.train.gradient_accumulation, option.job.micro_batches
    note = f"# Planned by `dualtok plan`: {option.name}, on {option.job.ranks} ranks.\n"
    if before != now:
        note += (
            f"# gradient_accumulation is {now}, it was {before}: with selection.scope micro_batch tokens are ranked\n"
            "# over micro-batches of another size.\n"
        )
    if "nvme" in (option.job.offload_optimizer, option.job.offload_parameters):
        note += (
            f"# States are kept in files: nvme_path in {json_file}\n"
            f"# must be a folder on a local disk of every host (it is {nvme} now), and libaio-dev be installed.\n"
            "# Such a run cannot be resumed as it is: optimizer states on NVMe are not filled from a checkpoint; for\n"
            "# that, set offload_optimizer.device to cpu.\n"
        )
    write_text(run_file, note + yaml.safe_dump(_given(planned.as_dict()), sort_keys=False, allow_unicode=True))
    return json_file, run_file


def with_layout(run: RunConfig, job: Job, json_file: Path) -> RunConfig:
    """Return a run with the layout of a job."""
    assert run.train is not None
    assert run.model is not None
    pipeline = None
    if job.stages > 1:
        earlier = run.train.pipeline
        same = earlier is not None and earlier.stages == job.stages
        pipeline = PipelineConfig(
            stages=job.stages,
            balance=earlier.balance if same and earlier is not None else "cost",
            keep_gathered=job.keep_gathered,
            allow_untested_deepspeed=job.engine == "sharded_pipeline"
            and earlier is not None
            and earlier.allow_untested_deepspeed,
        )
    train = replace(
        run.train,
        engine=job.engine,
        pipeline=pipeline,
        deepspeed=str(json_file),
        gradient_accumulation=job.micro_batches,
    )
    return replace(run, train=train, model=replace(run.model, activation_checkpointing=job.activation_checkpointing))


def nvme_path(given: str | None) -> str:
    """Return the folder of states in files that a DeepSpeed JSON names, or :data:`NVME_PATH`."""
    zero = {} if given is None else read_deepspeed_json(given).get("zero_optimization", {})
    paths = [zero.get(section, {}).get("nvme_path") for section in ("offload_optimizer", "offload_param")]
    return next(filter(None, paths), NVME_PATH)


def deepspeed_json(job: Job, nvme_path: str = NVME_PATH) -> Json:
    """Return the DeepSpeed configuration of a layout; batch and precision are the YAML's."""
    zero: Json = {"stage": job.zero_stage}
    keys = {0: (), 1: ("reduce_bucket",), 2: ("reduce_bucket",), 3: tuple(SETTINGS)}[job.zero_stage]
    for field in keys:
        if job.engine == "sharded_pipeline" and field != "reduce_bucket":
            continue  # nothing is fetched ahead or kept there, and sub-groups are refused
        zero[SETTINGS[field]] = getattr(job, field)
    if job.overlap is not None:
        zero["overlap_comm"] = job.overlap
    for section, device in (("offload_param", job.offload_parameters), ("offload_optimizer", job.offload_optimizer)):
        if device != "none":
            zero[section] = {"device": device, "pin_memory": True}
            if device == "nvme":
                zero[section]["nvme_path"] = nvme_path
    return {"zero_optimization": zero}


def _given(values: dict[str, Any]) -> dict[str, Any]:
    """Leave out sections that the run does not have."""
    return {key: value for key, value in values.items() if value is not None}
