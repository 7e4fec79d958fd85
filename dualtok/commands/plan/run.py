"""``dualtok plan``: will a run fit, how long will it take, and which layout would be best; no weight is read."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from dualtok.commands.plan.inputs import job_of, layers_per_stage, material_of
from dualtok.commands.plan.leak import expected_of, with_documents
from dualtok.commands.plan.result import Budget, Plan
from dualtok.errors import ConfigError, did_you_mean
from dualtok.plan.hardware import DEVICES, GIB, Cluster
from dualtok.plan.layouts import Option, rank_layouts, weigh
from dualtok.plan.memory import Reference, estimate_memory
from dualtok.plan.speed import TOKEN_BYTES, forward_seconds, model_flops, step_time
from dualtok.train.checks import count_steps

if TYPE_CHECKING:
    from pathlib import Path

    from dualtok.commands.plan.inputs import Material
    from dualtok.config.run import RunConfig
    from dualtok.config.train import TrainConfig
    from dualtok.plan.memory import Job


STATE_BYTES = 12
"""Bytes of a checkpoint per trained element: master weight and two moments in float32."""
UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": GIB, "TB": 2**40}
"""Sizes of memory; GB is what accelerators are sold by, that is 2**30 bytes."""
BITS = {"Mb/s": 1e6, "Gb/s": 1e9, "Tb/s": 1e12}


def plan(
    run: RunConfig,
    cluster: Cluster,
    tokens: int | None = None,
    *,
    documents: int | None = None,
    auxiliary: int | None = None,
) -> Plan:
    """Plan a run on a cluster.

    Args:
        run: settings with the sections ``model`` and ``train``.
        cluster: the machines.
        tokens: of the split to learn, where the data is not prepared yet.
        documents: of the split to learn, where the data is not prepared yet.
        auxiliary: documents that the reference will learn, where the data is not prepared yet.

    Raises:
        ConfigError: settings contradict each other, or the model cannot be found; not that the run's own layout does
            not go with the ranks, which is part of the result.
        DataError: the prepared data is malformed.
    """
    train: TrainConfig = run.need("train", "plan")
    material = with_documents(material_of(run, tokens), documents, auxiliary)
    own: Option | None = None
    refused = ""
    try:
        own = weigh(material.shape, job_of(run, material, cluster.ranks), cluster, material.reference)
        start = own.job
    except ConfigError as error:
        refused, start = str(error), fallback_job(run, material, cluster)

    def split_evenly(stages: int) -> tuple[int, ...]:
        balance = "cost" if train.pipeline is None or train.pipeline.stages != stages else train.pipeline.balance
        return layers_per_stage(material.shape, stages, balance)

    options = rank_layouts(material.shape, start, cluster, material.reference, split_evenly)
    if own is None and not options:
        raise ConfigError(refused)
    fitting = own if own is not None and (own.fits or not options) else options[0]
    budget = _budget(run, material, fitting, cluster)
    flops = model_flops(material.shape, material.length) * fitting.tokens_per_second
    return Plan(
        material.shape,
        cluster,
        own,
        refused,
        options,
        _references(material, fitting.job, cluster),
        budget,
        expected_of(run, material),
        flops / (cluster.ranks * cluster.device.flops),
    )


def fallback_job(run: RunConfig, material: Material, cluster: Cluster) -> Job:
    """Return a job of the run's batch and settings whose own layout the ranks cannot have.

    It is one rank's: :func:`~dualtok.plan.layouts.rank_layouts` shares its blocks out anew.
    """
    train: TrainConfig = run.need("train", "plan")
    plain = replace(train, engine="zero", pipeline=None, deepspeed=None)
    return job_of(replace(run, train=plain), material, 1)


def _references(material: Material, job: Job, cluster: Cluster) -> dict[Reference, tuple[float, float, float]]:
    """Return what each mode of the reference would take in a layout."""
    modes: list[Reference] = ["stored", "offload", "cpu", "resident"]
    if material.shape.adapters:
        modes.append("adapter")
    found: dict[Reference, tuple[float, float, float]] = {}
    for mode in modes:
        other = replace(job, reference=mode)
        held = estimate_memory(material.shape, other, material.reference)
        host = (
            held.per_host(cluster.gpus).host
            - estimate_memory(material.shape, replace(job, reference="none"), material.reference)
            .per_host(cluster.gpus)
            .host
        )
        seconds = step_time(material.shape, other, cluster, material.reference).reference
        found[mode] = (held.largest.reference.device, host, seconds)
    return found


def _budget(run: RunConfig, material: Material, option: Option, cluster: Cluster) -> Budget:
    train = run.train
    assert train is not None
    steps = train.steps
    if steps is None and material.blocks is not None:
        steps = count_steps(train, material.blocks)
    per_step = train.batch_size * material.length
    split = None if material.blocks is None else material.blocks * material.length
    stored = run.reference is not None and not run.reference.is_live
    passes = 0 if not stored or run.reference is None else len(run.reference.models)
    scoring: float | None = 0.0
    if stored:
        scoring = None
        if split is not None:
            precision = run.reference.precision if run.reference is not None else "fp32"
            alone = forward_seconds(material.reference, split * passes, material.length, cluster, precision)
            scoring = alone / cluster.ranks / 3600
    return Budget(
        steps=steps,
        tokens=None if steps is None else steps * per_step,
        hours=None if steps is None else steps * option.time.total / 3600,
        shards=None if split is None else TOKEN_BYTES * split,
        scores=None if split is None else (TOKEN_BYTES * split if stored else 0),
        scoring_hours=scoring,
        checkpoints=STATE_BYTES * material.shape.trained * (train.checkpoint_keep + 2),
    )


def make_cluster(
    *, device: str, nodes: int, gpus: int, gpu_memory: str | None, host_memory: str, network: str
) -> Cluster:
    """Return the machines that the command line describes.

    Raises:
        ConfigError: an unknown device, or a size or bandwidth that cannot be read.
    """
    if device not in DEVICES:
        raise ConfigError(
            f"--device: no device {device!r}{did_you_mean(device, DEVICES)}; known are {', '.join(DEVICES)}"
        )
    known = DEVICES[device]
    memory = known.memory if gpu_memory is None else _quantity(gpu_memory, "--gpu-memory", UNITS, "80GB")
    return Cluster(
        known,
        nodes,
        gpus,
        memory,
        _quantity(host_memory, "--host-memory", UNITS, "1TB"),
        _quantity(network, "--network", BITS, "400Gb/s") / 8,
    )


def _quantity(text: str, option: str, units: dict[str, float] | dict[str, int], example: str) -> float:
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z/]+)\s*", text)
    known = {unit.lower().replace("ib", "b"): factor for unit, factor in units.items()}
    factor = known.get(found[2].lower().replace("ib", "b")) if found else None
    if found is None or factor is None or float(found[1]) <= 0:
        raise ConfigError(
            f"{option}: {text!r} cannot be read; write a number and one of {', '.join(units)}, e.g. {example}"
        )
    return float(found[1]) * factor


def show_plan(
    run: RunConfig,
    cluster: Cluster,
    tokens: int | None,
    write: Path | None,
    *,
    as_json: bool,
    documents: int | None = None,
    auxiliary: int | None = None,
) -> None:
    """Plan a run, print tables or JSON, and write the best layout's files if asked.

    Raises:
        ConfigError: as :func:`plan`; or there is nothing to write, since no layout fits.
    """
    # Here, so that a caller of plan() alone does without rich (.1 s) and what writes YAML.
    from dualtok.commands.plan.tables import print_plan
    from dualtok.commands.plan.write import write_layout

    found = plan(run, cluster, tokens, documents=documents, auxiliary=auxiliary)
    if as_json:
        print(json.dumps(found.as_dict(), indent=2))
    else:
        print_plan(found)
    if write is not None:
        if not found.options or not found.options[0].fits:
            raise ConfigError("--write: no layout fits these machines; take more of them, or a smaller batch or model")
        files = write_layout(run, found.options[0], write)
        print(f"wrote {files[0]} and {files[1]}", file=sys.stderr if as_json else sys.stdout)
