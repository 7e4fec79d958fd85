"""A Slurm of Debian's packages on this host: munged, slurmctld and one slurmd per node, all in one folder.

``python -m tests.cluster.slurm FOLDER`` keeps one up until it is interrupted, to try things by hand.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from tests.support import free_port

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch")
PMIX = Path("/usr/lib/x86_64-linux-gnu/pmix2/lib/libpmix.so")
"""What Debian 12's Slurm loads for ``srun --mpi=pmix``; only libpmix-dev has it under this name."""

CONFIGURATION = """\
ClusterName=tests
SlurmctldHost={host}
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
# A requeued job waits until the credential of its last start has expired: two minutes if nothing is said.
AuthInfo=socket={folder}/munge/socket,cred_expire=10
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
# Nodes of one host must not share the folder in which PMIx of one node's job makes its sockets.
TmpFS={folder}/tmp/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/logs/slurmctld.log
SlurmdLogFile={folder}/logs/slurmd-%n.log
# No cgroups: containers often lack them.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
GresTypes=gpu
ReturnToService=2
KillWait=30
SchedulerParameters=batch_sched_delay=1,sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=120
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str:
    """Return why no Slurm can be started here, or ``""``."""
    absent = [program for program in PROGRAMS if shutil.which(program) is None]
    if absent:
        return f"not installed: {', '.join(absent)} (Debian: slurmctld slurmd slurm-client munge)"
    if not PMIX.exists():
        return f"not installed: {PMIX} (Debian: libpmix-dev)"
    return "" if os.getuid() == 0 else "slurmd must be started by root"


class Slurm:
    """A cluster that is up while it is entered: partitions ``low`` and ``high``, which preempts the other."""

    def __init__(self, folder: Path, nodes: int = 2) -> None:
        self.folder = folder
        self.nodes = [f"node{number}" for number in range(1, nodes + 1)]
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._of_nodes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Slurm:
        """Write the configuration, start the daemons, and wait until all nodes are idle."""
        self._lay_down()
        munge = self.folder / "munge"
        files = [f"--{name}={munge / name}" for name in ("socket", "key-file", "pid-file", "log-file", "seed-file")]
        try:
            self._start("munged", "--foreground", "--force", *files)
            self._wait("munged", (munge / "socket").exists)
            self._start("slurmctld", "-D")
            for node in self.nodes:
                self.bring_up(node)
            self._wait(
                "the nodes",
                lambda: self("sinfo", "-h", "-N", "-p", "low", "-o", "%t").split() == ["idle"] * len(self.nodes),
            )
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """End all jobs, then the daemons in the reverse order."""
        self("scancel", "--quiet", "--user=root", check=False)
        deadline = time.monotonic() + 60
        while self("squeue", "-h", check=False) and time.monotonic() < deadline:
            time.sleep(0.5)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def __call__(self, *command: str, check: bool = True) -> str:
        """Run one of Slurm's commands and return what it printed."""
        result = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60, check=False)
        assert not check or result.returncode == 0, f"{command}: {result.stdout}{result.stderr}"
        return result.stdout.strip()

    def submit(self, *arguments: str, folder: Path, **variables: str) -> str:
        """``sbatch`` and return the job's number."""
        result = subprocess.run(
            ["sbatch", "--parsable", *arguments],
            env={**self.environment, **variables},
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout.strip()

    def field(self, job: str, name: str) -> str:
        """Return a field of ``scontrol show job``, e.g. ``JobState``."""
        shown = self("scontrol", "--oneliner", "show", "job", job)
        return next(word.partition("=")[2] for word in shown.split() if word.startswith(f"{name}="))

    def bring_up(self, node: str) -> None:
        """Start a node; one that was lost takes jobs again as soon as it has told the controller."""
        self._of_nodes[node] = self._start("slurmd", "-D", "-N", node)

    def lose(self, node: str) -> None:
        """Kill all that runs on a node, and mark it down, as the controller itself would after ``SlurmdTimeout``
        (five minutes)."""
        marks = {"SLURMD_NODENAME": node, "SLURM_CONF": self.environment["SLURM_CONF"]}
        tasks = [
            process
            for process in psutil.process_iter(["environ"])
            if marks.items() <= (process.info["environ"] or {}).items()
        ]
        above = {parent for task in tasks for parent in task.parents() if parent.name() == "slurmstepd"}
        assert above, f"nothing runs on {node}"
        self._of_nodes[node].kill()
        for process in (*above, *tasks):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=lost")

    def logs(self) -> str:
        """Return what the daemons wrote, for a test that failed."""
        return "\n".join(f"== {file.name}\n{file.read_text()}" for file in sorted((self.folder / "logs").iterdir()))

    def _lay_down(self) -> None:
        for name in ("munge", "state", "logs", *(f"{kind}/{node}" for kind in ("spool", "tmp") for node in self.nodes)):
            (self.folder / name).mkdir(parents=True, mode=0o755)
        key = self.folder / "munge" / "key-file"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        host, ports = socket.gethostname(), [free_port() for _ in range(1 + len(self.nodes))]
        nodes = [
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 Gres=gpu:2"
            for node, port in zip(self.nodes, ports[1:], strict=True)
        ]
        text = CONFIGURATION.format(host=host, folder=self.folder, ports=ports, nodes="\n".join(nodes))
        (self.folder / "slurm.conf").write_text(text)
        for number in range(2):  # a device must be a file, but no more than that
            (self.folder / f"gpu{number}").touch()
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-1]\n")

    def _start(self, *command: str) -> subprocess.Popen[bytes]:
        log = (self.folder / "logs" / f"{command[0]}-{len(self._daemons)}.out").open("wb")
        self._daemons.append(subprocess.Popen(command, env=self.environment, stdout=log, stderr=log))
        return self._daemons[-1]

    def _wait(self, what: str, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not _quietly(ready):
            ended = [daemon.args for daemon in self._daemons if daemon.poll() is not None]
            if ended or time.monotonic() > deadline:
                raise AssertionError(f"{what} not up; ended: {ended}\n{self.logs()}")
            time.sleep(0.2)


def _quietly(ready: Callable[[], bool]) -> bool:
    try:
        return ready()
    except AssertionError:  # the controller does not answer yet
        return False


def main() -> None:
    """Keep a cluster up until Ctrl-C."""
    folder = Path(sys.argv[1]).absolute()
    with Slurm(folder) as cluster:
        print(f"export SLURM_CONF={folder / 'slurm.conf'}\n{cluster('sinfo')}", flush=True)
        try:
            while True:
                time.sleep(60)
        except KeyboardInterrupt:
            pass


if __name__ == "__main__":
    main()
