"""Names, ports, ssh, and the way out. A network namespace plays the outside world."""

from __future__ import annotations

import contextlib
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from tests.smoke import guests
from tests.smoke.calls import Caller, banger, expect, host, wait_until
from tests.smoke.census import dns_address, nft_elements, ruleset
from tests.smoke.registry import scenario

if TYPE_CHECKING:
    from collections.abc import Iterator

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
    wait_until(lambda: any(row["port"] == 22 for row in _ports(vm)), "sshd in `vm ports`")
    (ssh,) = {(row["port"], row["proto"], row["endpoint"]) for row in _ports(vm)
              if row["port"] == 22}  # fmt: skip
    expect(ssh == (22, "tcp", f"{vm}.vm:22"), f"the row is {ssh}")
    text = banger("vm", "ports", vm)
    expect("sshd" in text and f"{vm}.vm:22" in text, "the table lacks process or endpoint")


def _ports(vm: str) -> list[dict[str, object]]:
    answer = banger.json("vm", "ports", "--json", vm)
    rows: list[dict[str, object]] = answer[0]["ports"] if isinstance(answer, list) else answer
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
    wait_until(lambda: any(row["port"] == 22 for row in _ports(vm)), "sshd in the guest")
    out = banger("vm", "ssh", vm, "--", "hostname")
    expect(out == f"{vm}\n", f"ssh gave {out!r}")
    other = "rm -f /root/key /root/key.pub; ssh-keygen -q -t ed25519 -N '' -f /root/key"
    swap = "mv /root/key /etc/ssh/ssh_host_ed25519_key; pkill -HUP -x sshd || pkill -HUP -o sshd"
    banger("vm", "exec", vm, "--", "sh", "-c", f"{other}; {swap}")
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
        expect(installed.endswith(user_lines), f"the user's lines are not as they were: {installed}")
        user("ssh-config", "--install")
        expect(config.read_text() == installed, "the second install changed the file")
        effective = user.run("ssh", "-F", str(config), "-G", "any.vm").out.splitlines()
        expect("user root" in effective, "`ssh any.vm` would not log in as root")
        with guests.vm("named") as vm:
            done = user.run(
                "ssh", "-F", str(config), "-o", "BatchMode=yes", f"{vm}.vm", "hostname"
            )
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
        expect(_reaches(vm), "with NAT the guest does not reach the outside")
        expect(seen() == [_UPLINK], f"the outside saw {seen()}, not the host's address")
        expect(_nat_elements() == 1, f"{_nat_elements()} elements of nat_taps, expected one")
        expect("masquerade" in str(ruleset()), "no masquerade rule")
        banger("vm", "set", vm, "--no-nat")
        expect(_nat_elements() == 0, "the element is there after --no-nat")
        expect(not _reaches(vm), "after --no-nat the guest still reaches the outside")
        banger("vm", "set", vm, "--nat")
        banger("vm", "stop", vm)
        expect(_nat_elements() == 0, "the element is there after stop")
        banger("vm", "start", vm)
        expect(_nat_elements() == 1, "not exactly one element after stop and start")
        expect(_reaches(vm), "after stop and start the guest does not reach the outside")
        # The other direction: nobody outside may open a connection to a guest.
        address = guests.show(vm)["address"]
        host("ip", "netns", "exec", "outside", "ip", "route", "add", f"{address}/32", "via", _UPLINK)
        probe = ("bash", "-c", f"exec 3<>/dev/tcp/{address}/22")
        host_status = host(
            "ip", "netns", "exec", "outside", "timeout", "3", *probe, status=None
        )
        expect(host_status == "", "the outside reached the guest")
    expect(_nat_elements() == 0, "the element is there after delete")
    expect(seen_masks() == 1, "the masquerade rule is there more than once")


def seen_masks() -> int:
    """How many masquerade rules there are."""
    return str(ruleset()).count("'masquerade'")


def _nat_elements() -> int:
    return len(nft_elements("bridge", "nat_taps"))


def _reaches(vm: str) -> bool:
    script = f"exec 3<>/dev/tcp/{_OUTSIDE}/{_PORT} && cat <&3"
    done = banger.done("vm", "exec", vm, "--", "timeout", "8", "bash", "-c", script)
    return done.status == 0 and done.out == f"{_UPLINK}\n"


@contextlib.contextmanager
def _outside_world() -> Iterator[object]:
    """A host beyond this one's uplink, with a listener; yields what it has seen."""
    host("ip", "netns", "add", "outside")
    try:
        host("ip", "link", "add", "uplink", "type", "veth", "peer", "eth0", "netns", "outside")
        host("ip", "address", "add", f"{_UPLINK}/24", "dev", "uplink")
        host("ip", "link", "set", "uplink", "up")
        inside = ("ip", "-n", "outside")
        host(*inside, "address", "add", f"{_OUTSIDE}/24", "dev", "eth0")
        host(*inside, "link", "set", "eth0", "up")
        yield from _listening()
    finally:
        host("ip", "netns", "delete", "outside")
