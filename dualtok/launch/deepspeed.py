"""DeepSpeed's own launcher: over pdsh, over plain ssh, or given on every host."""

from __future__ import annotations

from dualtok.errors import ConfigError
from dualtok.launch.job import Job, Start, render

SCRIPTS = {"pdsh": "deepspeed_pdsh.sh", "ssh": "deepspeed_ssh.sh", "none": "deepspeed_no_ssh.sh"}


def deepspeed(job: Job) -> Start:
    """Return the script that starts all hosts, or with ``remote: none`` this one.

    Raises:
        ConfigError: there is no hostfile; or the hosts shall start without ssh and none is named as the first.
    """
    remote = job.settings.deepspeed.remote
    if job.settings.hostfile is None:
        raise ConfigError("launch.hostfile: missing; the backend deepspeed needs lines `HOST slots=RANKS` in a file")
    if remote == "none" and job.nodes > 1 and job.settings.master is None:
        raise ConfigError(
            "launch.master: missing; without ssh every host must be told the first one, e.g. launch.master=node0"
        )
    needed = ("ssh", "none") if remote == "ssh" else (remote,)  # the script for ssh starts the other one on each host
    files = {}
    for name in needed:
        fixed = None if name == remote else False  # that one is told all through its environment
        files[SCRIPTS[name]] = render(f"{SCRIPTS[name]}.j2", job, fixed=fixed, recipe=f"launch/{SCRIPTS[name]}")
    note = "give this command on each host, with NODE_RANK=0, 1, ... in front" if remote == "none" else ""
    programs = {"pdsh": ("pdsh", "ssh"), "ssh": ("ssh",), "none": ("pkill",)}[remote]
    return Start(files, ("bash", SCRIPTS[remote]), note, programs)
