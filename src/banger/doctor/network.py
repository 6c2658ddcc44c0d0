"""Checks of the host's network: the bridge's subnet, the bridge, packet filters, forwarding."""

from __future__ import annotations

import json
import re
from ipaddress import IPv4Address, IPv4Network
from typing import TYPE_CHECKING, Any

from banger.doctor.check import Check, Finding, count, failed, passed, warned

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from banger.doctor.world import World

# 0.0.0.0/1 and 128.0.0.0/1 are how VPN clients write a default route.
_DEFAULT_PREFIX = 1
_DEFAULT_BRIDGE = re.compile(r"\bbr-fc\b(?!-)")
_NOT_UNICAST = ("local", "broadcast", "multicast", "anycast")


def _look_subnet(world: World) -> Iterator[Finding]:
    settings = world.settings
    taken = list(read_taken(world, settings.bridge_name))
    hits = [what for network, what in taken if network.overlaps(settings.subnet)]
    if not hits:
        yield passed(f"{settings.subnet} overlaps no other address or route of this host")
        return
    free = find_free_subnet(network for network, _ in taken)
    where = f'bridge_ip = "{free[1]}" and cidr = 24 would overlap nothing' if free else ""
    yield failed(
        f"the bridge's subnet {settings.subnet} overlaps {hits[0]}: one of the two gets no answers",
        *hits[1:],
        *((where,) if where else ()),
        command=f"$EDITOR {world.config_files[-1]}",
    )


def read_taken(world: World, own: str) -> Iterator[tuple[IPv4Network, str]]:
    """Every subnet that this host reaches by another link than `own`, and what says so."""
    addresses, routes = world.ask("ip", "-j", "-4", "address"), None
    if addresses is not None:
        routes = world.ask("ip", "-j", "-4", "route", "show", "table", "all")
    if addresses is None or routes is None:
        yield from _read_kernel_routes(world, own)
        return
    for link in json.loads(addresses or "[]"):
        for info in link.get("addr_info", ()):
            if link.get("ifname") != own and info.get("family") == "inet":
                text = f"{info['local']}/{info['prefixlen']}"
                network = IPv4Network(text, strict=False)
                yield network, f"the address {text} of {link['ifname']}"
    for route in json.loads(routes or "[]"):
        if route.get("dst") == "default" or route.get("type") in _NOT_UNICAST:
            continue
        network = IPv4Network(route["dst"])
        if route.get("dev") != own and network.prefixlen > _DEFAULT_PREFIX:
            yield network, _describe_route(network, route)


def _describe_route(network: IPv4Network, route: dict[str, Any]) -> str:
    via = f" via {route['gateway']}" if "gateway" in route else ""
    dev = f" dev {route['dev']}" if "dev" in route else ""
    return f"the route {network}{via}{dev}"


def _read_kernel_routes(world: World, own: str) -> Iterator[tuple[IPv4Network, str]]:
    """Without the program `ip`: the main table (net/ipv4/fib_trie.c, fib_route_seq_show)."""
    for line in (world.read("/proc/net/route") or "").splitlines()[1:]:
        fields = line.split()
        if len(fields) < 8 or fields[0] == own:
            continue
        # The fields are words of the processor: little-endian on x86-64.
        address, mask = (IPv4Address(bytes.fromhex(fields[n])[::-1]) for n in (1, 7))
        network = IPv4Network(f"{address}/{mask}", strict=False)
        if network.prefixlen > _DEFAULT_PREFIX:
            yield network, f"the route {network} dev {fields[0]}"


def find_free_subnet(taken: Iterable[IPv4Network]) -> IPv4Network | None:
    """A private /24 that overlaps none of `taken`, or None."""
    known = list(taken)
    candidates = [f"172.{n}.{m}.0/24" for n in range(16, 32) for m in (0, 77)]
    candidates += [f"10.{n}.77.0/24" for n in range(77, 256)]
    candidates += [f"192.168.{n}.0/24" for n in range(77, 255)]
    for text in candidates:
        network = IPv4Network(text)
        if not any(network.overlaps(other) for other in known):
            return network
    return None


def _look_bridge(world: World) -> Iterator[Finding]:
    settings = world.settings
    name, wanted = settings.bridge_name, f"{settings.bridge_ip}/{settings.cidr}"
    if not world.file(f"/sys/class/net/{name}").exists():
        yield passed(f"{name} is not there; the next VM makes it, with {wanted}")
        return
    if not world.file(f"/sys/class/net/{name}/bridge").exists():
        yield failed(
            f"a link named {name} exists and is no bridge",
            command=f"$EDITOR {world.config_files[-1]}",
        )
        return
    links = json.loads(world.ask("ip", "-j", "-4", "address", "show", "dev", name) or "[]")
    found = [
        f"{info['local']}/{info['prefixlen']}"
        for link in links
        for info in link.get("addr_info", ())
        if info.get("family") == "inet"
    ]
    if found and wanted not in found:
        running = [vm.name for vm in world.vms if vm.id in world.live() and vm.network == "bridge"]
        yield warned(
            f"{name} has {', '.join(found)}; configured is {wanted}",
            "a change counts once no VM runs",
            command=f"banger vm stop {' '.join(running)}"
            if running
            else f"sudo ip link delete dev {name}",
        )
        return
    ports = world.file(f"/sys/class/net/{name}/brif")
    number = len(list(ports.iterdir())) if ports.is_dir() else 0
    yield passed(f"{name} has {wanted} and {count(number, 'port')}")


