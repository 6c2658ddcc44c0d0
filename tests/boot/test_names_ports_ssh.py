"""How a host reaches its guests: names, listening ports, and an OpenSSH that knows its peer."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import dns.message
import dns.query
import dns.rcode
import pytest

from boot.installation import PATIENCE_S, SMALL, Installation

# perl is part of every Debian. The web server's name tries to clear the terminal.
LISTENERS = r"""
use strict; use Socket;
sub on { my ($family, $type, $where) = @_;
    socket(my $s, $family, $type, 0) or die $!;
    setsockopt($s, SOL_SOCKET, SO_REUSEADDR, 1);
    bind($s, $where) or die $!;
    listen($s, 8) if $type == SOCK_STREAM;
    return $s }
my @kept = (
    on(PF_INET, SOCK_STREAM, pack_sockaddr_in(8001, inet_aton("127.0.0.1"))),
    on(PF_INET6, SOCK_STREAM, pack_sockaddr_in6(8002, Socket::IN6ADDR_ANY)),
    on(PF_INET6, SOCK_STREAM, pack_sockaddr_in6(8001, Socket::IN6ADDR_LOOPBACK)),
    on(PF_INET, SOCK_DGRAM, pack_sockaddr_in(8003, INADDR_ANY)),
    on(PF_INET, SOCK_DGRAM, pack_sockaddr_in(8004, inet_aton("127.0.0.1"))),
);
my $web = on(PF_INET, SOCK_STREAM, pack_sockaddr_in(8000, INADDR_ANY));
$0 = "e\x1b[2Jvil"; $| = 1; print "ready\n";
while (accept(my $c, $web)) {
    sysread($c, my $request, 4096);
    syswrite($c, "HTTP/1.0 200 OK\r\n\r\n");
    close($c);
}
"""


def ask(banger: Installation, name: str, rtype: str = "A") -> dns.message.Message:
    """What the installation's own name server says, as dnspython reads it."""
    host, port = banger.json("daemon", "status", "--json")["dns"].rsplit(":", 1)
    return dns.query.udp(
        dns.message.make_query(name, rtype), host, port=int(port), timeout=PATIENCE_S
    )


@contextlib.contextmanager
def listening(banger: Installation, vm: str) -> Iterator[None]:
    process = banger.popen(
        "vm", "exec", vm, "--", "perl", "-e", LISTENERS, stderr=None, stdin=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield
    finally:
        process.terminate()
        process.communicate(timeout=PATIENCE_S)


def rows(banger: Installation, vm: str) -> dict[tuple[str, int], dict[str, Any]]:
    """The rows of our listeners. Asked again while the emulated guest is too slow for its link."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        found = {(x["proto"], x["port"]): x for x in banger.json("vm", "ports", "--json", vm)}
        if found[("tcp", 8000)].get("link") or time.monotonic() > deadline:
            return {key: row for key, row in found.items() if key[1] // 1000 == 8}


def test_each_listener_has_its_label_and_what_is_printed_is_reached(
    banger: Installation, web: str
) -> None:
    with listening(banger, web):
        found = rows(banger, web)
        assert {key: row["reachable"] for key, row in found.items()} == {
            ("tcp", 8000): True,
            ("tcp", 8001): False,
            ("tcp", 8002): True,
            ("udp", 8003): True,
            ("udp", 8004): False,
        }
        assert found[("tcp", 8000)]["link"] == f"http://{web}.vm:8000/"
        assert "listen on 0.0.0.0" in found[("tcp", 8001)]["fix"]
        for key, row in found.items():
            if not row["reachable"]:
                continue
            name, port = row["endpoint"].split(":")
            (answer,) = ask(banger, name).answer
            kind = socket.SOCK_STREAM if key[0] == "tcp" else socket.SOCK_DGRAM
            with socket.socket(socket.AF_INET, kind) as sock:
                sock.settimeout(PATIENCE_S)
                sock.connect((str(answer[0]), int(port)))
        table = banger.ok("vm", "ports", web).text
        assert "\x1b" not in table
        assert "e?[2Jvil" in table
        assert f"only in {web}: 127.0.0.1:8001" in table


def test_a_name_lives_as_long_as_its_vm_runs(banger: Installation, web: str) -> None:
    address = banger.show(web)["address"]
    (answer,) = ask(banger, f"{web.upper()}.vm").answer
    assert str(answer[0]) == address
    back = ".".join(reversed(address.split("."))) + ".in-addr.arpa"
    assert str(ask(banger, back, "PTR").answer[0][0]) == f"{web}.vm."
    assert ask(banger, f"{web}.vm", "AAAA").rcode() == dns.rcode.NOERROR
    assert ask(banger, "never.vm").rcode() == dns.rcode.NXDOMAIN
    banger.kill_daemon()
    assert str(ask(banger, f"{web}.vm").answer[0][0]) == address


def plain_ssh(banger: Installation, *words: str) -> subprocess.CompletedProcess[str]:
    """OpenSSH as a user calls it, with nothing but banger's stanza."""
    program = shutil.which("ssh")
    if program is None:
        pytest.skip("ssh is not installed here")
    return subprocess.run(
        [program, "-F", banger.config.with_name("ssh_config"), "-o", "BatchMode=yes", *words],
        env=banger.env, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=PATIENCE_S,
    )  # fmt: skip


@pytest.mark.usefixtures("nothing_left")
def test_host_keys_are_known_at_first_contact_and_a_swapped_one_is_told(
    banger: Installation,
) -> None:
    known = banger.state / "ssh" / "known_hosts"

    def lines() -> list[str]:
        return [x for x in known.read_text().splitlines() if address in x.split()[0].split(",")]

    banger.ok("ssh-config")
    banger.ok("vm", "create", "--name", "first", *SMALL)
    address = banger.show("first")["address"]
    banger.wait_for_sshd("first")
    done = plain_ssh(banger, "first.vm", "hostname; exit 42")
    assert (done.returncode, done.stdout) == (42, "first\n"), done.stderr

    swap = (
        "kill $(cat /run/sshd.pid) || pkill -x sshd; rm /etc/ssh/ssh_host_*; "
        "ssh-keygen -q -t ed25519 -N '' -f /etc/ssh/ssh_host_ed25519_key; "
        "while ss -Hltn sport = :22 | grep -q .; do sleep 0.1; done; /usr/sbin/sshd"
    )
    banger.ok("vm", "exec", "first", "--", "sh", "-c", swap)
    banger.wait_for_sshd("first")
    done_with_error = banger("vm", "ssh", "first", "--", "true")
    assert done_with_error.status == 1
    assert "its ssh host key is not the one that banger gave it" in done_with_error.err
    assert "hint: banger vm restart first" in done_with_error.err
    assert plain_ssh(banger, "first.vm", "true").returncode == 255

    banger.ok("vm", "delete", "first")
    assert lines() == []
    banger.ok("vm", "create", "--name", "second", *SMALL)
    assert banger.show("second")["address"] == address
    banger.wait_for_sshd("second")
    assert len(lines()) == 1
    assert banger.ok("vm", "ssh", "second", "--", "hostname").text == "second\n"
    done = plain_ssh(banger, "second.vm", "hostname")
    assert (done.returncode, done.stdout) == (0, "second\n"), done.stderr
    banger.ok("vm", "delete", "second")
