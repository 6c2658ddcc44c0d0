"""NAT, and its absence, shown with packets: who gets out, as whom, and who is stopped when."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest

from banger_root.leases import Leases
from banger_root.validate import LeasePlan
from host.conftest import BRIDGE_MAC, build_plan
from host.namespace import elements, ip, run
from host.outside import UPLINK, WORLD, StackGuest, World, line_of
from host.tap_guest import Listener, TapGuest, checksum, ethernet, ipv4
from host.test_traffic import RST, SYN_ACK, answers, packets_from, start_guest
from patience import PATIENCE_S

pytestmark = pytest.mark.host

Prepared = Callable[..., LeasePlan]
FORWARD = "/proc/sys/net/ipv4/ip_forward"

# Tells who connected, then sends back line by line what it is sent.
SERVER = """
import socket
s = socket.create_server(("0.0.0.0", 9000))
print("listening", flush=True)
while True:
    c, peer = s.accept()
    with c, c.makefile("rwb", buffering=0) as f:
        f.write(f"{peer[0]}\\n".encode())
        try:
            while line := f.readline():
                f.write(line)
        except OSError as e:
            print(e.errno, flush=True)
"""
CLIENT = """
import socket, sys
try:
    s = socket.create_connection((sys.argv[1], 9000), timeout=120)
    f = s.makefile("rwb", buffering=0)
    print(f.readline().decode().strip(), flush=True)
    for line in sys.stdin:
        f.write(line.encode())
        print(f.readline().decode().strip(), flush=True)
except OSError as e:
    print(type(e).__name__, e.errno, flush=True)
"""
TRANSFER = """
import socket, sys
s = socket.create_connection((sys.argv[1], 9001), timeout=120)
size = 10 << 20
s.sendall(bytes(size))
got = 0
while got < size:
    data = s.recv(1 << 16)
    if not data:
        break
    got += len(data)
print(got, flush=True)
"""
SINK = """
import socket
s = socket.create_server(("0.0.0.0", 9001))
print("listening", flush=True)
c, _ = s.accept()
size = 10 << 20
got = 0
while got < size:
    got += len(c.recv(1 << 16))
c.sendall(bytes(got))
"""


@pytest.fixture
def world(namespace: None) -> Iterator[World]:
    with closing(World()) as world:
        yield world


@pytest.fixture
def uplink(world: World) -> Iterator[Listener]:
    """Sees what leaves this host."""
    with closing(Listener("lan0")) as listener:
        yield listener


def echo_replies(frames: list[bytes]) -> int:
    world = socket.inet_aton(WORLD)
    return sum(
        f[12:14] == b"\x08\x00" and f[23] == 1 and f[34] == 0 and f[26:30] == world for f in frames
    )


def is_answered(guest: TapGuest) -> bool:
    """Whether the world answers to one ping. It may take its time: softirqs wait on a busy host."""
    _ask_the_world(guest)
    deadline = time.monotonic() + PATIENCE_S
    while not echo_replies(_settle_all(guest)):
        if time.monotonic() > deadline:
            return False
    return True


def stays_unanswered(guest: TapGuest) -> bool:
    """Whether no answer of the world comes to one ping, as far as one can wait for what is not to
    come: both answers would come the same way, so the gateway's second one is behind it."""
    _ask_the_world(guest)
    return not any(echo_replies(_settle_all(guest)) for _ in range(2))


def _ask_the_world(guest: TapGuest) -> None:
    guest.settle()
    guest.send(guest.echo_request(WORLD, BRIDGE_MAC, sequence=77))


def _settle_all(guest: TapGuest) -> list[bytes]:
    return guest.settle(everything=True)


def test_guest_with_nat_reaches_the_world_as_this_host(
    prepared: Prepared, world: World, uplink: Listener
) -> None:
    server = world.python(SERVER)
    assert line_of(server.stdout) == "listening"
    plan = prepared(2, nat=True)
    with closing(StackGuest(plan, plan.own_tap)) as guest:
        client = guest.python(CLIENT, WORLD)
        assert line_of(client.stdout) == UPLINK
    frames = uplink.frames()
    assert packets_from(frames, UPLINK) > 0
    assert packets_from(frames, str(plan.address)) == 0


def test_guest_without_nat_is_refused_at_once_and_nothing_leaves(
    prepared: Prepared, world: World, uplink: Listener
) -> None:
    run("sysctl -qw net.ipv4.ip_forward=1")
    plan = prepared(2)
    with closing(StackGuest(plan, plan.own_tap)) as guest:
        client = guest.python(CLIENT, WORLD)
        # No answer within the client's own two minutes would be TimeoutError.
        assert line_of(client.stdout) == "OSError 113"
    assert packets_from(uplink.frames(), str(plan.address)) == 0


