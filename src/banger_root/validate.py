"""The gate: everything that comes from outside is checked here, once, before it means anything.

The helper trusts no field. It rejects unknown fields and inexact types, takes no pid, no command
line and no interface of the caller's choice, and makes tap names itself. What passes is a frozen
value; the rest of the helper takes only such values. Ledger files go through the same rules.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from typing import Any

from banger_root.errors import HelperError
from banger_root.fields import (
    bool_at,
    exactly,
    number_at,
    object_at,
    parse_document,
    refuse,
    shown,
)

PATH_LIMIT = 1024
PORTS_LIMIT = 32
VCPU_LIMIT = 32
MEMORY_MIN_MIB = 128
# Of a document; that it fits into this host is judged by `leases`, which knows the host.
_MEMORY_MAX_MIB = 1 << 24
POOL_LIMIT = 64
# A /9 has 128 reverse zones of /16, a /17 as many of /24, a /25 of /32; no subnet has more.
_ZONES_LIMIT = 128
PROTOCOL = 1
METHODS = ("prepare", "launch", "signal", "release", "sweep", "resolver", "status")
# Not STOP or CONT: they would make a VM look dead or alive behind the daemon's back.
SIGNALS = ("TERM", "KILL", "INT", "HUP", "QUIT", "USR1", "USR2", "ABRT")
ROLES = ("image", "overlay", "work", "modules")
READ_ONLY_ROLES = frozenset({"image", "modules"})

# RFC 1918 and RFC 6598: where a subnet of ours may lie.
_ALLOWED_SPACE = tuple(
    IPv4Network(n) for n in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10")
)
_ID = re.compile(r"[0-9a-f]{32}")
_BRIDGE = re.compile(r"br-fc(-[a-z0-9-]{1,9})?")
_OWN_TAP = re.compile(r"tap-fc-[0-9a-f]{8}")
_POOL_TAP = re.compile(r"tap-pool-[0-9]{1,5}")
_REVERSE_ZONE = re.compile(r"~([0-9]{1,3}\.){1,4}in-addr\.arpa")
_OP_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

# What plans have since schema 2 of the ledger, and what an older plan means.
_SINCE_SCHEMA_2: dict[str, Any] = {
    "nat": False,
    "guest_host_ports": [],
    "limits": {"vcpu": 1, "memory_mib": MEMORY_MIN_MIB},
    "jail": False,
}


@dataclass(frozen=True, kw_only=True)
class Bridge:
    """A bridge of banger: its name, and the host's address on it."""

    name: str
    address: IPv4Address
    prefix: int

    @property
    def subnet(self) -> IPv4Network:
        return IPv4Network((self.address, self.prefix), strict=False)

    @property
    def mac(self) -> str:
        """Fixed, so that a new port does not change it, and so that our bridge is known as ours."""
        return mac_of(self.address)


@dataclass(frozen=True, kw_only=True)
class LeasePlan:
    """What one microVM needs of the host's network."""

    vm_id: str
    bridge: Bridge
    address: IPv4Address
    isolate: bool
    announce_port: int
    nat: bool
    guest_host_ports: tuple[int, ...]
    vcpu: int
    memory_mib: int
    jail: bool

    @property
    def mac(self) -> str:
        return mac_of(self.address)

    @property
    def own_tap(self) -> str:
        """The tap of a lease that takes none from the pool.

        15 bytes, the most that an interface name can have (IFNAMSIZ counts the NUL).
        """
        return f"tap-fc-{self.vm_id[:8]}"

    @property
    def host_ports(self) -> tuple[int, ...]:
        """The TCP ports of the bridge's address that the guest may reach."""
        return tuple(sorted({self.announce_port, *self.guest_host_ports}))


@dataclass(frozen=True, kw_only=True)
class PoolPlan:
    """How many taps a bridge should have in store; 0 ends its pool."""

    bridge: Bridge
    size: int


@dataclass(frozen=True, kw_only=True)
class ResolverPlan:
    """What systemd-resolved is told of a bridge; `server` is empty where it is to forget it."""

    link: str
    server: str
    domains: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class LaunchPlan:
    """What the VMM of a lease runs with: paths whose form is checked, and nothing else of them."""

    lease_id: str
    firecracker_bin: str
    jailer_bin: str
    kernel: str
    initrd: str
    drives: tuple[str, ...]
    """One path for each of `ROLES`."""
    console: str


