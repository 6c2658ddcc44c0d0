"""What a guest can and cannot do on the wire, shown with frames and not with rule text.

Every refusal is paired with a frame that does arrive, so that silence means a drop.
"""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest

from banger_root.validate import LeasePlan
from host.conftest import BRIDGE_MAC
from host.namespace import ip, run, wait_for_carrier
from host.tap_guest import BROADCAST, Listener, TapGuest, arp, checksum, ethernet, ipv4

pytestmark = pytest.mark.host

Prepared = Callable[..., LeasePlan]
GATEWAY = "172.31.0.1"
WORLD = "198.51.100.9"
WORLD_MAC = "02:00:00:00:00:09"
SYN_ACK, RST = 0x12, 0x04


def start_guest(plan: LeasePlan) -> TapGuest:
    return TapGuest(plan.own_tap, str(plan.address), GATEWAY, BRIDGE_MAC)


@pytest.fixture
def guest(prepared: Prepared) -> Iterator[TapGuest]:
    with closing(start_guest(prepared(2))) as guest:
        # Before the kernel has noticed that somebody has the tap, it drops what is sent.
        guest.settle()
        yield guest


@pytest.fixture
def bridge_listener(guest: TapGuest) -> Iterator[Listener]:
    """Sees the frames that the bridge hands up to the host."""
    with closing(Listener("br-fc-t1")) as listener:
        yield listener


@pytest.fixture
def listening() -> Iterator[Callable[[str, int], None]]:
    """Listen on a TCP port of the host until the test ends."""
    sockets = []

    def listen(address: str, port: int) -> None:
        sockets.append(socket.create_server((address, port)))

    yield listen
    for s in sockets:
        s.close()


@pytest.fixture
def uplink(namespace: None) -> Iterator[Listener]:
    """A link to elsewhere, with forwarding on; the listener sees what would leave."""
    run("sysctl -qw net.ipv4.ip_forward=1")
    run("ip link add lan0 type veth peer name lan1")
    run("ip link set lan0 up")
    run("ip link set lan1 up")
    run("ip address add 198.51.100.1/24 dev lan0")
    wait_for_carrier("lan0", "lan1")
    run(f"ip neigh add {WORLD} lladdr {WORLD_MAC} dev lan0")
    with closing(Listener("lan1")) as listener:
        yield listener
    run("ip link delete lan0")


def answers(frames: list[bytes], flags: int) -> int:
    """How many TCP segments with all of these flags are among the frames."""
    return sum(f[12:14] == b"\x08\x00" and f[23] == 6 and f[47] & flags == flags for f in frames)


def packets_from(frames: list[bytes], source: str) -> int:
    wanted = socket.inet_aton(source)
    return sum(f[12:14] == b"\x08\x00" and f[26:30] == wanted for f in frames)


def test_guest_reaches_the_announce_port(
    guest: TapGuest, listening: Callable[[str, int], None]
) -> None:
    listening(GATEWAY, 7001)
    guest.send(guest.syn(GATEWAY, 7001))
    assert answers(guest.settle(), SYN_ACK) >= 1


def test_guest_reaches_no_other_port_of_the_host(
    guest: TapGuest, listening: Callable[[str, int], None]
) -> None:
    listening(GATEWAY, 22)
    guest.send(guest.syn(GATEWAY, 22))
    frames = guest.settle()
    assert answers(frames, SYN_ACK) == answers(frames, RST) == 0


def test_guest_reaches_no_port_at_another_address_of_the_host(
    guest: TapGuest, uplink: Listener, listening: Callable[[str, int], None]
) -> None:
    listening("198.51.100.1", 7001)
    guest.send(guest.syn("198.51.100.1", 7001))
    assert answers(guest.settle(), SYN_ACK) == 0


def test_host_can_open_a_connection_to_the_guest(guest: TapGuest) -> None:
    guest.settle()
    with socket.socket() as s:
        s.setblocking(False)
        with pytest.raises(BlockingIOError):
            s.connect((str(guest.address), 7000))
        # The first of them: on a busy host there may be a second one already.
        syn, *_ = [f for f in guest.settle() if f[12:14] == b"\x08\x00" and f[23] == 6]
        assert syn[36:38] == (7000).to_bytes(2, "big")
        # A guest that refuses is heard: the answer of an established flow passes the input hook.
        guest.send(_reset(guest, syn))
        guest.settle()
        assert s.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 111  # ECONNREFUSED


