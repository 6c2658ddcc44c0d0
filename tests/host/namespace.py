"""A network namespace of the test's own, and a census of what banger left on this host."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from patience import PATIENCE_S

_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


def find_obstacle() -> str | None:
    """The capability that this host lacks for tests with links, or None."""
    if os.geteuid() != 0:
        return "needs root to make network namespaces"
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        return "needs /dev/net/tun"
    for program, package in (("ip", "iproute2"), ("nft", "nftables")):
        if not any(Path(d, program).exists() for d in ("/usr/sbin", "/usr/bin", "/sbin")):
            return f"needs {program} (Debian package {package})"
    done = subprocess.run(["unshare", "--net", "true"], capture_output=True)
    return "needs CAP_SYS_ADMIN to make network namespaces" if done.returncode else None


@contextmanager
def own_namespace() -> Iterator[None]:
    """This thread, and what it starts, in a fresh network namespace with loopback up."""
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        _check(_libc.unshare(_CLONE_NEWNET))
        try:
            run("ip link set lo up")
            yield
        finally:
            _check(_libc.setns(before, _CLONE_NEWNET))
    finally:
        os.close(before)


def run(command: str) -> str:
    """Run a host tool of known words; its output."""
    done = subprocess.run(command.split(), capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


def ip(command: str) -> Any:
    """`ip -j -d …` decoded."""
    return json.loads(run(f"ip -j -d {command}") or "[]")


def wait_for_carrier(*links: str, inside: str = "") -> None:
    """Until links that are up let frames through; before that the kernel drops them unseen.

    A worker of the kernel notices the carrier, when it comes to that (net/core/link_watch.c).
    `inside`: the command that leads into the namespace of the links.
    """
    deadline = time.monotonic() + PATIENCE_S
    for name in links:
        while json.loads(run(f"{inside} ip -j link show dev {name}"))[0]["operstate"] != "UP":
            assert time.monotonic() < deadline, f"{name} has no carrier"
            os.sched_yield()


def elements() -> dict[str, list[Any]]:
    """The elements of banger's sets, as `nft -j` shows them; empty without tables."""
    found: dict[str, list[Any]] = {}
    for item in json.loads(run("nft -j list ruleset"))["nftables"]:
        if "set" in item and (item["set"]["table"], item["set"]["name"]) == ("banger", "layout"):
            continue
        if "set" in item and item["set"]["table"] == "banger":
            members = item["set"].get("elem", [])
            found[item["set"]["name"]] = sorted(
                (m["concat"] if isinstance(m, dict) else m for m in members), key=str
            )
    return found


def census() -> dict[str, Any]:
    """Links, addresses, routes and rules of this namespace."""
    return {
        "links": sorted(link["ifname"] for link in ip("link show")),
        "addresses": sorted(
            info["local"]
            for link in ip("address show")
            for info in link["addr_info"]
            if info["family"] == "inet"
        ),
        "routes": sorted(str(route["dst"]) for route in ip("route show table all")),
        "rules": run("nft list ruleset"),
    }


def _check(status: int) -> None:
    if status != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
