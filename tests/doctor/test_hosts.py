"""Hosts entered through real ssh daemons on addresses of this machine: one in order, one with much that is wrong.

The second one's clock is 30 seconds fast (libfaketime); in a mount namespace of its own it sees another folder in place
of the shared one, and another version of a package.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.doctor.test_checks import plant
from tests.support import ROOT, dualtok, free_port

if TYPE_CHECKING:
    from collections.abc import Iterator

SSHD = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:" + os.environ["PATH"])
FAKETIME = next(iter(Path("/usr/lib").glob("*/faketime/libfaketime.so.1")), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1600),
    pytest.mark.skipif(
        SSHD is None or FAKETIME is None or os.geteuid() != 0,
        reason="needs root, sshd and libfaketime (apt-get install openssh-server faketime)",
    ),
]
GOOD, BAD, UNROUTED, CLOSED = "127.0.0.2", "127.0.0.3", "198.51.100.7", "127.0.0.4"
"""``UNROUTED`` is entered through an alias of ssh, but its address leads nowhere; at ``CLOSED`` nobody listens."""


@dataclass(frozen=True)
class Hosts:
    """What the doctor needs to enter them."""

    folder: Path
    shared: Path
    ssh: str

    def doctor(self, *slots: str, quick: bool = True, packages: bool = True) -> tuple[int, list[dict[str, Any]]]:
        """Return the status and what was found; ``packages``: the second host has another version of one."""
        hostfile, run = self.folder / "hostfile", self.folder / "run.yaml"
        hostfile.write_text("\n".join(slots) + "\n")
        run.write_text(f"data: {{dir: none}}\noutput_dir: {self.shared}\n")
        variables = {"PYTHONPATH": f"{self.folder}/packages:{ROOT}"} if packages else {}
        done = dualtok(
            "doctor",
            run,
            "--hosts",
            hostfile,
            "--ssh",
            self.ssh,
            "--json",
            *(["--quick"] if quick else []),
            timeout=1500,
            **variables,
        )
        assert done.returncode in (0, 1), done.stderr[-3000:]
        return done.returncode, json.loads(done.stdout)["checks"]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    folder, shared = tmp_path_factory.mktemp("ssh"), tmp_path_factory.mktemp("shared")
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    port = free_port()
    (folder / "config").write_text(
        f"Host *\n  Port {port}\n  IdentityFile {folder}/user\n  IdentitiesOnly yes\n  LogLevel ERROR\n"
        f"  StrictHostKeyChecking no\n  UserKnownHostsFile {folder}/known_hosts\n"
        f"Host {UNROUTED}\n  HostName {GOOD}\n"
    )
    Path("/run/sshd").mkdir(exist_ok=True)
    (folder / "packages").mkdir()
    plant(folder / "other", "datasets", "5.2.1")
    mounts = f'mount -t tmpfs tmpfs {shared} && mount --bind {folder}/other {folder}/packages && exec "$@"'
    hide = ["unshare", "--mount", "sh", "-c", mounts, "sh"]
    bad = f"LD_PRELOAD={FAKETIME} FAKETIME=+30s DONT_FAKE_MONOTONIC=1"
    before = set(Path("/dev/shm").glob("*faketime*"))
    servers = [_serve(folder, GOOD, port, "", []), _serve(folder, BAD, port, bad, hide)]
    try:
        yield Hosts(folder, shared, f"ssh -F {folder}/config")
    finally:
        for server in servers:
            server.terminate()
            server.wait(20)
        for left in set(Path("/dev/shm").glob("*faketime*")) - before:
            left.unlink(missing_ok=True)


def _serve(folder: Path, address: str, port: int, variables: str, around: list[str]) -> subprocess.Popen[bytes]:
    config = folder / f"sshd-{address}"
    config.write_text(
        f"ListenAddress {address}\nPort {port}\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/user.pub\n"
        f"PasswordAuthentication no\nKbdInteractiveAuthentication no\nStrictModes no\nUsePAM no\n"
        f"PermitRootLogin prohibit-password\nPidFile none\n" + (f"SetEnv {variables}\n" if variables else "")
    )
    server = subprocess.Popen([*around, str(SSHD), "-D", "-f", str(config)])
    deadline = time.monotonic() + 20
    while True:
        try:
            socket.create_connection((address, port), timeout=1).close()
            return server
        except OSError:
            assert time.monotonic() < deadline, "sshd does not start"
            time.sleep(0.1)


def found(checks: list[dict[str, Any]], name: str, host: str = "") -> dict[str, Any]:
    mine = [check for check in checks if (check["name"], check["host"]) == (name, host)]
    assert len(mine) == 1, (name, host, checks)
    assert mine[0]["remedy"] or mine[0]["status"] in ("ok", "not-run"), mine[0]
    return mine[0]


def test_a_host_with_a_wrong_clock_and_another_folder_is_named(hosts: Hosts) -> None:
    status, checks = hosts.doctor(f"{GOOD} slots=1", f"{BAD} slots=2", f"{CLOSED} slots=1")
    assert status == 1
    assert found(checks, "ssh", GOOD)["status"] == found(checks, "ssh", BAD)["status"] == "ok"
    closed = found(checks, "ssh", CLOSED)
    assert (closed["status"], "Connection refused" in closed["found"]) == ("fail", True), closed
    assert f"{CLOSED} true` work without questions" in closed["remedy"]
    assert found(checks, "clock skew", GOOD)["status"] == "ok"
    fast = found(checks, "clock skew", BAD)
    assert fast["status"] == "fail"
    assert float(fast["found"].split()[0]) == pytest.approx(30, abs=1), fast
    hidden = found(checks, "shared folder", BAD)
    assert (hidden["status"], hidden["found"]) == (
        "fail",
        f"{BAD} does not see what this host writes to {hosts.shared}",
    )
    assert found(checks, "shared folder", GOOD)["status"] == "ok"
    assert found(checks, "slots")["status"] == "fail"
    versions = found(checks, "same versions")
    assert (versions["status"], versions["found"]) == ("fail", f"datasets: 5.2.0 on {GOOD}, 5.2.1 on {BAD}")
    for host in (GOOD, BAD):
        assert found(checks, "ports", host)["status"] == "ok"
        for name in ("versions", "JIT locks", "operators", "disk", "shared memory"):
            assert found(checks, name, host)["status"] in ("ok", "warn")
    assert found(checks, "training")["found"] == "the hosts cannot work together: see ssh"
    assert list(hosts.shared.iterdir()) == []


def test_a_host_whose_name_leads_nowhere_is_named(hosts: Hosts) -> None:
    """ssh knows an alias, but ranks go by the name in the hostfile."""
    _, checks = hosts.doctor(f"{GOOD} slots=1", f"{UNROUTED} slots=1", packages=False)
    lost = found(checks, "ports", GOOD)
    assert lost["status"] == "fail"
    assert f"{GOOD} cannot reach port" in lost["found"]
    assert UNROUTED in lost["found"]
    assert found(checks, "ports", UNROUTED)["status"] == "ok", "the other way is open"
    assert found(checks, "collectives")["status"] == "not-run"


def test_two_hosts_in_order_train_together(hosts: Hosts) -> None:
    """The two are entered through one daemon."""
    alias = "127.0.0.5"
    config = hosts.folder / "config"
    config.write_text(config.read_text() + f"Host {alias}\n  HostName {GOOD}\n")
    status, checks = hosts.doctor(f"{GOOD} slots=1", f"{alias} slots=1", quick=False, packages=False)
    assert status == 0, [check for check in checks if check["status"] == "fail"]
    assert "2 ranks over gloo" in found(checks, "collectives")["found"]
    assert found(checks, "gradients")["status"] == found(checks, "loss kernels")["status"] == "ok"
    trained = found(checks, "training")
    assert trained["status"] == "ok"
    assert "on 2 ranks" in trained["found"]
    assert list(hosts.shared.iterdir()) == []


def test_ssh_that_is_not_there_is_said(hosts: Hosts) -> None:
    status, checks = Hosts(hosts.folder, hosts.shared, "no-such-ssh").doctor(f"{GOOD} slots=1", packages=False)
    assert status == 1
    assert [check["name"] for check in checks] == ["ssh"]
    assert "no-such-ssh: No such file" in checks[0]["found"]
