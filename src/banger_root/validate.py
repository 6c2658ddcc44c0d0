"""The gate: everything that comes from outside is checked here, once, before it means anything.

The helper trusts no field. It rejects unknown fields and inexact types, takes no pid, no command
line and no interface of the caller's choice, and makes tap names itself. What passes is a frozen
value; the rest of the helper takes only such values. Ledger files go through the same rules.
"""

from __future__ import annotations

import ipaddress
import json
import re
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from typing import Any, NoReturn

from banger_root.errors import HelperError

LINE_LIMIT = 1 << 20
DEPTH_LIMIT = 8
PROTOCOL = 1
METHODS = ("prepare", "release", "sweep", "status")

# RFC 1918 and RFC 6598: where a subnet of ours may lie.
_ALLOWED_SPACE = tuple(
    IPv4Network(n) for n in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10")
)
_ID = re.compile(r"[0-9a-f]{32}")
_BRIDGE = re.compile(r"br-fc(-[a-z0-9-]{1,9})?")
_OP_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


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

    @property
    def mac(self) -> str:
        return mac_of(self.address)

    @property
    def tap(self) -> str:
        """15 bytes, the most that an interface name can have (IFNAMSIZ counts the NUL)."""
        return f"tap-fc-{self.vm_id[:8]}"


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
            f"the helper speaks protocol {PROTOCOL}, the request says {_shown(version)}",
            hint="banger daemon restart",
        )
    op_id = document.get("op_id", "")
    if type(op_id) is not str or (op_id and not _OP_ID.fullmatch(op_id)):
        _refuse("op_id", "1 to 64 letters, digits, dots, hyphens and underscores", op_id)
    method = document.get("method")
    if type(method) is not str or method not in METHODS:
        raise HelperError(
            "unknown_method",
            f"the helper has no method {_shown(method)}; it has {', '.join(METHODS)}",
        )
    params = document.get("params", {})
    if type(params) is not dict:
        _refuse("params", "an object", params)
    return Request(method=method, params=params, op_id=op_id)


def parse_document(line: bytes) -> dict[str, Any]:
    """A JSON object of bounded size and depth, without duplicate keys.

    Raises:
        HelperError: bad_request.
    """
    if len(line) > LINE_LIMIT:
        raise HelperError("bad_request", f"the request is longer than {LINE_LIMIT} bytes")
    try:
        text = line.decode("utf-8")
        # Before parsing: the parser would recurse as deep as it is told to.
        if _depth(text) > DEPTH_LIMIT:
            raise HelperError("bad_request", f"the request nests deeper than {DEPTH_LIMIT}")
        document = json.loads(text, object_pairs_hook=_object, parse_constant=_constant)
    except ValueError as e:
        raise HelperError("bad_request", f"the request is no JSON: {e}") from e
    if type(document) is not dict:
        raise HelperError("bad_request", "the request is no JSON object")
    return document


def parse_prepare(params: dict[str, Any]) -> LeasePlan:
    """The plan of a lease (spec 3.6).

    Raises:
        HelperError: bad_request, naming field and rule.
    """
    _exactly(params, "params", ("vm_id", "bridge", "guest", "isolate", "announce_port"))
    vm_id = _id(params["vm_id"], "vm_id")
    bridge = _bridge(params["bridge"])
    guest = _object_at(params["guest"], "guest")
    _exactly(guest, "guest", ("address", "mac"))
    address = _address(guest["address"], "guest.address")
    subnet = bridge.subnet
    if address not in subnet:
        _refuse("guest.address", f"an address in {subnet}", guest["address"])
    if address in (subnet.network_address, subnet.broadcast_address, bridge.address):
        _refuse(
            "guest.address",
            f"neither network nor broadcast address of {subnet}, nor the bridge's own",
            guest["address"],
        )
    if type(guest["mac"]) is not str or guest["mac"] != mac_of(address):
        _refuse("guest.mac", f"{mac_of(address)}, the one derived from {address}", guest["mac"])
    isolate = params["isolate"]
    if type(isolate) is not bool:
        _refuse("isolate", "true or false", isolate)
    port = params["announce_port"]
    if type(port) is not int or not 1 <= port <= 65535:
        _refuse("announce_port", "a number from 1 to 65535", port)
    return LeasePlan(
        vm_id=vm_id, bridge=bridge, address=address, isolate=isolate, announce_port=port
    )


