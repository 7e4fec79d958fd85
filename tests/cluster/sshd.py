"""An ssh daemon of our own on this host, which answers on 127.0.0.1 and 127.0.0.2 as if they were two hosts."""

from __future__ import annotations

import shutil
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tests.support import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator

HOSTS = ("127.0.0.1", "127.0.0.2")


@contextmanager
def ssh_daemon(folder: Path) -> Iterator[str]:
    """Run sshd with keys made for it in ``folder``; yields the options with which ssh gets in."""
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    port = free_port()
    Path("/run/sshd").mkdir(exist_ok=True)  # sshd separates privileges there, and only an installed service makes it
    (folder / "config").write_text(
        f"ListenAddress 127.0.0.1\nListenAddress 127.0.0.2\nPort {port}\nHostKey {folder / 'host'}\n"
        f"AuthorizedKeysFile {folder / 'user.pub'}\nStrictModes no\nUsePAM no\nPidFile none\nPermitRootLogin yes\n"
    )
    program = shutil.which("sshd") or "/usr/sbin/sshd"  # by its whole path, as it starts itself again
    with (folder / "log").open("wb") as log:
        daemon = subprocess.Popen([program, "-D", "-e", "-f", folder / "config"], stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 20
        while "Server listening on 127.0.0.2" not in (folder / "log").read_text():
            assert daemon.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.1)
        yield (
            f"-p {port} -i {folder / 'user'} -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null "
            "-o LogLevel=ERROR"
        )
    finally:
        daemon.terminate()
        daemon.wait(20)