@dataclass(frozen=True, kw_only=True)
class SignalPlan:
    """A signal, by its name without SIG, for the VMM of a lease."""

    lease_id: str
    name: str


@dataclass(frozen=True, kw_only=True)
class Request:
    """One call: `params` are still unchecked, except that they are an object."""

    method: str
    params: dict[str, Any]
    op_id: str


def mac_of(address: IPv4Address) -> str:
    """The MAC that belongs to an address: `06:00:` and its four bytes (locally administered)."""
    return "06:00:" + address.packed.hex(":")


def is_bridge_name(name: str) -> bool:
    """Whether a link of this name can be one of ours."""
    return _BRIDGE.fullmatch(name) is not None


def is_lease_id(name: str) -> bool:
    """Whether a name can be that of a lease."""
    return _ID.fullmatch(name) is not None


def is_pool_tap(name: str) -> bool:
    """Whether a link of this name can be of a tap pool of ours."""
    return _POOL_TAP.fullmatch(name) is not None


def is_own_tap(name: str) -> bool:
    """Whether a link of this name can be the tap that was made for one lease."""
    return _OWN_TAP.fullmatch(name) is not None


def parse_request(line: bytes) -> Request:
    """One line of the protocol. Unknown fields of the envelope are ignored, as everywhere.

    Raises:
        HelperError: bad_request, bad_version or unknown_method.
    """
    document = parse_document(line)
    version = document.get("version")
    if type(version) is not int or version != PROTOCOL:
        raise HelperError(
            "bad_version",
            f"the helper speaks protocol {PROTOCOL}, the request says {shown(version)}",
            hint="banger daemon restart",
        )
    op_id = document.get("op_id", "")
    if type(op_id) is not str or (op_id and not _OP_ID.fullmatch(op_id)):
        refuse("op_id", "1 to 64 letters, digits, dots, hyphens and underscores", op_id)
    method = document.get("method")
    if type(method) is not str or method not in METHODS:
        raise HelperError(
            "unknown_method",
            f"the helper has no method {shown(method)}; it has {', '.join(METHODS)}",
        )
    params = document.get("params", {})
    if type(params) is not dict:
        refuse("params", "an object", params)
    return Request(method=method, params=params, op_id=op_id)


def parse_prepare(params: dict[str, Any]) -> LeasePlan:
    """The plan of a lease (spec 3.6).

    Raises:
        HelperError: bad_request, naming field and rule.
    """
    known = ("vm_id", "bridge", "guest", "isolate", "announce_port", *_SINCE_SCHEMA_2)
    exactly(params, "params", known)
    vm_id = _id(params["vm_id"], "vm_id")
    bridge = _bridge(params["bridge"])
    guest = object_at(params["guest"], "guest")
    exactly(guest, "guest", ("address", "mac"))
    address = _address(guest["address"], "guest.address")
    subnet = bridge.subnet
    if address not in subnet:
        refuse("guest.address", f"an address in {subnet}", guest["address"])
    if address in (subnet.network_address, subnet.broadcast_address, bridge.address):
        refuse(
            "guest.address",
            f"neither network nor broadcast address of {subnet}, nor the bridge's own",
            guest["address"],
        )
    if type(guest["mac"]) is not str or guest["mac"] != mac_of(address):
        refuse("guest.mac", f"{mac_of(address)}, the one derived from {address}", guest["mac"])
    ports = params["guest_host_ports"]
    if type(ports) is not list or len(ports) > PORTS_LIMIT:
        refuse("guest_host_ports", f"a list of at most {PORTS_LIMIT} numbers", ports)
    limits = object_at(params["limits"], "limits")
    exactly(limits, "limits", ("vcpu", "memory_mib"))
    return LeasePlan(
        vm_id=vm_id,
        bridge=bridge,
        address=address,
        isolate=bool_at(params["isolate"], "isolate"),
        announce_port=number_at(params["announce_port"], "announce_port", 1, 65535),
        nat=bool_at(params["nat"], "nat"),
        guest_host_ports=tuple(number_at(p, "guest_host_ports", 1, 65535) for p in ports),
        vcpu=number_at(limits["vcpu"], "limits.vcpu", 1, VCPU_LIMIT),
        memory_mib=number_at(
            limits["memory_mib"], "limits.memory_mib", MEMORY_MIN_MIB, _MEMORY_MAX_MIB
        ),
        jail=bool_at(params["jail"], "jail"),
    )