def _reset(guest: TapGuest, syn: bytes) -> bytes:
    source_port, target_port, sequence = struct.unpack("!HHI", syn[34:42])
    header = struct.pack(
        "!HHIIBBHHH", target_port, source_port, 0, sequence + 1, 0x50, 0x14, 0, 0, 0
    )
    pseudo = (
        socket.inet_aton(guest.address)
        + socket.inet_aton(GATEWAY)
        + struct.pack("!BBH", 0, 6, len(header))
    )
    header = header[:16] + struct.pack("!H", checksum(pseudo + header)) + header[18:]
    return ethernet(BRIDGE_MAC, guest.mac, 0x0800, ipv4(6, guest.address, GATEWAY, header))


FORGED: dict[str, Callable[[TapGuest], bytes]] = {
    "IPv4 source": lambda g: g.echo_request(GATEWAY, BROADCAST, source="172.31.0.9"),
    "IPv4 source of the gateway": lambda g: g.echo_request(GATEWAY, BROADCAST, source=GATEWAY),
    "MAC": lambda g: g.echo_request(GATEWAY, BROADCAST, source_mac="06:00:ac:1f:00:09"),
    "ARP sender address": lambda g: arp(1, g.mac, "172.31.0.9", BROADCAST, GATEWAY),
    "ARP sender address of the gateway": lambda g: arp(1, g.mac, GATEWAY, BROADCAST, GATEWAY),
    "ARP sender MAC": lambda g: arp(
        1, "06:00:ac:1f:00:09", g.address, BROADCAST, GATEWAY, source_mac=g.mac
    ),
    "Ethernet source of an ARP": lambda g: arp(
        1, g.mac, g.address, BROADCAST, GATEWAY, source_mac="06:00:ac:1f:00:09"
    ),
    "ARP reply": lambda g: arp(2, g.mac, "172.31.0.9", BROADCAST, GATEWAY),
    "VLAN tag": lambda g: ethernet(
        BROADCAST, g.mac, 0x8100, b"\x00\x05\x08\x00" + ipv4(1, "172.31.0.9", GATEWAY, b"\x08" * 8)
    ),
    "IPv6": lambda g: ethernet(BROADCAST, g.mac, 0x86DD, b"\x60" + bytes(39)),
    "unknown protocol": lambda g: ethernet(BROADCAST, g.mac, 0x88B5, bytes(46)),
}


@pytest.mark.parametrize("what", FORGED)
def test_forged_frame_is_dropped(guest: TapGuest, bridge_listener: Listener, what: str) -> None:
    forged = FORGED[what](guest)
    guest.settle()
    bridge_listener.frames()
    guest.send(forged)
    guest.settle()
    heard = bridge_listener.frames()
    # The honest ping behind it was heard, from the same tap and on the same listener.
    assert packets_from(heard, guest.address) >= 1
    assert forged not in heard


def test_honest_broadcast_is_heard(guest: TapGuest, bridge_listener: Listener) -> None:
    honest = arp(1, guest.mac, guest.address, BROADCAST, GATEWAY)
    guest.send(honest)
    guest.settle()
    assert honest in bridge_listener.frames()


@pytest.mark.parametrize("last", ["00", "01", "03", "0e"])
def test_guest_cannot_move_another_guests_address_to_its_own_port(
    prepared: Prepared, guest: TapGuest, last: str
) -> None:
    with closing(start_guest(prepared(3))) as victim:
        victim.settle()
        before = _port_of(victim.mac)
        # Frames to these addresses are for the bridge itself and pass no prerouting hook.
        guest.send(ethernet(f"01:80:c2:00:00:{last}", victim.mac, 0x88CC, bytes(46)))
        guest.settle()
        assert before == victim.tap == _port_of(victim.mac)


