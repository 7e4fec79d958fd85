"""Hostfiles as DeepSpeed and Open MPI read them: one line ``HOST slots=RANKS`` per host."""

from __future__ import annotations

import re
from pathlib import Path

from dualtok.errors import ConfigError

LINE = re.compile(r"^(\S+)\s+slots=(\d+)\s*(#.*)?$")


def read_hostfile(path: str | Path) -> dict[str, int]:
    """Return the slots of each host, in the file's order.

    Raises:
        ConfigError: the file is missing, has a line of another form, a host twice, or no host.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise ConfigError(f"launch.hostfile: {path}: {reason}; write one line `HOST slots=RANKS` per host") from None
    hosts: dict[str, int] = {}
    for number, raw in enumerate(text.splitlines(), start=1):
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        match = LINE.match(line)
        if match is None:
            raise ConfigError(f"{path}, line {number}: {line!r} is not of the form `HOST slots=RANKS`")
        if match[1] in hosts:
            raise ConfigError(f"{path}, line {number}: {match[1]} is there twice; give it once, with all its slots")
        hosts[match[1]] = int(match[2])
    if not hosts:
        raise ConfigError(f"launch.hostfile: {path}: no host in it; write one line `HOST slots=RANKS` per host")
    return hosts


def choose_hosts(path: str | Path, nodes: int | None, gpus: int | None) -> tuple[list[str], int]:
    """Return the hosts that a job uses and its ranks per host; what is not given is taken from the file.

    Raises:
        ConfigError: the file has too few hosts, or a host too few slots; or hosts differ in slots and ``gpus`` is not
            given: DeepSpeed's launcher gives wrong local ranks then.
    """
    slots = read_hostfile(path)
    if nodes is not None and nodes > len(slots):
        raise ConfigError(f"--nodes {nodes}: {path} has {len(slots)} hosts")
    used = dict(list(slots.items())[:nodes])
    if gpus is None:
        if len(set(used.values())) > 1:
            listed = ", ".join(f"{host}: {count}" for host, count in used.items())
            raise ConfigError(f"{path}: hosts have different numbers of slots ({listed}); give --gpus for all of them")
        gpus = next(iter(used.values()))
    few = [f"{host}: {count}" for host, count in used.items() if count < gpus]
    if few:
        raise ConfigError(f"--gpus {gpus}: {path} has hosts with fewer slots ({', '.join(few)})")
    return list(used), gpus
