"""Doctor's checks of the network: subnet, bridge, packet filter, forwarding, names."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

import pytest

from banger.api.doctor import DoctorObstacle, HelperFacts
from banger.dns.server import NameServer
from banger.dns.zone import Zone
from banger.doctor.network import find_free_subnet
from fakes.doctor import FakeWorld, lease, running, vm
from patience import PATIENCE_S

ADDRESSES = ("ip", "-j", "-4", "address")
ROUTES = ("ip", "-j", "-4", "route", "show", "table", "all")


@pytest.fixture
def world(tmp_path: Path) -> FakeWorld:
    world = FakeWorld(tmp_path)
    reaches(world)
    return world


def address(link: str, local: str, prefix: int) -> dict[str, Any]:
    return {"ifname": link, "addr_info": [{"family": "inet", "local": local, "prefixlen": prefix}]}


def reaches(
    world: FakeWorld, addresses: tuple[Any, ...] = (), routes: tuple[Any, ...] = ()
) -> None:
    lo = address("lo", "127.0.0.1", 8)
    world.says(*ADDRESSES, out=json.dumps([lo, *addresses]))
    world.says(*ROUTES, out=json.dumps([{"dst": "default", "gateway": "10.0.0.1"}, *routes]))


# Subnet


def test_a_subnet_of_its_own_passes(world: FakeWorld) -> None:
    own = address("br-fc", "172.16.0.1", 24)
    reaches(world, (own,), ({"dst": "172.16.0.0/24", "dev": "br-fc"},))
    assert world.row("network").level == "PASS"


@pytest.mark.parametrize(
    ("addresses", "routes", "named"),
    [
        ((address("vpn0", "172.16.0.9", 16),), (), "the address 172.16.0.9/16 of vpn0"),
        (
            (),
            ({"dst": "172.16.0.0/12", "gateway": "10.0.0.3", "dev": "vpn0"},),
            "the route 172.16.0.0/12 via 10.0.0.3 dev vpn0",
        ),
        ((), ({"dst": "172.16.0.128", "dev": "vpn0"},), "the route 172.16.0.128/32 dev vpn0"),
        ((), ({"dst": "172.16.0.0/24", "type": "blackhole"},), "the route 172.16.0.0/24"),
    ],
)
def test_an_overlap_is_named_with_a_free_subnet(
    world: FakeWorld, addresses: tuple[Any, ...], routes: tuple[Any, ...], named: str
) -> None:
    reaches(world, addresses, routes)
    row = world.row("network")
    assert row.level == "FAIL"
    assert named in row.message
    assert row.command == f"$EDITOR {world.paths.config_file}"
    assert row.details[-1].startswith("bridge_ip = ")


@pytest.mark.parametrize("half", ["0.0.0.0/1", "128.0.0.0/1"])
def test_a_default_route_in_halves_is_no_overlap(world: FakeWorld, half: str) -> None:
    reaches(world, (), ({"dst": half, "dev": "vpn0"},))
    assert world.row("network").level == "PASS"


def test_without_the_program_ip_the_kernels_own_table_is_read(world: FakeWorld) -> None:
    del world.programs["ip"]
    header = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n"
    world.have("/proc/net/route", header + "br-fc\t000010AC\t0\t1\t0\t0\t0\t00FFFFFF\t0\t0\t0\n")
    assert world.row("network").level == "PASS"
    world.have("/proc/net/route", header + "vpn0\t000010AC\t0\t1\t0\t0\t0\t0000F0FF\t0\t0\t0\n")
    row = world.row("network")
    assert row.level == "FAIL"
    assert "the route 172.16.0.0/12 dev vpn0" in row.message


def test_the_free_subnet_is_free() -> None:
    taken = [IPv4Network("172.16.0.0/12"), IPv4Network("10.0.0.0/9")]
    free = find_free_subnet(taken)
    assert free is not None and free.is_private
    assert not any(free.overlaps(network) for network in taken)
    assert find_free_subnet([IPv4Network("0.0.0.0/0")]) is None


# Bridge


def bridge(world: FakeWorld, have: str = "172.16.0.1", prefix: int = 24) -> None:
    world.file("/sys/class/net/br-fc/bridge").mkdir(parents=True)
    world.says(*ADDRESSES, "show", "dev", "br-fc", out=json.dumps([address("br-fc", have, prefix)]))


def test_no_bridge_is_made_by_the_next_vm(world: FakeWorld) -> None:
    assert world.row("bridge").level == "PASS"


def test_the_bridge_as_configured_passes(world: FakeWorld) -> None:
    bridge(world)
    assert world.row("bridge").level == "PASS"


def test_a_bridge_with_another_address_is_mended_by_stopping_its_vms(world: FakeWorld) -> None:
    bridge(world, "172.17.0.1")
    assert world.row("bridge").command == "sudo ip link delete dev br-fc"
    world.set_vms(vm("web"), vm("db", 3))
    row = world.row("bridge")
    assert (row.level, row.command) == ("WARN", "banger vm stop web db")


def test_a_link_of_the_bridges_name_that_is_none_fails(world: FakeWorld) -> None:
    world.file("/sys/class/net/br-fc").mkdir(parents=True)
    assert world.row("bridge").level == "FAIL"


# Packet filter


def nft(tmp_path: Path, *taps: str) -> FakeWorld:
    """A host where root may ask nft, with these taps in banger's set."""
    world = FakeWorld(tmp_path, uid=0)
    world.says("nft", "list", "tables", out="table bridge banger\n")
    elements = [{"concat": [tap, "06:00:ac:10:00:02", "172.16.0.2"]} for tap in taps]
    document = {"nftables": [{"set": {"name": "vm_ports", "elem": elements}}]}
    world.says("nft", "-j", "list", "set", "bridge", "banger", "vm_ports", out=json.dumps(document))
    return world