def parse_plan_of_schema_1(plan: dict[str, Any]) -> LeasePlan:
    """The plan in a ledger file of a helper that knew neither NAT nor jails.

    Raises:
        HelperError: bad_request.
    """
    return parse_prepare({**_SINCE_SCHEMA_2, **plan})


def parse_release(params: dict[str, Any]) -> str:
    """The lease id of a release.

    Raises:
        HelperError: bad_request.
    """
    exactly(params, "params", ("id",))
    return _id(params["id"], "id")


def parse_launch(params: dict[str, Any]) -> LaunchPlan:
    """What a lease is to run (spec 3.6); where its paths lead is judged when they are opened.

    Raises:
        HelperError: bad_request, naming field and rule.
    """
    paths = ("firecracker_bin", "jailer_bin", "kernel", "initrd", "console")
    exactly(params, "params", ("id", *paths, "drives"))
    lease_id = _id(params["id"], "id")
    drives = params["drives"]
    if type(drives) is not list or len(drives) != len(ROLES):
        refuse("drives", f"the list of {', '.join(ROLES)}", drives)
    for number, (drive, role) in enumerate(zip(drives, ROLES, strict=True)):
        field = f"drives[{number}]"
        exactly(object_at(drive, field), field, ("role", "path"))
        if type(drive["role"]) is not str or drive["role"] != role:
            refuse(f"{field}.role", role, drive["role"])
    return LaunchPlan(
        lease_id=lease_id,
        **{name: parse_path(params[name], name) for name in paths},
        drives=tuple(parse_path(d["path"], f"drives[{n}].path") for n, d in enumerate(drives)),
    )


def parse_signal(params: dict[str, Any]) -> SignalPlan:
    """A signal for a lease: one of `SIGNALS`, with or without SIG, in any case; no number.

    Raises:
        HelperError: bad_request.
    """
    exactly(params, "params", ("id", "name"))
    lease_id, name = _id(params["id"], "id"), params["name"]
    # isascii first: upper() makes ASCII letters of some others.
    plain = name.upper().removeprefix("SIG") if type(name) is str and name.isascii() else None
    if plain not in SIGNALS:
        refuse("name", f"one of {', '.join(SIGNALS)}", name)
    return SignalPlan(lease_id=lease_id, name=plain)


def parse_nothing(params: dict[str, Any]) -> None:
    """The params of a method that takes none.

    Raises:
        HelperError: bad_request.
    """
    exactly(params, "params", ())


def parse_sweep(params: dict[str, Any]) -> PoolPlan | None:
    """The pool that a sweep fills or ends; None: pools stay as they are.

    Raises:
        HelperError: bad_request.
    """
    if params.get("pool") is None:
        exactly({"pool": None, **params}, "params", ("pool",))
        return None
    exactly(params, "params", ("pool",))
    pool = object_at(params["pool"], "pool")
    exactly(pool, "pool", ("bridge", "size"))
    return PoolPlan(
        bridge=_bridge(pool["bridge"]), size=number_at(pool["size"], "pool.size", 0, POOL_LIMIT)
    )


def parse_resolver(params: dict[str, Any]) -> ResolverPlan:
    """What a call of `resolver` asks for; that the zones are those of the link's own subnet is
    judged by `resolver`, which sees the link.

    Raises:
        HelperError: bad_request.
    """
    exactly(params, "params", ("action", "link", "server", "domains"))
    link, server, domains = params["link"], params["server"], params["domains"]
    if type(link) is not str or not is_bridge_name(link):
        refuse("link", "br-fc, or br-fc- and up to 9 of a-z, 0-9 and -", link)
    if params["action"] == "clear":
        if server != "" or domains != []:
            refuse("server and domains", "empty where the action is clear", [server, domains])
        return ResolverPlan(link=link, server="", domains=())
    if params["action"] != "set":
        refuse("action", "set or clear", params["action"])
    if type(domains) is not list or not 2 <= len(domains) <= 1 + _ZONES_LIMIT:
        refuse("domains", "~vm and the reverse zones of the bridge's subnet", domains)
    for domain in domains:
        if domain != "~vm" and not (type(domain) is str and _REVERSE_ZONE.fullmatch(domain)):
            refuse("domains", "~vm and the reverse zones of the bridge's subnet", domain)
    if len(set(domains)) != len(domains):
        refuse("domains", "without a name twice", domains)
    return ResolverPlan(link=link, server=_server(server), domains=tuple(domains))


