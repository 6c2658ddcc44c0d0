"""`banger doctor` on a furnished installation, after a crash, and with its trials."""

from __future__ import annotations

import json
import os
import select
import signal
from typing import Any

import pytest

from boot.installation import PATIENCE_S, SMALL, Done, Installation

pytestmark = pytest.mark.usefixtures("nothing_left")


def rows(done: Done) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in json.loads(done.out):
        found.setdefault(row["check"], []).append(row)
    return found


def levels(found: dict[str, list[dict[str, Any]]], check: str) -> list[str]:
    return [row["level"] for row in found[check]]


def kill(pid: int) -> None:
    fd = os.pidfd_open(pid)
    try:
        os.kill(pid, signal.SIGKILL)
        assert select.select([fd], [], [], PATIENCE_S)[0]
    finally:
        os.close(fd)


def test_a_working_installation_passes_or_says_what_mends_it(
    banger: Installation, web: str
) -> None:
    done = banger("doctor", "--json")
    found = rows(done)
    failing = [row for check in found.values() for row in check if row["level"] == "FAIL"]
    assert done.status == (1 if failing else 0)
    assert all(row["command"] for row in failing), failing
    for check in ("store", "daemon", "helper", "config", "leases", "leftovers", "agent"):
        assert levels(found, check) == ["PASS"], found[check]
    assert any(web in line for line in found["memory"][0]["details"])


def test_trials_boot_a_vm_and_leave_nothing(banger: Installation) -> None:
    found = rows(banger("doctor", "--deep", "--json"))
    assert levels(found, "trial lease") == levels(found, "trial VM") == ["PASS"], found


def test_fix_after_a_crash_leaves_the_host_as_before(banger: Installation) -> None:
    before = banger.census()
    banger.ok("vm", "create", "--name", "lost", *SMALL)
    vmm = banger.handles("lost")["process"]["pid"]
    # Everything dies at once; the next daemon is doctor's.
    banger.kill_daemon()
    kill(vmm)
    stranger = banger.state / "vms" / ("ab" * 16)
    stranger.mkdir()
    staging = banger.state / "images" / ".build-x-12345678"
    staging.mkdir()
    found = rows(banger("doctor", "--json"))
    assert "WARN" in levels(found, "leftovers")
    found = rows(banger("doctor", "--fix", "--json"))
    assert levels(found, "leases") == levels(found, "leftovers") == ["PASS"], found
    assert not stranger.exists() and not staging.exists()
    assert banger.show("lost")["state"] == "stopped"
    banger.ok("vm", "delete", "lost")
    assert banger.census() == before