def _look_filter(world: World) -> Iterator[Finding]:
    if world.find_program("nft") is None:
        yield failed("the program nft is missing", command="sudo apt-get install nftables")
        return
    if world.uid != 0:
        # Its tables are root's to read: whether they can be loaded, each lease shows.
        yield passed("nft is there; the root helper loads banger's tables with the first VM")
        return
    done = world.run("nft", "list", "tables")
    if done is None or done.returncode != 0:
        words = done.stderr.decode(errors="replace").strip() if done is not None else "no answer"
        yield failed(
            f"nft does not work on this host: {words}", command="sudo modprobe -a nf_tables"
        )
        return
    have, leased = _filtered_taps(world), {lease.tap for lease in world.helper().leases}
    own = {lease.tap for lease in world.helper().leases if lease.state == "ready"}
    if missing := sorted(own - have):
        yield failed(
            f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} in no set of banger's "
            "tables: its VM reaches nothing",
            "somebody flushed the rules",
            command=_restart(world, set(missing)),
        )
        return
    yield passed(f"nft works; the tables hold {count(len(have & leased), 'leased tap')}")


def _filtered_taps(world: World) -> set[str]:
    """The taps that the table `bridge banger` lets frames come from."""
    text = world.ask("nft", "-j", "list", "set", "bridge", "banger", "vm_ports")
    taps: set[str] = set()
    for item in json.loads(text or "{}").get("nftables", ()):
        for element in item.get("set", {}).get("elem", ()):
            # With a counter or comment the value is wrapped once more (libnftables-json(5)).
            value = element["elem"]["val"] if "elem" in element else element
            taps.add(str(value["concat"][0]))
    return taps


def _restart(world: World, taps: set[str]) -> str:
    ids = {lease.vm_id for lease in world.helper().leases if lease.tap in taps}
    names = [vm.name for vm in world.vms if vm.id in ids]
    return f"banger vm restart {' '.join(names)}" if names else "banger doctor --fix"


def _look_forwarding(world: World) -> Iterator[Finding]:
    users = [vm.name for vm in world.vms if vm.nat and vm.id in world.live()]
    forwards = (world.read("/proc/sys/net/ipv4/ip_forward") or "").strip() == "1"
    if users and not forwards:
        yield failed(
            f"{', '.join(users)} may go out by NAT, but this host forwards nothing",
            command="sudo sysctl net.ipv4.ip_forward=1",
        )
    helper = world.helper()
    for o in helper.obstacles:
        yield warned(
            f"the chain {o.chain} of the table {o.family} {o.table} drops what guests with NAT "
            f"send: {o.why}",
            # Without a lease the helper judges for the bridge of the default name.
            command=_DEFAULT_BRIDGE.sub(world.settings.bridge_name, o.command),
        )
    if helper.obstacles or (users and not forwards):
        return
    if helper.problem is not None:
        yield passed("the root helper does not answer: other packet filters were not looked at")
    elif users:
        yield passed(f"{', '.join(users)} may go out by NAT, and nothing drops what they send")
    else:
        yield passed("no running VM has NAT, and nothing would drop what it sends")


CHECKS = (
    Check(
        name="network",
        look=_look_subnet,
        needs=("bridge",),
        meaning="the bridge's subnet against every address and route of this host; a VPN may come "
        "up later than the bridge",
        mends="another `bridge_ip`; the row names a free one",
    ),
    Check(
        name="bridge",
        look=_look_bridge,
        needs=("bridge",),
        meaning="the bridge as configured: a bridge, with its address",
        mends="stopping the VMs on it: it is made anew by the next start",
    ),
    Check(
        name="packet filter",
        look=_look_filter,
        needs=("bridge",),
        meaning="nftables work, and banger's sets hold every leased tap (which root alone can see)",
        mends="the package or module; restarting the VM whose rules were flushed",
    ),
    Check(
        name="forwarding",
        look=_look_forwarding,
        needs=("bridge",),
        meaning="`ip_forward` while a VM has NAT, and rules of others (Docker, firewalld, ufw) "
        "that drop what such a VM sends",
        mends="the `sysctl` or `nft` command of the row",
    ),
)
