"""What all backends share: the job to start, what a backend makes of it, and the scripts' templates."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jinja2

if TYPE_CHECKING:
    from dualtok.config.launch import LaunchConfig

CARRIED = (
    "PATH",
    "LD_LIBRARY_PATH",
    "PYTHONPATH",
    "TORCH_EXTENSIONS_DIR",
    "TRITON_CACHE_DIR",
    "HF_HOME",
    "OMP_NUM_THREADS",
    "LOCAL_SIZE",
    "TOKENIZERS_PARALLELISM",
    "DS_ACCELERATOR",
    "NCCL_DEBUG",
    "NCCL_SOCKET_IFNAME",
    "GLOO_SOCKET_IFNAME",
)
"""Variables that ranks on other hosts need and that neither ssh nor pdsh nor mpirun carries there by itself."""


@dataclass(frozen=True)
class Job:
    """Ranks of one ``dualtok`` command on the hosts of a cluster."""

    nodes: int
    """Hosts."""
    gpus: int
    """Ranks per host, one per accelerator."""
    settings: LaunchConfig
    arguments: tuple[str, ...] = ()
    """What follows ``dualtok``, e.g. ``("train", "run.yaml", "--auto-resume")``; a recipe takes it at its start."""
    folder: str | None = None
    """Working folder on every host; None is the folder in which the script is started."""
    python: str = "python"
    """Interpreter on every host."""
    logs: str = "logs"
    """Folder of the ranks' logs."""
    scripts: str | None = None
    """Folder into which the files are written, on every host; None for a recipe."""
    name: str = "dualtok"
    """Name of the job for schedulers, and of its rendezvous."""


@dataclass(frozen=True)
class Start:
    """What a backend makes of a job."""

    files: dict[str, str]
    """Name and text of the files to write first."""
    command: tuple[str, ...]
    """Starts the job from the folder of these files."""
    note: str = ""
    """What else has to be done, in one line."""
    needs: tuple[str, ...] = ()
    """Programs that must be installed where the job is started."""


def render(template: str, job: Job, *, fixed: bool | None = None, **context: Any) -> str:
    """Return a script of ``templates/``, with the job's settings.

    Args:
        template: file of ``templates/``.
        job: what is started.
        fixed: the settings hold whatever the environment says; else they are what it may replace. None is fixed for
            all but recipes: a variable that happens to be exported must not undo what was asked for and checked.
        context: further names for the template.
    """
    if fixed is None:
        fixed = job.scripts is not None

    def setting(name: str, value: object) -> str:
        return f'{name}="{value}"' if fixed else f'{name}="${{{name}:-{value}}}"'

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("dualtok.launch"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters["quote"] = shlex.quote
    carried = (*CARRIED, *(name for name in job.settings.environment if name not in CARRIED))
    return environment.get_template(template).render(
        job=job,
        settings=job.settings,
        arguments=shlex.join(job.arguments),
        carried=" ".join(carried),
        setting=setting,
        **context,
    )
