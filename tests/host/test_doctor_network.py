"""Doctor's network checks against a real kernel: what they warn of, their command then mends.

Everything happens in a network namespace of the test's own.
"""

from __future__ import annotations

import asyncio
import shlex
import subprocess
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest

from banger.api.doctor import DoctorRow
from banger.doctor.helper import ask_helper
from banger.doctor.world import World
from banger.host.host import Host
from banger.host.lease import HostStatus
from banger.host.privilege import Privilege
from banger_root.leases import Leases
from fakes.doctor import FakeWorld
from host.namespace import run


class HelperHere:
    """The root helper's own status, in this process and so in this namespace."""

    privilege = Privilege(kind="root")

    def __init__(self, leases: Leases) -> None:
        self._leases = leases

    async def status(self) -> HostStatus:
        return msgspec.convert(self._leases.status(), type=HostStatus)


class WithRealPrograms(FakeWorld):
    """Facts of the test, programs and kernel of this host."""

    find_program = World.find_program
    run = World.run


@pytest.fixture
def world(tmp_path: Path, namespace: None) -> WithRealPrograms:
    return WithRealPrograms(tmp_path)


def look_at_forwarding(world: FakeWorld, leases: Leases) -> DoctorRow:
    world.known["helper"] = asyncio.run(ask_helper(cast(Host, HelperHere(leases))))
    return world.row("forwarding")


def type_command(row: DoctorRow) -> None:
    """The row's command, as root, who needs no sudo."""
    assert row.command is not None
    words = shlex.split(row.command)
    subprocess.run(words[1:] if words[0] == "sudo" else words, check=True)


DROPPING = (
    "add table inet filter",
    "add chain inet filter forward { type filter hook forward priority 10; policy drop; }",
    "add rule inet filter forward ct state established,related accept",
)


def load(*rules: str) -> None:
    subprocess.run(["nft", "-f", "-"], input="\n".join(rules), text=True, check=True)


def test_a_policy_that_drops_what_is_forwarded_is_mended_by_the_command(
    world: WithRealPrograms, leases: Leases
) -> None:
    assert look_at_forwarding(world, leases).level == "PASS"
    load(*DROPPING)
    try:
        row = look_at_forwarding(world, leases)
        assert row.level == "WARN"
        assert "the chain forward of the table inet filter" in row.message
        type_command(row)
        assert look_at_forwarding(world, leases).level == "PASS"
    finally:
        run("nft delete table inet filter")


def test_firewalld_is_told_in_its_own_words(world: WithRealPrograms, leases: Leases) -> None:
    load(
        "add table inet firewalld",
        "add chain inet firewalld filter_FORWARD { type filter hook forward priority 10; }",
        "add rule inet firewalld filter_FORWARD ct state established,related accept",
        "add rule inet firewalld filter_FORWARD reject with icmpx admin-prohibited",
    )
    try:
        row = look_at_forwarding(world, leases)
        assert row.level == "WARN"
        assert row.command is not None and row.command.startswith("sudo firewall-cmd ")
    finally:
        run("nft delete table inet firewalld")


def test_a_vpn_that_comes_up_over_the_bridges_subnet_is_found(world: WithRealPrograms) -> None:
    assert world.row("network").level == "PASS"
    run("ip link add vpn0 type bridge")
    run("ip address add 172.16.4.7/16 dev vpn0")
    run("ip link set vpn0 up")
    row = world.row("network")
    assert row.level == "FAIL"
    assert "172.16.4.7/16 of vpn0" in row.message
    # The subnet that it proposes overlaps nothing.
    proposed = row.details[-1].split('"')[1]
    world.set_settings(bridge_ip=proposed, cidr=24)
    assert world.row("network").level == "PASS"
    world.set_settings()
    run("ip link delete vpn0")
    assert world.row("network").level == "PASS"


def test_flushed_rules_are_found_and_a_loaded_set_passes(
    world: WithRealPrograms, leases: Leases, prepared: Any
) -> None:
    prepared(2)
    world.known["helper"] = asyncio.run(ask_helper(cast(Host, HelperHere(leases))))
    assert world.row("packet filter").level == "PASS"
    run("nft flush set bridge banger vm_ports")
    assert world.row("packet filter").level == "FAIL"