def test_tap_without_elements_is_mute(guest: TapGuest, bridge_listener: Listener) -> None:
    run("nft flush set bridge banger vm_ports")
    honest = arp(1, guest.mac, guest.address, BROADCAST, GATEWAY)
    guest.send(honest)
    assert honest not in bridge_listener.frames()


@pytest.mark.parametrize(
    ("first", "second", "heard"),
    [(True, True, False), (False, True, False), (True, False, False), (False, False, True)],
)
def test_guests_hear_each_other_only_when_both_are_open(
    prepared: Prepared, first: bool, second: bool, heard: bool
) -> None:
    plans = prepared(2, isolate=first), prepared(3, isolate=second)
    with closing(start_guest(plans[0])) as one, closing(start_guest(plans[1])) as other:
        one.settle()
        other.settle()
        question = arp(1, one.mac, one.address, BROADCAST, other.address)
        one.send(question)
        one.settle()
        assert (question in other.frames()) is heard


@pytest.mark.parametrize("isolate", [True, False])
def test_guests_do_not_meet_through_the_hosts_routing_unless_open(
    prepared: Prepared, isolate: bool
) -> None:
    run("sysctl -qw net.ipv4.ip_forward=1")
    plans = prepared(2, isolate=isolate), prepared(3, isolate=isolate)
    with closing(start_guest(plans[0])) as one, closing(start_guest(plans[1])) as other:
        one.settle()
        other.settle()
        # To the gateway's MAC: the host is asked to route it back onto the bridge.
        one.send(one.echo_request(other.address, BRIDGE_MAC))
        one.settle()
        assert packets_from(other.frames(), one.address) == (0 if isolate else 1)


def test_nothing_leaves_without_nat_even_where_the_host_forwards(
    guest: TapGuest, uplink: Listener
) -> None:
    packet = guest.echo_request(WORLD, BRIDGE_MAC)
    guest.send(packet)
    guest.settle()
    assert packets_from(uplink.frames(), guest.address) == 0
    # Without our forward chain the same packet does leave: the silence above was our doing.
    run("nft flush chain inet banger forward")
    guest.send(packet)
    heard = 0
    while not heard:  # the test's own deadline ends it
        guest.settle()
        heard = packets_from(uplink.frames(), guest.address)


def test_nothing_from_elsewhere_reaches_a_guest(guest: TapGuest, uplink: Listener) -> None:
    guest.settle()
    with closing(socket.socket(socket.AF_PACKET, socket.SOCK_RAW)) as world:
        world.bind(("lan1", 0))
        mac = _mac_of("lan0")
        packet = ipv4(1, WORLD, guest.address, b"\x08" * 8)
        world.send(ethernet(mac, WORLD_MAC, 0x0800, packet))
        assert packets_from(guest.settle(), WORLD) == 0
        run("nft flush chain inet banger forward")
        world.send(ethernet(mac, WORLD_MAC, 0x0800, packet))
        while not packets_from(guest.settle(), WORLD):  # the test's own deadline ends it
            pass


def test_guest_of_one_bridge_does_not_reach_a_guest_of_another(
    prepared: Prepared, guest: TapGuest
) -> None:
    run("sysctl -qw net.ipv4.ip_forward=1")
    plan = prepared(2, name="br-fc-t2", address="172.31.1.1", isolate=False)
    with closing(TapGuest(plan.own_tap, "172.31.1.2", "172.31.1.1", plan.bridge.mac)) as other:
        other.settle()
        guest.send(guest.echo_request("172.31.1.2", BRIDGE_MAC))
        guest.settle()
        assert packets_from(other.frames(), guest.address) == 0


def test_no_frame_appears_on_its_own(prepared: Prepared) -> None:
    """No neighbour or router discovery, no reports: IPv6 is off on bridge and tap."""
    with closing(start_guest(prepared(2))) as guest:
        assert [f for f in guest.settle() if f[12:14] == b"\x86\xdd"] == []


def _mac_of(link: str) -> str:
    return str(ip(f"link show dev {link}")[0]["address"])


def _port_of(mac: str) -> str:
    """The port to which the bridge sends frames for this address."""
    entries = json.loads(run("bridge -j fdb show br br-fc-t1"))
    return next(str(entry["ifname"]) for entry in entries if entry["mac"] == mac)