def test_every_leased_tap_in_its_set_passes(tmp_path: Path) -> None:
    web = vm()
    world = nft(tmp_path, lease(web).tap)
    world.known["helper"] = HelperFacts(privilege="root", version=1, leases=(lease(web),))
    assert world.row("packet filter").level == "PASS"


def test_flushed_rules_fail_with_the_vm_to_restart(tmp_path: Path) -> None:
    web = vm()
    world = nft(tmp_path)
    world.set_vms(web)
    world.known["helper"] = HelperFacts(privilege="root", version=1, leases=(lease(web),))
    row = world.row("packet filter")
    assert (row.level, row.command) == ("FAIL", "banger vm restart web")


def test_a_kernel_without_nftables_fails(tmp_path: Path) -> None:
    world = nft(tmp_path)
    world.says("nft", "list", "tables", out=None)
    row = world.row("packet filter")
    assert (row.level, row.command) == ("FAIL", "sudo modprobe -a nf_tables")


def test_a_missing_nft_fails(world: FakeWorld) -> None:
    row = world.row("packet filter")
    assert (row.level, row.command) == ("FAIL", "sudo apt-get install nftables")


def test_an_ordinary_user_is_not_warned_of_what_only_root_sees(tmp_path: Path) -> None:
    world = FakeWorld(tmp_path, uid=1000)
    world.says("nft", "list", "tables", out=None)
    assert world.row("packet filter").level == "PASS"


# Forwarding


def test_nat_without_forwarding_fails(world: FakeWorld) -> None:
    assert world.row("forwarding").level == "PASS"
    world.set_vms(vm(nat=True))
    world.have("/proc/sys/net/ipv4/ip_forward", "0\n")
    row = world.row("forwarding")
    assert (row.level, row.command) == ("FAIL", "sudo sysctl net.ipv4.ip_forward=1")
    world.have("/proc/sys/net/ipv4/ip_forward", "1\n")
    assert world.row("forwarding").level == "PASS"


def test_somebody_elses_drop_is_a_warning_with_its_command(world: FakeWorld) -> None:
    obstacle = DoctorObstacle(
        family="inet", table="firewalld", chain="filter_FORWARD", why="its policy is drop",
        command="sudo firewall-cmd --zone=trusted --add-interface=br-fc",
    )  # fmt: skip
    world.known["helper"] = HelperFacts(privilege="root", version=1, obstacles=(obstacle,))
    row = world.row("forwarding")
    assert (row.level, row.command) == ("WARN", obstacle.command)
    assert "the chain filter_FORWARD of the table inet firewalld" in row.message
    world.set_settings(bridge_name="br-fc-x")
    assert world.row("forwarding").command == f"{obstacle.command}-x"


def test_without_a_bridge_there_is_nothing_of_a_bridge_to_say(world: FakeWorld) -> None:
    world.known["helper"] = HelperFacts(privilege="none", problem="no sudo")
    for check in ("network", "bridge", "packet filter", "forwarding", "vm dns", "resolver"):
        assert world.look(check) == []


# Names