def test_open_connection_stops_when_nat_is_taken_away(
    leases: Leases, prepared: Prepared, world: World, uplink: Listener
) -> None:
    server = world.python(SERVER)
    assert line_of(server.stdout) == "listening"
    plan = prepared(2, nat=True)
    with closing(StackGuest(plan, plan.own_tap)) as guest:
        client = guest.python(CLIENT, WORLD)
        assert line_of(client.stdout) == UPLINK
        assert client.stdin is not None
        client.stdin.write("still there\n")
        client.stdin.flush()
        assert line_of(client.stdout) == "still there"
        leases.prepare(build_plan(2, vm_id=plan.vm_id))
        uplink.frames()
        client.stdin.write("gone\n")
        client.stdin.flush()
        assert line_of(client.stdout) == "ConnectionResetError 104"
    left = uplink.frames()
    assert packets_from(left, str(plan.address)) == 0
    # This host, which knows of no such connection any more, may tell the world so.
    assert packets_from(left, UPLINK) == answers(left, RST)


def test_kernel_forgets_the_connections_of_a_guest_without_nat(
    leases: Leases, prepared: Prepared, world: World
) -> None:
    pyroute2 = pytest.importorskip("pyroute2")
    plans = [prepared(n, nat=True) for n in (2, 3)]
    for plan in plans:
        with closing(start_guest(plan)) as guest:
            assert is_answered(guest)

    def known() -> set[str]:
        with pyroute2.NFCTSocket() as judge:
            return {
                t.get_attr("CTA_TUPLE_ORIG").get_attr("CTA_TUPLE_IP").get_attr("CTA_IP_V4_SRC")
                for t in judge.dump()
            }

    assert known() >= {"172.31.0.2", "172.31.0.3"}
    leases.prepare(build_plan(2, vm_id=plans[0].vm_id))
    assert "172.31.0.2" not in known()
    assert "172.31.0.3" in known()
    leases.release(plans[1].vm_id)
    assert "172.31.0.3" not in known()


def test_nat_changes_live_and_back(leases: Leases, prepared: Prepared, world: World) -> None:
    plan = prepared(2)
    with closing(start_guest(plan)) as guest:
        assert stays_unanswered(guest)
        assert leases.prepare(build_plan(2, vm_id=plan.vm_id, nat=True))["tap"] == plan.own_tap
        assert is_answered(guest)
        leases.prepare(build_plan(2, vm_id=plan.vm_id))
        assert stays_unanswered(guest)
        assert elements()["nat_taps"] == elements()["nat_addresses"] == []


def test_nat_of_one_guest_is_not_the_others(prepared: Prepared, world: World) -> None:
    plans = prepared(2, nat=True), prepared(3)
    with closing(start_guest(plans[0])) as one, closing(start_guest(plans[1])) as other:
        assert is_answered(one)
        assert stays_unanswered(other)


def test_first_nat_lease_lets_this_host_forward_and_others_do_not(
    leases: Leases, prepared: Prepared, world: World
) -> None:
    run("sysctl -qw net.ipv4.ip_forward=0")
    prepared(2)
    with open(FORWARD) as f:
        assert f.read() == "0\n"
    plan = prepared(3, nat=True)
    leases.release(plan.vm_id)
    with open(FORWARD) as f:
        assert f.read() == "1\n"


@pytest.mark.parametrize("nat", [False, True])
def test_link_local_addresses_are_never_routed_for_a_guest(
    prepared: Prepared, world: World, uplink: Listener, nat: bool
) -> None:
    run("sysctl -qw net.ipv4.ip_forward=1")
    targets = ("169.254.169.254", "169.254.1.1", "224.0.0.251", "255.255.255.255")
    with closing(start_guest(prepared(2, nat=nat))) as guest:
        guest.settle()
        for target in targets:
            guest.send(guest.echo_request(target, BRIDGE_MAC))
        guest.settle()
        reached = {f[30:34] for f in uplink.frames() if f[12:14] == b"\x08\x00"}
        assert reached & {socket.inet_aton(target) for target in targets} == set()
        assert is_answered(guest) if nat else stays_unanswered(guest)


