"""Names, ports, ssh, and the way out. A network namespace plays the outside world."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from tests.smoke import guests
from tests.smoke.calls import Caller, banger, expect, host, wait_until
from tests.smoke.census import dns_address, nft_elements, ruleset
from tests.smoke.registry import scenario

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# RFC 5737: addresses that nobody has.
_OUTSIDE, _UPLINK = "198.51.100.2", "198.51.100.1"
_PORT = 8080
# The world beyond: tells whoever connects where from it sees them, and writes it down.
_LISTENER = """
import socket, sys
with socket.create_server((sys.argv[1], int(sys.argv[2]))) as server:
    print("listening", flush=True)
    while True:
        connection, peer = server.accept()
        with connection:
            print(peer[0], flush=True)
            connection.sendall(peer[0].encode() + b"\\n")
"""


@scenario("pure", "port 22 with its process and `<name>.vm` endpoint; loopback ports marked",
          shared_vm=True)  # fmt: skip
def vm_ports() -> None:
    vm = guests.shared()
    inner = "/usr/sbin/sshd -p 2222 -o ListenAddress=127.0.0.1 -o PidFile=/run/inner.pid"
    banger("vm", "exec", vm, "--", "sh", "-c", inner)
    wait_until(lambda: {22, 2222} <= {row["port"] for row in _ports(vm)}, "both ports")
    rows = {row["port"]: row for row in _ports(vm)}
    expect(len(rows) == len(_ports(vm)), "a port is listed twice")
    expect(rows[22]["endpoint"] == f"{vm}.vm:22", f"port 22 is at {rows[22]['endpoint']}")
    expect(rows[22]["process"] == "sshd", f"port 22 belongs to {rows[22]['process']}")
    expect(rows[22]["reachable"] is True, "port 22 is said not to be reachable")
    expect(rows[2222]["reachable"] is False, "a loopback port is said to be reachable")
    text = banger("vm", "ports", vm)
    expect(f"{vm}.vm:22" in text, "the table lacks the endpoint")
    banger("vm", "exec", vm, "--", "sh", "-c", "kill $(cat /run/inner.pid)")


def _wait_for_sshd(vm: str) -> None:
    """A VM is ready when its agent is; sshd comes soon after."""
    wait_until(lambda: 22 in {row["port"] for row in _ports(vm)}, f"sshd in {vm}")


def _ports(vm: str) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = banger.json("vm", "ports", "--json", vm)
    return rows


@scenario("pure", "`<name>.vm` through the system's own lookup, and ssh by it; gone after stop",
          shared_vm=True)  # fmt: skip
def dns() -> None:
    vm = guests.shared()
    address = guests.show(vm)["address"]
    expect(dns_address(vm) == address, "banger's own server does not know it")
    expect(_lookup(f"{vm}.vm") == address, "the system's lookup does not know it")
    expect(_lookup(f"{vm}.VM".upper()) == address, "upper case is another name")
    expect(_lookup("nobody.vm") is None, "a name that nobody has was found")
    reverse = host("getent", "hosts", address, status=None).split()
    expect(reverse[1:] == [f"{vm}.vm"], f"the address leads to {reverse}")
    banger("vm", "stop", vm)
    expect(dns_address(vm) is None, "banger's own server still knows it")
    expect(_lookup(f"{vm}.vm") is None, "the system's lookup still knows it")


def _lookup(name: str) -> str | None:
    """What any program of the host is told: nsswitch.conf, resolv.conf, systemd-resolved."""
    words = banger.run("getent", "ahostsv4", name).out.split()
    return words[0] if words else None


@scenario("pure", "strict checking holds at first contact; a wrong key is named as such",
          shared_vm=True)  # fmt: skip
def ssh_hostkey() -> None:
    vm = guests.shared()
    _wait_for_sshd(vm)
    out = banger("vm", "ssh", vm, "--", "hostname")
    expect(out == f"{vm}\n", f"ssh gave {out!r}")
    other = "rm -f /root/key /root/key.pub; ssh-keygen -q -t ed25519 -N '' -f /root/key"
    swap = "mv /root/key /etc/ssh/ssh_host_ed25519_key; pkill -HUP -x sshd || pkill -HUP -o sshd"
    # It closes its socket first, and starts anew.
    served = (
        'until ssh-keyscan -t ed25519 127.0.0.1 2>/dev/null | grep -qF "$(cut -d" " -f2 '
        '/root/key.pub)"; do sleep 0.2; done'
    )
    banger("vm", "exec", vm, "--", "sh", "-c", f"{other}; {swap}; {served}")
    done = banger.done("vm", "ssh", vm, "--", "hostname")
    expect(done.status == 1, f"status {done.status}")
    expect("host key" in done.err.lower(), f"the message is {done.err!r}")
    # The right key is written at each boot.
    banger("vm", "restart", vm)


@scenario("global", "install and uninstall twice: the user's own lines stay; `ssh NAME.vm` works")
def ssh_config() -> None:
    with tempfile.TemporaryDirectory(prefix="home-", dir=banger.home) as directory:
        home = Path(directory)
        user = Caller(user=banger.user, program=banger.program, extra={"HOME": directory})
        user_lines = "# mine\nHost elsewhere\n\tUser me\n"
        (home / ".ssh").mkdir(mode=0o700)
        (home / ".ssh" / "config").write_text(user_lines)
        for path in (home, home / ".ssh", home / ".ssh" / "config"):
            shutil.chown(path, banger.user, banger.user)
        config = home / ".ssh" / "config"
        user("ssh-config", "--install")
        installed = config.read_text()
        expect(
            installed.endswith(user_lines), f"the user's lines are not as they were: {installed}"
        )
        user("ssh-config", "--install")
        expect(config.read_text() == installed, "the second install changed the file")
        effective = user.run("ssh", "-F", str(config), "-G", "any.vm").out.splitlines()
        expect("user root" in effective, "`ssh any.vm` would not log in as root")
        with guests.vm("named") as vm:
            _wait_for_sshd(vm)
            done = user.run("ssh", "-F", str(config), "-o", "BatchMode=yes", f"{vm}.vm", "hostname")
            print(done.err)
            expect(done.out == f"{vm}\n", f"ssh {vm}.vm gave {done.out!r}")
        for _ in range(2):
            user("ssh-config", "--uninstall")
            expect(config.read_text() == user_lines, "uninstall did not restore the file")


@scenario("global", "traffic leaves with --nat only: live switch, one copy, masqueraded, gone")
def nat() -> None:
    with _outside_world() as seen, guests.vm("out") as vm:
        expect(not _reaches(vm), "without --nat the guest reached the outside")
        expect(seen() == [], f"without --nat the outside saw {seen()}")
        banger("vm", "set", vm, "--nat")
        wait_until(lambda: _reaches(vm), "the guest to reach the outside with NAT")
        expect(set(seen()) == {_UPLINK}, f"the outside saw {seen()}, not the host's address")
        _expect_nat(elements=1)
        banger("vm", "set", vm, "--no-nat")
        _expect_nat(elements=0)
        expect(not _reaches(vm), "after --no-nat the guest still reaches the outside")
        banger("vm", "set", vm, "--nat")
        banger("vm", "stop", vm)
        _expect_nat(elements=0)
        banger("vm", "start", vm)
        _expect_nat(elements=1)
        wait_until(lambda: _reaches(vm), "the guest to reach the outside after stop and start")
        _expect_closed(guests.show(vm)["address"])
    _expect_nat(elements=0)


def _expect_nat(*, elements: int) -> None:
    """So many VMs with NAT, and the rule that serves them all exactly once."""
    found = nft_elements("bridge", "nat_taps")
    expect(len(found) == elements, f"nat_taps holds {found}, expected {elements}")
    rules = [entry for entry in ruleset() if "masquerade" in str(entry.get("rule", {}))]
    expect(len(rules) == 1, f"{len(rules)} masquerade rules, expected one")


def _expect_closed(address: str) -> None:
    """The other direction: nobody outside may open a connection to a guest."""
    outside = ("ip", "netns", "exec", "outside")
    host(*outside, "ip", "route", "add", f"{address}/32", "via", _UPLINK)
    probe = f"timeout 3 bash -c 'exec 3<>/dev/tcp/{address}/22' && echo reached"
    out = host(*outside, "sh", "-c", probe, status=None)
    expect(out == "", "the outside reached a guest")


def _reaches(vm: str) -> bool:
    script = f"exec 3<>/dev/tcp/{_OUTSIDE}/{_PORT} && cat <&3"
    done = banger.done("vm", "exec", vm, "--", "timeout", "8", "bash", "-c", script)
    return done.status == 0 and done.out == f"{_UPLINK}\n"


@contextlib.contextmanager
def _outside_world() -> Iterator[Callable[[], list[str]]]:
    """A host beyond this one's uplink, with a listener; yields what tells whom it has seen."""
    inside = ("ip", "-n", "outside")
    host("ip", "netns", "add", "outside")
    try:
        host("ip", "link", "add", "uplink", "type", "veth", "peer", "eth0", "netns", "outside")
        host("ip", "address", "add", f"{_UPLINK}/24", "dev", "uplink")
        host("ip", "link", "set", "uplink", "up")
        host(*inside, "address", "add", f"{_OUTSIDE}/24", "dev", "eth0")
        host(*inside, "link", "set", "eth0", "up")
        with _listener() as seen:
            yield seen
    finally:
        host("ip", "netns", "delete", "outside")
        # The first namespace of a host leaves this behind.
        host("umount", "/run/netns")


@contextlib.contextmanager
def _listener() -> Iterator[Callable[[], list[str]]]:
    command = ["ip", "netns", "exec", "outside", sys.executable, "-u", "-c", _LISTENER]
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory) / "seen"
        with log.open("wb") as out:
            process = subprocess.Popen([*command, _OUTSIDE, str(_PORT)], stdout=out)
        try:
            wait_until(lambda: log.read_text() == "listening\n", "the listener outside")
            yield lambda: log.read_text().split()[1:]
        finally:
            process.kill()
            process.wait()
