"""CSV files, Weights & Biases and Comet through DeepSpeed's monitor, each without the traps it has by itself.

* DeepSpeed's engines would write learning rate and loss by samples, and W&B refuses a step before the last one: the
  sections are therefore the run's (``monitor.csv``, ``monitor.wandb``, ``monitor.comet``), all that is written comes
  from the loop, and its step is the optimizer's.
* A restart would write each CSV file's header again, and the rows of steps that are repeated a second time.
* W&B would begin another run at each restart.
"""

from __future__ import annotations

import csv
import os
import secrets
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError
from urllib.request import urlopen

from dualtok.errors import ConfigError
from dualtok.files import write_text

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from dualtok.config.monitor import MonitorConfig

# Imported where they are used, for what they take to load: DeepSpeed (2 s).
# Imported where they are used, for they need not be installed or wanted: wandb.

WANDB_RUN = "wandb_run"
"""File of a run that holds its name at W&B, so that a restart goes on with it."""
ANSWER_SECONDS = 10.0
"""How long a server may take to answer at first."""


def require_monitors(monitor: MonitorConfig) -> None:
    """Compare what the run asks for with what is installed.

    Raises:
        ConfigError: names the package to install.
    """
    for section, package, extra in (("wandb", "wandb", "wandb"), ("comet", "comet_ml", "comet")):
        if getattr(monitor, section) is not None and find_spec(package) is None:
            raise ConfigError(
                f"monitor.{section}: {package} is not installed; run `pip install 'dualtok[{extra}]'`, or remove the "
                "section"
            )


def scalar_writers(monitor: MonitorConfig, output: Path, done: int) -> dict[str, Callable[[], DeepSpeedMonitor]]:
    """Return what makes the writers that a run asks for; to be made on rank 0 alone.

    Args:
        monitor: the run's section.
        output: the run's folder.
        done: optimizer steps done before; later rows, of steps that will be repeated, are dropped.
    """
    writers: dict[str, Callable[[], DeepSpeedMonitor]] = {}
    if monitor.csv:
        writers["monitor.csv"] = lambda: _csv(output, done)
    if (wandb := monitor.wandb) is not None:
        section = {"enabled": True, "project": wandb.project, "group": wandb.group, "team": wandb.team}
        writers["monitor.wandb"] = lambda: _wandb(section, output)
    if (comet := monitor.comet) is not None:
        settings = {
            "enabled": True,
            "project": comet.project,
            "workspace": comet.workspace,
            "experiment_name": comet.experiment_name,
            "online": comet.online,
            "samples_log_interval": 1,
        }
        writers["monitor.comet"] = lambda: _comet(settings, output)
    return writers


class DeepSpeedMonitor:
    """One backend of DeepSpeed's monitor.

    Args:
        sections: its section as in DeepSpeed's JSON.
        end: ends it; DeepSpeed never does.
        forget: takes back what was written of later steps than the one given. A server keeps them: W&B leaves out what
            is written of a step before its last one, and Comet shows both.
    """

    def __init__(
        self,
        sections: dict[str, Any],
        end: Callable[[Any], object] = lambda _: None,
        forget: Callable[[int], object] = lambda _: None,
    ) -> None:
        from deepspeed.monitor.config import get_monitor_config
        from deepspeed.monitor.monitor import MonitorMaster

        self.master = MonitorMaster(get_monitor_config(sections))
        self._end, self._forget = end, forget

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Write the scalars of one optimizer step."""
        self.master.write_events([(name, value, step) for name, value in values.items()])

    def forget_after(self, step: int) -> None:
        """Take back what was written of later steps, where that can be."""
        self._forget(step)

    def close(self) -> None:
        """End the backend."""
        self._end(self.master)


def _csv(output: Path, done: int) -> DeepSpeedMonitor:
    section = {"enabled": True, "output_path": str(output), "job_name": "csv"}
    monitor = DeepSpeedMonitor({"csv_monitor": section}, forget=lambda step: _drop_rows(output / "csv", step))
    monitor.master.csv_monitor.filenames += _drop_rows(output / "csv", done)
    return monitor


def _drop_rows(folder: Path, after: int) -> list[str]:
    """Take the rows of later steps out of all CSV files; returns the names of those that have their header."""
    names = []
    for file in sorted(folder.glob("*.csv")):
        with file.open(encoding="utf-8", newline="") as stream:
            header, *rows = [*csv.reader(stream)] or [["step", file.stem]]
        kept = [row for row in rows if len(row) == len(header) and int(row[0]) <= after]  # a crash may cut the last one
        write_text(file, "".join(",".join(row) + "\n" for row in (header, *kept)))
        names.append(file.stem)
    return names


def _wandb(section: dict[str, Any], output: Path) -> DeepSpeedMonitor:
    file = output / WANDB_RUN
    if not file.is_file():
        write_text(file, secrets.token_hex(8))
    wanted = {
        "WANDB_DIR": str(output),
        "WANDB_NAME": output.name,
        "WANDB_RESUME": "allow",
        "WANDB_RUN_ID": file.read_text(encoding="utf-8"),
    }
    # DeepSpeed has no setting for them; the user's own come first.
    added = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(added)
    import wandb

    settings = wandb.setup().settings
    if settings.mode not in ("offline", "disabled"):
        _require_answer(settings.base_url)

    def end(_: Any) -> None:
        wandb.finish()
        for name in added:
            del os.environ[name]

    return DeepSpeedMonitor({"wandb": section}, end)


def _require_answer(address: str) -> None:
    """Raise OSError if a server does not answer at all.

    W&B's client would try for minutes, and keep the process from ending meanwhile.
    """
    try:
        urlopen(address, timeout=ANSWER_SECONDS).close()  # W&B's own setting
    except HTTPError:
        return  # an answer, if not a kind one


def _comet(section: dict[str, Any], output: Path) -> DeepSpeedMonitor:
    os.environ.setdefault("COMET_OFFLINE_DIRECTORY", str(output / "comet"))
    return DeepSpeedMonitor({"comet": section}, lambda master: master.comet_monitor.experiment.end())
