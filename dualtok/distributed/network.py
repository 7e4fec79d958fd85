"""Network interfaces of this host: which of them ranks use to reach each other.

``python -m dualtok.distributed.network eth0`` prints the interface's address, for the scripts that start ranks.
"""

from __future__ import annotations

import socket
import sys
from typing import TYPE_CHECKING

import psutil

from dualtok.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Mapping

INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def free_port() -> int:
    """Return a port that nobody on this host uses now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def address_of(interface: str) -> str:
    """Return the IPv4 address of one of this host's interfaces.

    Raises:
        ConfigError: this host has no such interface, or it has no such address; names those that it has.
    """
    addresses = psutil.net_if_addrs()
    if interface not in addresses:
        raise ConfigError(
            f"launch.interface: {socket.gethostname()} has no interface {interface!r}"
            f"{did_you_mean(interface, addresses)}; it has {', '.join(addresses)}"
        )
    for entry in addresses[interface]:
        if entry.family == socket.AF_INET:
            return str(entry.address)
    raise ConfigError(f"launch.interface: {interface!r} of {socket.gethostname()} has no IPv4 address; use another one")


def own_address(environment: Mapping[str, str]) -> str:
    """Return the address under which other hosts reach this one: that of the interface that the variables of gloo or
    NCCL name, else of the one that packets to anywhere else leave by, else the loopback's."""
    for variable in INTERFACE_VARIABLES:
        for name in _exact_names(environment.get(variable, "")):
            return address_of(name)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # an address kept for documentation; connecting a datagram sends nothing
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])


def check_interfaces(environment: Mapping[str, str]) -> None:
    """Refuse interfaces that this host does not have: gloo's own error names no host, and NCCL waits for minutes.

    Raises:
        ConfigError: as :func:`address_of`.
    """
    for variable in INTERFACE_VARIABLES:
        for name in _exact_names(environment.get(variable, "")):
            address_of(name)


def _exact_names(value: str) -> list[str]:
    """Return the interfaces that a variable names in full. NCCL also knows prefixes (``eth``) and exclusions (``^``),
    which only it can judge."""
    known = psutil.net_if_addrs()
    names = [] if value.startswith("^") else value.removeprefix("=").split(",")
    return [name for name in names if name and (name in known or not any(k.startswith(name) for k in known))]


if __name__ == "__main__":
    try:
        print(address_of(sys.argv[1]))
    except ConfigError as problem:
        print(f"dualtok: error: {problem}", file=sys.stderr)
        sys.exit(2)
