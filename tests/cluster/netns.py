"""Hosts on one machine, as far as a job can tell: each has a network, a name, a process table, shared memory and an ssh
daemon of its own, and a cable to a common switch that can be pulled or made slow. Files are shared, as on a cluster."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from tests.support import ROOT, environment

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

PROGRAMS = {
    "ip": "iproute2",
    "tc": "iproute2",
    "/usr/sbin/sshd": "openssh-server",
    "ssh": "openssh-client",
    "pdsh": "pdsh",
    "unshare": "util-linux",
    "nsenter": "util-linux",
    "setpriv": "util-linux",
    "ps": "procps",
}
"""What is run, and the Debian package that it comes in."""
INTERFACE = "eth0"
START = """
set -e
hostname {name}
mount -t tmpfs tmpfs /dev/shm
mkdir -p /run/sshd
mount --bind {folder}/hosts /etc/hosts
mount --bind {folder}/ssh_config /etc/ssh/ssh_config
mount --bind {folder}/resolv.conf /etc/resolv.conf
mount --bind {folder}/operators-{name} {folder}/operators
exec /usr/sbin/sshd -D -f {folder}/sshd_config -E {folder}/sshd-{name}.log
"""
SSHD = """
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
PermitRootLogin prohibit-password
PasswordAuthentication no
StrictModes no
UsePAM no
PidFile none
"""
SSH = """
Host *
  IdentityFile {folder}/key
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
  ConnectTimeout 5
"""


def missing() -> str | None:
    """Return why there can be no such hosts here, or None."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    packages = sorted({package for program, package in PROGRAMS.items() if shutil.which(program) is None})
    if packages:
        return f"not installed: {', '.join(packages)}"
    tried = subprocess.run(
        ["unshare", "--net", "--uts", "--mount", "--pid", "--ipc", "--fork", "--mount-proc", "true"],
        capture_output=True,
        text=True,
        check=False,
    )
    return f"no namespaces: {tried.stderr.strip()}" if tried.returncode else None


@dataclass
class Host:
    """A running host."""

    name: str
    address: str
    cable: str
    """The switch's end of the cable."""
    process: subprocess.Popen[bytes]
    init: int
    """Process that is number 1 on the host; with it, all others end."""

    def start(self, command: Sequence[str], log: IO[str], **variables: str) -> subprocess.Popen[str]:
        """Run a command on the host, in the repository."""
        enter = ["nsenter", f"--target={self.init}", "--net", "--uts", "--mount", "--pid", "--ipc", f"--wd={ROOT}"]
        return subprocess.Popen(
            [*enter, *command],
            env=environment(**variables),
            text=True,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        )

    def commands(self) -> list[str]:
        """Return the command lines of all that runs on the host."""
        enter = ["nsenter", f"--target={self.init}", "--mount", "--pid"]
        done = subprocess.run([*enter, "ps", "-eo", "args="], capture_output=True, text=True, check=True)
        return done.stdout.splitlines()

    def cut(self) -> None:
        """Pull the cable."""
        _run("ip", "link", "set", self.cable, "down")

    def slow_down(self, rate: str) -> None:
        """Let so many bits per second through in each direction, e.g. "2mbit"."""
        shape = ["root", "tbf", "rate", rate, "burst", "16kb", "latency", "400ms"]
        _run("tc", "qdisc", "replace", "dev", self.cable, *shape)
        self._inside("tc", "qdisc", "replace", "dev", INTERFACE, *shape)

    def fix(self) -> None:
        """Plug the cable in again, and let everything through."""
        _run("ip", "link", "set", self.cable, "up")
        all_at_once = ["root", "pfifo"]
        _run("tc", "qdisc", "replace", "dev", self.cable, *all_at_once)
        self._inside("tc", "qdisc", "replace", "dev", INTERFACE, *all_at_once)

    def _inside(self, *command: str) -> None:
        _run("nsenter", f"--target={self.init}", "--net", *command)


