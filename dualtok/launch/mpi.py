"""Open MPI's mpirun; the ranks ask it through mpi4py who they are."""

from __future__ import annotations

from dualtok.errors import ConfigError
from dualtok.launch.job import Job, Start, render

SCRIPT = "mpirun.sh"


def mpi(job: Job) -> Start:
    """Return the script that runs ``mpirun``.

    Raises:
        ConfigError: several hosts, and no hostfile that names them.
    """
    if job.nodes > 1 and job.settings.hostfile is None:
        raise ConfigError("launch.hostfile: missing; mpirun needs lines `HOST slots=RANKS` in a file for several hosts")
    return Start({SCRIPT: render("mpirun.sh.j2", job, recipe=f"launch/{SCRIPT}")}, ("bash", SCRIPT), needs=("mpirun",))
