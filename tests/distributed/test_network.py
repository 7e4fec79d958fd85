"""Interfaces of this host, as the ranks choose among them."""

from __future__ import annotations

import subprocess
import sys

import psutil
import pytest

from dualtok.distributed.network import address_of, check_interfaces, own_address
from dualtok.errors import ConfigError


def test_an_interface_that_the_host_lacks_is_refused_by_name() -> None:
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        with pytest.raises(ConfigError, match=r"has no interface 'lo0' \(did you mean 'lo'\?\); it has .*lo"):
            check_interfaces({variable: "lo,lo0"})


def test_what_only_nccl_can_judge_passes() -> None:
    prefix = next(iter(psutil.net_if_addrs()))[:1]
    check_interfaces({})
    check_interfaces({"NCCL_SOCKET_IFNAME": "^docker,lo0"})
    check_interfaces({"NCCL_SOCKET_IFNAME": prefix})
    check_interfaces({"NCCL_SOCKET_IFNAME": "=lo"})


def test_the_address_is_that_of_the_interface_that_is_named() -> None:
    assert own_address({"GLOO_SOCKET_IFNAME": "lo"}) == "127.0.0.1"
    assert own_address({"NCCL_SOCKET_IFNAME": "^lo"}) == own_address({})
    everything = {entry.address for entries in psutil.net_if_addrs().values() for entry in entries}
    assert own_address({}) in everything


def test_scripts_can_ask_for_it() -> None:
    def ask(name: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "dualtok.distributed.network", name]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    assert ask("lo").stdout == f"{address_of('lo')}\n"
    refused = ask("lo0")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith("dualtok: error: launch.interface: ")