@dataclass
class Cluster:
    """Hosts on one switch, where this process has an address, too."""

    folder: Path
    hosts: list[Host]
    gateway: str
    """This process's address on the switch."""

    @property
    def variables(self) -> dict[str, str]:
        """What a job needs to be told on each host; with another PATH, another ninja would compile all again."""
        return {
            "PATH": os.environ["PATH"],
            "GLOO_SOCKET_IFNAME": INTERFACE,
            "DS_ACCELERATOR": "cpu",
            "TORCH_EXTENSIONS_DIR": str(self.folder / "operators"),
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }

    def fix(self) -> None:
        """Undo what was done to the cables, and wait until every host can be reached again."""
        for host in self.hosts:
            host.fix()
        for host in self.hosts:
            _wait_for_ssh(self, host.name)


@contextmanager
def cluster(folder: Path, names: Sequence[str]) -> Iterator[Cluster]:
    """Start hosts, wait until each lets the first one in by ssh, and end all that runs on them afterwards."""
    folder.mkdir(parents=True)
    own = os.getpid()
    switch, net = f"dt{own}", f"198.18.{own % 256}"  # addresses set aside for tests of networks
    addresses = {name: f"{net}.{place + 1}" for place, name in enumerate(names)}
    _write_files(folder, addresses)
    made = Cluster(folder, [], f"{net}.254")
    _run("ip", "link", "add", switch, "type", "bridge")
    try:
        _run("ip", "address", "add", f"{made.gateway}/24", "dev", switch)
        _run("ip", "link", "set", switch, "up")
        for place, name in enumerate(names):
            made.hosts.append(_start_host(folder, name, addresses[name], switch, f"{switch}h{place}"))
        for name in names:
            _wait_for_ssh(made, name)
        yield made
    finally:
        for host in made.hosts:
            host.process.kill()
            host.process.wait()
        _run("ip", "link", "delete", switch)


def _write_files(folder: Path, addresses: dict[str, str]) -> None:
    for key in ("key", "host_key"):
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key))
    lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in addresses.items())]
    (folder / "hosts").write_text("\n".join(lines) + "\n")
    (folder / "sshd_config").write_text(SSHD.format(folder=folder))
    (folder / "ssh_config").write_text(SSH.format(folder=folder))
    (folder / "resolv.conf").touch()  # no name server can be reached, and asking one takes seconds
    (folder / "operators").mkdir()
    built = Path(os.environ.get("TORCH_EXTENSIONS_DIR", ROOT / ".torch_extensions"))
    for name in addresses:  # locks of compilations are those of one host, so each has its own folder
        shutil.copytree(built, folder / f"operators-{name}", ignore=shutil.ignore_patterns("lock"))


def _start_host(folder: Path, name: str, address: str, switch: str, cable: str) -> Host:
    script = START.format(folder=folder, name=name)
    command = [
        "setpriv",
        "--pdeathsig",
        "KILL",
        "unshare",
        "--net",
        "--uts",
        "--mount",
        "--pid",
        "--ipc",
        "--fork",
        "--kill-child",
        "--mount-proc",
        "sh",
        "-c",
        script,
    ]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    _wait(lambda: bool(children.read_text().strip()), f"{name} did not start")
    host = Host(name, address, cable, process, int(children.read_text().split()[0]))
    _run("ip", "link", "add", cable, "type", "veth", "peer", "name", INTERFACE, "netns", str(host.init))
    _run("ip", "link", "set", cable, "master", switch, "up")
    host._inside("ip", "link", "set", "lo", "up")
    host._inside("ip", "address", "add", f"{address}/24", "dev", INTERFACE)
    host._inside("ip", "link", "set", INTERFACE, "up")
    return host


def _wait_for_ssh(made: Cluster, name: str) -> None:
    def lets_in() -> bool:
        with (made.folder / "ssh.log").open("w") as log:
            return made.hosts[0].start(["ssh", name, "true"], log).wait() == 0

    _wait(lets_in, f"no ssh to {name}; see {made.folder}/sshd-{name}.log")


def _wait(done: object, problem: str, seconds: float = 20) -> None:
    assert callable(done)
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, problem
        time.sleep(0.05)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
