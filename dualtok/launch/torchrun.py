"""torchrun on every host, with a rendezvous and restarts."""

from __future__ import annotations

from dualtok.errors import ConfigError
from dualtok.launch.job import Job, Start, render

SCRIPT = "torchrun_nodes.sh"


def torchrun(job: Job) -> Start:
    """Return the script that starts this host's ranks.

    Raises:
        ConfigError: several hosts, and none of them is named as the place of the rendezvous.
    """
    if job.nodes > 1 and job.settings.master is None:
        raise ConfigError(
            "launch.master: missing; with several hosts torchrun needs one where they meet, e.g. launch.master=node0"
        )
    note = f"give this command on each of the {job.nodes} hosts" if job.nodes > 1 else ""
    return Start({SCRIPT: render("torchrun.sh.j2", job, recipe=f"launch/{SCRIPT}")}, ("bash", SCRIPT), note)
