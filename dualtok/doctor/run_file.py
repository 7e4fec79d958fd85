"""The run that is to start: its data, and its DeepSpeed settings for the ranks at hand."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dualtok.data.mixed import load_sources
from dualtok.distributed.deepspeed_config import training_config
from dualtok.doctor.result import CheckResult
from dualtok.errors import DataError, DualtokError
from dualtok.train.checks import require_reference

if TYPE_CHECKING:
    from dualtok.config.run import RunConfig


def check_run(run: RunConfig, ranks: int) -> CheckResult:
    """Compare the run's sections, prepared data and DeepSpeed JSON with each other and with the ranks, as training
    does when it starts.

    Args:
        run: the run.
        ranks: of the whole job.
    """
    name = "run"
    if run.train is None:
        return CheckResult(name, "not-run", "the run has no section 'train'; prepare, score and audit check themselves")
    try:
        run.need("model", "train")
        require_reference(run)
        if ranks % run.train.stages:
            return CheckResult(
                name,
                "warn",
                f"{run.train.stages} pipeline stages (train.pipeline.stages) cannot share "
                f"the {ranks} ranks that are here",
                "start a multiple of the stages",
            )
        if run.train.engine != "opacus":
            training_config(run.train, ranks // run.train.stages)
        sources = load_sources(run.data, run.train.split)
    except DataError as error:
        return CheckResult(name, "fail", str(error), "prepare the data first: `dualtok prepare RUN.yaml`")
    except DualtokError as error:
        return CheckResult(name, "fail", str(error), "change the setting that the message names")
    blocks = sum(source.manifest.splits[run.train.split].blocks for source in sources)
    return CheckResult(name, "ok", f"settings, DeepSpeed JSON and {blocks:,} prepared blocks fit {ranks} ranks")