def parse_release(params: dict[str, Any]) -> str:
    """The lease id of a release.

    Raises:
        HelperError: bad_request.
    """
    _exactly(params, "params", ("id",))
    return _id(params["id"], "id")


def parse_nothing(params: dict[str, Any]) -> None:
    """The params of a method that takes none.

    Raises:
        HelperError: bad_request.
    """
    _exactly(params, "params", ())


def parse_lease_id(text: str) -> str:
    """A lease id out of a file name.

    Raises:
        HelperError: bad_request.
    """
    return _id(text, "lease id")


def format_plan(plan: LeasePlan) -> dict[str, Any]:
    """The params that `parse_prepare` would turn into this plan."""
    return {
        "vm_id": plan.vm_id,
        "bridge": {
            "name": plan.bridge.name,
            "address": str(plan.bridge.address),
            "prefix": plan.bridge.prefix,
        },
        "guest": {"address": str(plan.address), "mac": plan.mac},
        "isolate": plan.isolate,
        "announce_port": plan.announce_port,
    }


def _bridge(value: Any) -> Bridge:
    fields = _object_at(value, "bridge")
    _exactly(fields, "bridge", ("name", "address", "prefix"))
    name = fields["name"]
    if type(name) is not str or not is_bridge_name(name):
        _refuse("bridge.name", "br-fc, or br-fc- and up to 9 of a-z, 0-9 and -", name)
    address = _address(fields["address"], "bridge.address")
    prefix = fields["prefix"]
    if type(prefix) is not int or not 8 <= prefix <= 30:
        _refuse("bridge.prefix", "a number from 8 to 30", prefix)
    bridge = Bridge(name=name, address=address, prefix=prefix)
    if not any(bridge.subnet.subnet_of(space) for space in _ALLOWED_SPACE):
        _refuse("bridge.address", "a subnet in private or shared address space", str(bridge.subnet))
    if address in (bridge.subnet.network_address, bridge.subnet.broadcast_address):
        _refuse("bridge.address", f"a host address of {bridge.subnet}", fields["address"])
    return bridge


def _address(value: Any, field: str) -> IPv4Address:
    if type(value) is str:
        try:
            return IPv4Address(value)
        except ipaddress.AddressValueError:
            pass
    _refuse(field, "an IPv4 address", value)


def _id(value: Any, field: str) -> str:
    if type(value) is not str or not _ID.fullmatch(value):
        _refuse(field, "32 hexadecimal digits in lower case", value)
    return value


def _object_at(value: Any, field: str) -> dict[str, Any]:
    if type(value) is not dict:
        _refuse(field, "an object", value)
    return value


def _exactly(fields: dict[str, Any], where: str, known: tuple[str, ...]) -> None:
    unknown = sorted(set(fields) - set(known))
    if unknown:
        raise HelperError("bad_request", f"{where} has the unknown field {_shown(unknown[0])}")
    for name in known:
        if name not in fields:
            raise HelperError("bad_request", f"{where} lacks the field {name}")


def _refuse(field: str, rule: str, value: Any) -> NoReturn:
    raise HelperError("bad_request", f"{field} must be {rule}, not {_shown(value)}")


def _shown(value: Any) -> str:
    """A value for an error message: what came from outside is quoted, escaped and cut."""
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("an object has the same key twice")
    return fields


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not allowed")


def _depth(text: str) -> int:
    """How deep the brackets outside strings nest."""
    deepest = depth = 0
    inside = escaped = False
    for c in text:
        if inside:
            if escaped:
                escaped = False
            elif c == "\\":
                escaped = True
            elif c == '"':
                inside = False
        elif c == '"':
            inside = True
        elif c in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif c in "]}":
            depth -= 1
    return deepest
