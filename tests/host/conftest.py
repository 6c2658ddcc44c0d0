"""The rungs of host tests: a namespace, leases made in it, guests on their taps."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest

from banger_root import cgroup, validate
from banger_root.leases import Leases
from banger_root.ledger import Ledger
from host.namespace import census, find_obstacle, own_namespace

BRIDGE = {"name": "br-fc-t1", "address": "172.31.0.1", "prefix": 24}
BRIDGE_MAC = "06:00:ac:1f:00:01"


def build_params(
    number: int,
    *,
    vm_id: str | None = None,
    isolate: bool = True,
    nat: bool = False,
    ports: tuple[int, ...] = (),
    **bridge: Any,
) -> dict[str, Any]:
    """Params of `prepare` for the guest with this host number on the test's bridge."""
    fields = {**BRIDGE, **bridge}
    address = f"{fields['address'].rpartition('.')[0]}.{number}"
    return {
        "vm_id": vm_id or secrets.token_hex(16),
        "bridge": fields,
        "guest": {"address": address, "mac": validate.mac_of(IPv4Address(address))},
        "isolate": isolate,
        "announce_port": 7001,
        "nat": nat,
        "guest_host_ports": list(ports),
        "limits": {"vcpu": 1, "memory_mib": 128},
        "jail": False,
    }


def build_plan(number: int, **changes: Any) -> validate.LeasePlan:
    return validate.parse_prepare(build_params(number, **changes))


@pytest.fixture(scope="session")
def obstacle() -> str | None:
    return find_obstacle()


@pytest.fixture
def namespace(obstacle: str | None) -> Iterator[None]:
    """A network namespace of this test's own."""
    if obstacle:
        pytest.skip(obstacle)
    with own_namespace():
        yield


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    ledger = Ledger(str(tmp_path / "leases"))
    yield ledger
    ledger.close()


@pytest.fixture
def leases(namespace: None, ledger: Ledger) -> Iterator[Leases]:
    """The helper's leases in this process; the test gives back what it makes, or fails."""
    before = census()
    leases = Leases(ledger, owner_uid=0)
    yield leases
    held = ledger.entries()[0]
    for entry in held:
        leases.release(entry.id)
    assert census() == before
    assert os.listdir(ledger.directory) == []
    for entry in held:
        path = cgroup.find_directory(entry.id)
        assert path is None or not Path(path).exists()


@pytest.fixture
def prepared(leases: Leases) -> Callable[..., validate.LeasePlan]:
    """Make the lease of the guest with a host number; its plan."""

    def make(number: int, **changes: Any) -> validate.LeasePlan:
        plan = build_plan(number, **changes)
        leases.prepare(plan)
        return plan

    return make