@contextmanager
def answering() -> Iterator[str]:
    """banger's own name server, with web.vm at 172.16.0.2."""
    zone = Zone(IPv4Network("172.16.0.0/24"))
    zone.publish("web", "172.16.0.2")
    loop, ending, ready = asyncio.new_event_loop(), asyncio.Event(), threading.Event()
    found: list[str] = []

    async def serve() -> None:
        server = NameServer(zone)
        host, port = await server.start("127.0.0.1:0")
        found.append(f"{host}:{port}")
        ready.set()
        await ending.wait()
        await server.close()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    try:
        assert ready.wait(PATIENCE_S)
        yield found[0]
    finally:
        loop.call_soon_threadsafe(ending.set)
        thread.join()
        loop.close()


def free_port() -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{s.getsockname()[1]}"


def test_a_daemon_that_answers_for_its_names_passes(world: FakeWorld) -> None:
    with answering() as listen:
        world.known["daemon"] = running(dns=listen)
        assert world.row("vm dns").level == "PASS"


def test_a_daemon_that_listens_and_gives_no_answer_fails(world: FakeWorld) -> None:
    world.known["daemon"] = running(dns=free_port())
    row = world.row("vm dns")
    assert (row.level, row.command) == ("FAIL", "banger daemon stop")


def test_a_daemon_without_its_port_is_a_warning(world: FakeWorld) -> None:
    world.known["daemon"] = running(dns=None, dns_problem="the port is taken")
    row = world.row("vm dns")
    assert (row.level, row.command) == ("WARN", f"$EDITOR {world.paths.config_file}")
    assert "the port is taken" in row.message


def test_without_a_daemon_a_free_port_passes(world: FakeWorld) -> None:
    world.set_settings(dns_listen_addr=free_port())
    assert world.row("vm dns").level == "PASS"


def test_another_bangers_port_is_told_from_a_strangers(world: FakeWorld) -> None:
    with answering() as listen:
        world.set_settings(dns_listen_addr=listen)
        assert "another banger" in world.row("vm dns").message
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
        stranger.bind(("127.0.0.1", 0))
        listen = f"127.0.0.1:{stranger.getsockname()[1]}"
        world.set_settings(dns_listen_addr=listen)
        # It hears the question and says nothing; the wait for that is not what is tested.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("banger.doctor.names._ANSWER_S", 0.01)
            row = world.row("vm dns")
        assert row.level == "WARN"
        assert "another program" in row.message


def test_a_lookup_that_finds_the_running_vm_passes(world: FakeWorld) -> None:
    world.known["daemon"] = running()
    world.set_vms(vm())
    world.says("getent", "ahostsv4", "web.vm", out="172.16.0.2      STREAM web.vm\n")
    assert world.row("resolver").level == "PASS"


def test_a_lookup_that_finds_somebody_else_is_a_warning(world: FakeWorld) -> None:
    world.known["daemon"] = running()
    world.set_vms(vm())
    world.says("getent", "ahostsv4", "web.vm", out="192.0.2.1      STREAM web.vm\n")
    row = world.row("resolver")
    assert (row.level, row.command) == ("WARN", "dig @127.0.0.1 -p 42069 web.vm")


def test_a_lookup_that_finds_nothing_names_what_this_hosts_resolver_needs(
    world: FakeWorld,
) -> None:
    world.known["daemon"] = running(routing_problem="resolved refused")
    world.set_vms(vm())
    row = world.row("resolver")
    assert (row.level, row.command) == ("WARN", "sudo apt-get install systemd-resolved")
    assert "resolved refused" in row.details
    world.says("dnsmasq", out="")
    assert "/etc/dnsmasq.d/banger.conf" in (world.row("resolver").command or "")
    stub = "/run/systemd/resolve/stub-resolv.conf"
    world.have(stub)
    assert world.row("resolver").command == f"sudo ln -sf {stub} /etc/resolv.conf"
    world.have("/etc/resolv.conf", "nameserver 127.0.0.53\n")
    assert (world.row("resolver").command or "").startswith("sudo resolvectl dns br-fc 127.0.0.1")


def test_without_a_vm_resolved_is_not_pointed_at_banger_yet(world: FakeWorld) -> None:
    world.known["daemon"] = running()
    world.have("/run/systemd/resolve/stub-resolv.conf")
    assert world.row("resolver").level == "PASS"


def test_without_a_server_the_resolver_is_not_asked(world: FakeWorld) -> None:
    assert world.row("resolver").level == "PASS"