def parse_lease_id(text: str) -> str:
    """A lease id out of a file name.

    Raises:
        HelperError: bad_request.
    """
    return _id(text, "lease id")


def format_bridge(bridge: Bridge) -> dict[str, Any]:
    """The bridge, as `prepare` and `sweep` take it."""
    return {"name": bridge.name, "address": str(bridge.address), "prefix": bridge.prefix}


def format_plan(plan: LeasePlan) -> dict[str, Any]:
    """The params that `parse_prepare` would turn into this plan."""
    return {
        "vm_id": plan.vm_id,
        "bridge": format_bridge(plan.bridge),
        "guest": {"address": str(plan.address), "mac": plan.mac},
        "isolate": plan.isolate,
        "announce_port": plan.announce_port,
        "nat": plan.nat,
        "guest_host_ports": list(plan.guest_host_ports),
        "limits": {"vcpu": plan.vcpu, "memory_mib": plan.memory_mib},
        "jail": plan.jail,
    }


def _bridge(value: Any) -> Bridge:
    fields = object_at(value, "bridge")
    exactly(fields, "bridge", ("name", "address", "prefix"))
    name = fields["name"]
    if type(name) is not str or not is_bridge_name(name):
        refuse("bridge.name", "br-fc, or br-fc- and up to 9 of a-z, 0-9 and -", name)
    address = _address(fields["address"], "bridge.address")
    prefix = number_at(fields["prefix"], "bridge.prefix", 8, 30)
    bridge = Bridge(name=name, address=address, prefix=prefix)
    if not any(bridge.subnet.subnet_of(space) for space in _ALLOWED_SPACE):
        refuse("bridge.address", "a subnet in private or shared address space", str(bridge.subnet))
    if address in (bridge.subnet.network_address, bridge.subnet.broadcast_address):
        refuse("bridge.address", f"a host address of {bridge.subnet}", fields["address"])
    return bridge


def _address(value: Any, field: str) -> IPv4Address:
    if type(value) is str:
        try:
            return IPv4Address(value)
        except ipaddress.AddressValueError:
            pass
    refuse(field, "an IPv4 address", value)


def _server(value: Any) -> str:
    """A loopback address, alone or with `:port`, in the form in which resolvectl prints it."""
    if type(value) is str:
        address, colon, port = value.partition(":")
        try:
            if not IPv4Address(address).is_loopback:
                raise ValueError
            if not colon:
                return value
            # isdecimal and no leading zero: int() would take spaces, signs and underscores.
            if port.isascii() and port.isdecimal() and str(int(port)) == port:
                if 1 <= int(port) <= 65535:
                    return value
        except ValueError:
            pass
    refuse("server", "a loopback IPv4 address, alone or with a port", value)


def parse_path(value: Any, field: str) -> str:
    """A path by its form; `paths` says where it may lead.

    Raises:
        HelperError: bad_request.
    """
    if type(value) is str:
        try:
            size = len(value.encode())
        except UnicodeEncodeError:  # half of a surrogate pair
            size = PATH_LIMIT + 1
        parts = value.split("/")
        if (
            size <= PATH_LIMIT
            and value.startswith("/")
            and not any(part in ("", ".", "..") for part in parts[1:])
            and "\0" not in value
            and "\n" not in value
        ):
            return value
    refuse(
        field,
        f"an absolute path of at most {PATH_LIMIT} bytes without empty, '.' and '..' components, "
        f"NUL and newline",
        value,
    )


def _id(value: Any, field: str) -> str:
    if type(value) is not str or not _ID.fullmatch(value):
        refuse(field, "32 hexadecimal digits in lower case", value)
    return value
