"""The table of checks, in the order in which they are shown: from the host up to the guests."""

from __future__ import annotations

from typing import TYPE_CHECKING

from banger.doctor import (
    configuration,
    guest,
    host,
    installation,
    leases,
    names,
    network,
    storage,
    vmm,
)

if TYPE_CHECKING:
    from banger.doctor.check import Check

_ALL = {
    check.name: check
    for module in (
        host,
        vmm,
        installation,
        storage,
        configuration,
        network,
        names,
        leases,
        guest,
    )
    for check in module.CHECKS
}

_ORDER = (
    # What this host is
    "architecture",
    "version",
    "vmm",
    "kvm access",
    "firecracker",
    "jailer",
    "qemu",
    "host tools",
    "user namespaces",
    "cgroup",
    "clock",
    # What is installed
    "helper",
    "installed files",
    "units",
    "daemon",
    "store",
    "directories",
    "disk space",
    "memory",
    "cache",
    "config",
    "vm defaults",
    "file_sync",
    # The network, and what is held
    "network",
    "bridge",
    "packet filter",
    "forwarding",
    "leases",
    "leftovers",
    "vm dns",
    "resolver",
    # What guests are made of
    "agent",
    "default image",
    "default kernel",
    "ssh key",
    "ssh_config",
)

CHECKS: tuple[Check, ...] = tuple(_ALL[name] for name in _ORDER)
assert len(CHECKS) == len(_ALL), "every check has its place in the table"
