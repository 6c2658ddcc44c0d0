"""No root, no sudo: QEMU's own network, and the same commands.

A user namespace plays the ordinary user: the daemon sees uid 1000 and may make no link, while the
files stay where every test has them.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from boot.installation import SMALL, Installation

_AS_USER = ("unshare", "--user", "--map-user=1000", "--map-group=1000")


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    if os.geteuid() == 0:
        if subprocess.run([*_AS_USER, "true"], capture_output=True, check=False).returncode:
            pytest.skip("this host allows no user namespaces")
        wrapper = _AS_USER
    else:
        wrapper = ()
    installation = Installation(
        tmp_path_factory.mktemp("u"), bridge="br-fc", address="172.16.0.1", wrapper=wrapper
    )
    installation.furnish()
    yield installation
    installation.close()


@pytest.fixture(scope="module")
def alone(user: Installation) -> Iterator[str]:
    """A VM on QEMU's own network; the tests leave it running."""
    user.ok("vm", "create", "--name", "alone", *SMALL)
    yield "alone"
    user("vm", "delete", "alone")


def test_status_says_that_the_network_is_the_users_and_why(user: Installation) -> None:
    status = user.json("daemon", "status", "--json")
    assert status["network"] == "user"
    assert "ordinary user" in status["network_note"] or "sudo" in status["network_note"]


def test_a_repository_runs_without_any_privilege(user: Installation, repository: Path) -> None:
    script = "make -s test; exit 42"
    done = user("vm", "run", "--rm", *SMALL, str(repository), "--", "sh", "-c", script)
    assert done.status == 42, done.err + user.evidence()
    assert "ran in /root/repo" in done.text
    assert [vm["name"] for vm in user.json("vm", "list", "--json") if vm["ephemeral"]] == []


def test_a_guest_without_privilege_reaches_nothing(user: Installation, alone: str) -> None:
    probe = "if timeout 3 bash -c '</dev/tcp/10.0.2.2/22'; then echo open; else echo closed; fi"
    assert user.ok("vm", "exec", alone, "--", "bash", "-c", probe).text == "closed\n"


def test_ssh_goes_through_the_agent(user: Installation, alone: str) -> None:
    user.wait_for_sshd(alone)
    done = user("vm", "ssh", alone, "--", "echo via $SSH_CONNECTION; exit 7")
    assert done.status == 7, done.err
    assert done.text.startswith("via 127.0.0.1 ")


def test_it_stops_and_starts(user: Installation, alone: str) -> None:
    user.ok("vm", "exec", alone, "--", "sh", "-c", "echo kept > /root/kept")
    user.ok("vm", "stop", alone)
    user.ok("vm", "start", alone)
    assert user.ok("vm", "exec", alone, "--", "cat", "/root/kept").text == "kept\n"