def test_packet_that_cannot_be_translated_does_not_leave_as_it_is(
    prepared: Prepared, world: World, uplink: Listener
) -> None:
    with closing(start_guest(prepared(2, nat=True))) as guest:
        assert is_answered(guest)
        # An answer to a question that nobody asked: conntrack calls it invalid.
        body = b"\x00\x00" + bytes(2) + b"\x00\x09\x00\x01banger--"
        body = body[:2] + checksum(body).to_bytes(2, "big") + body[4:]
        packet = ipv4(1, guest.address, WORLD, body)
        guest.send(ethernet(BRIDGE_MAC, guest.mac, 0x0800, packet))
        guest.settle()
        assert packets_from(uplink.frames(), guest.address) == 0


def test_forged_source_gets_no_nat(prepared: Prepared, world: World, uplink: Listener) -> None:
    prepared(3, nat=True)
    with closing(start_guest(prepared(2, nat=True))) as guest:
        assert is_answered(guest)
        uplink.frames()
        for source in ("172.31.0.3", "172.31.0.9", "8.8.8.8"):
            guest.send(guest.echo_request(WORLD, BRIDGE_MAC, source=source))
        guest.settle()
        left = uplink.frames()
        assert packets_from(left, UPLINK) == 0
        assert [f for f in left if f[12:14] == b"\x08\x00"] == []


def test_nat_leads_to_no_other_guest_and_no_other_bridge(prepared: Prepared, world: World) -> None:
    plans = (
        prepared(2, nat=True),
        prepared(3, nat=True),
        prepared(2, name="br-fc-t2", address="172.31.1.1", nat=True),
    )
    with closing(start_guest(plans[0])) as guest, closing(start_guest(plans[1])) as neighbour:
        with closing(TapGuest(plans[2].own_tap, "172.31.1.2", "172.31.1.1", plans[2].bridge.mac)
        ) as stranger:  # fmt: skip
            for other in (neighbour, stranger):
                other.settle()
                guest.send(guest.echo_request(other.address, BRIDGE_MAC))
            guest.settle()
            for other in (neighbour, stranger):
                assert packets_from(other.frames(), guest.address) == 0


def test_nat_opens_no_port_of_this_host(prepared: Prepared, world: World) -> None:
    with (
        closing(start_guest(prepared(2, nat=True))) as guest,
        closing(socket.create_server((UPLINK, 9000))),
    ):
        guest.settle()
        guest.send(guest.syn(UPLINK, 9000))
        assert answers(guest.settle(), SYN_ACK) == 0


def test_nobody_outside_reaches_a_guest_with_nat(prepared: Prepared, world: World) -> None:
    world.run(f"ip route add 172.31.0.0/24 via {UPLINK}")
    with closing(start_guest(prepared(2, nat=True))) as guest:
        assert is_answered(guest)
        guest.frames()
        knock = world.python(
            "import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
            "s.sendto(b'knock', ('172.31.0.2', 53)); print('sent', flush=True)"
        )
        assert line_of(knock.stdout) == "sent"
        assert packets_from(_settle_all(guest), WORLD) == 0


def test_ten_mebibytes_pass_an_uplink_with_a_small_mtu(prepared: Prepared, namespace: None) -> None:
    with closing(World(mtu=1280)) as world:
        sink = world.python(SINK)
        assert line_of(sink.stdout) == "listening"
        plan = prepared(2, nat=True)
        with closing(StackGuest(plan, plan.own_tap)) as guest:
            client = guest.python(TRANSFER, WORLD)
            assert line_of(client.stdout) == str(10 << 20)


def test_guest_host_ports_are_open_and_no_other(prepared: Prepared) -> None:
    with (
        closing(start_guest(prepared(2, ports=(8080,)))) as guest,
        closing(socket.create_server(("172.31.0.1", 8080))),
        closing(socket.create_server(("172.31.0.1", 8081))),
    ):
        guest.settle()
        for port, heard in ((8080, True), (8081, False)):
            guest.send(guest.syn("172.31.0.1", port))
            assert bool(answers(guest.settle(), SYN_ACK)) is heard


@pytest.mark.parametrize("flush", ["nft flush ruleset", "nft flush table bridge banger"])
def test_flushed_rules_come_back_with_the_next_sweep(
    leases: Leases, prepared: Prepared, world: World, uplink: Listener, flush: str
) -> None:
    before = prepared(2, nat=True)
    with closing(start_guest(before)) as guest:
        assert is_answered(guest)
        known = elements()
        run(flush)
        leases.sweep()
        assert elements() == known
        assert is_answered(guest)
        # The rules as well, not only the elements.
        uplink.frames()
        guest.send(guest.echo_request(WORLD, BRIDGE_MAC, source="172.31.0.9"))
        guest.settle()
        assert [f for f in uplink.frames() if f[12:14] == b"\x08\x00"] == []
        (link,) = ip(f"link show dev {before.own_tap}")
        assert link["master"] == "br-fc-t1"
