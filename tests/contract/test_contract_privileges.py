"""docs/privileges.md says what root does: its tables are written from the helper's own code."""

from __future__ import annotations

import ast
import copy
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from banger_root import fields, leases, ledger, scope, service, sweep, trust, validate
from banger_root.errors import HelperError

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs/privileges.md"
UNIT = ROOT / "src/banger/system/units/bangerd-root.service"
_RENEW = (
    "docs/privileges.md does not say what the helper does. Write its tables anew and look at the "
    f"difference:\n  BANGER_RENEW=1 python -m pytest {__file__}"
)

_BRIDGE = {"name": "br-fc", "address": "172.16.0.1", "prefix": 24}
_ID = "0123456789abcdef0123456789abcdef"
_PATH = "/a/file"

# Right params of each method; what is wrong with a field is asked of the validators.
SAMPLES: dict[str, dict[str, Any]] = {
    "prepare": {
        "vm_id": _ID,
        "bridge": _BRIDGE,
        "guest": {"address": "172.16.0.2", "mac": "06:00:ac:10:00:02"},
        "isolate": True,
        "announce_port": 7001,
        "nat": False,
        "guest_host_ports": [],
        "limits": {"vcpu": 1, "memory_mib": 128},
        "jail": True,
    },
    "launch": {
        "id": _ID,
        "firecracker_bin": _PATH,
        "jailer_bin": _PATH,
        "kernel": _PATH,
        "initrd": _PATH,
        "drives": [{"role": role, "path": _PATH} for role in validate.ROLES],
        "console": _PATH,
    },
    "signal": {"id": _ID, "name": "TERM"},
    "release": {"id": _ID},
    "sweep": {"pool": {"bridge": _BRIDGE, "size": 4}},
    "resolver": {
        "action": "set",
        "link": "br-fc",
        "server": "127.0.0.1:42069",
        "domains": ["~vm", "~0.16.172.in-addr.arpa"],
    },
    "status": {},
}
PARSERS: dict[str, Callable[[dict[str, Any]], object]] = {
    "prepare": validate.parse_prepare,
    "launch": validate.parse_launch,
    "signal": validate.parse_signal,
    "release": validate.parse_release,
    "sweep": validate.parse_sweep,
    "resolver": validate.parse_resolver,
    "status": validate.parse_nothing,
}

# Why the helper's unit keeps each capability.
REASONS = {
    "CAP_CHOWN": "the jailer gives the jail to the owner; a used jail goes back to root, "
    "the service's socket to the owner",
    "CAP_DAC_OVERRIDE": "a jail's content is the owner's when root removes it, with modes of the "
    "owner's choice",
    "CAP_FOWNER": "a jailer that changes modes of what is the owner's; the pinned one needs it not",
    "CAP_KILL": "the VMM runs as the owner; `signal` and `release` end it",
    "CAP_MKNOD": "the jailer makes `/dev/kvm`, `/dev/net/tun`, `/dev/urandom` and "
    "`/dev/userfaultfd` in the jail",
    "CAP_NET_ADMIN": "bridge, taps, nftables, forgetting a guest's connections",
    "CAP_NET_RAW": "packet filter tools other than `nft`, which needs it not",
    "CAP_SETGID": "looking at files as the owner; the jailer becomes the owner's group",
    "CAP_SETUID": "looking at files as the owner; the jailer becomes the owner",
    "CAP_SYS_ADMIN": "a mount namespace for each VMM, the binds in it, the jailer's pivot_root",
    "CAP_SYS_CHROOT": "a jailer that calls chroot; the pinned one needs it not (pivot_root)",
}


def rules() -> list[list[str]]:
    """Each field of each method, with the rule in the words of its refusal."""
    rows = []
    for method in validate.METHODS:
        sample = SAMPLES[method]
        PARSERS[method](copy.deepcopy(sample))
        for path in _places(sample):
            wrong = copy.deepcopy(sample)
            where: Any = wrong
            for key in path[:-1]:
                where = where[key]
            where[path[-1]] = 0.5
            with pytest.raises(HelperError) as caught:
                PARSERS[method](wrong)
            rule = re.fullmatch(r"\S+(?: and \S+)? must be (.*), not .*", caught.value.message)
            assert rule, caught.value.message
            rows.append([f"`{method}`", f"`{_name(path)}`", rule[1]])
        if not sample:
            rows.append([f"`{method}`", "none", ""])
    return rows


def _places(params: dict[str, Any]) -> list[tuple[str | int, ...]]:
    found: list[tuple[str | int, ...]] = []
    for key, value in params.items():
        found.append((key,))
        if isinstance(value, dict):
            found += [(key, *inner) for inner in _places(value)]
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            found += [(key, 0, inner) for inner in value[0]]
    return found


def _name(path: tuple[str | int, ...]) -> str:
    return "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path).lstrip(".")


def limits() -> list[list[str]]:
    return [
        ["a request", f"{fields.LINE_LIMIT} bytes, nested {fields.DEPTH_LIMIT} deep"],
        ["connections at a time", str(service.CONNECTIONS_LIMIT)],
        ["a peer that says nothing", f"{service.IDLE_TIMEOUT_S:g} s"],
        ["leases", str(leases.LEASE_LIMIT)],
        ["taps in the pool", str(validate.POOL_LIMIT)],
        ["TCP ports of the host for a guest", str(validate.PORTS_LIMIT)],
        ["vCPUs", str(validate.VCPU_LIMIT)],
        ["memory of a VM", f"{validate.MEMORY_MIN_MIB} MiB to what the host has"],
        ["a path", f"{validate.PATH_LIMIT} bytes"],
        ["processes and threads of a VMM", str(scope.TASKS_MAX)],
        ["memory of a VMM", f"its guest's and {scope.MEMORY_EXTRA_MIB} MiB"],
        ["CPU time of a VMM", f"its vCPUs and {scope.CPU_EXTRA}"],
        ["a lease without a process, before a sweep takes it", f"{sweep.ORPHAN_AGE_S:g} s"],
    ]


def programs() -> list[list[str]]:
    """Every program that the helper's code starts by name, wherever it stands."""
    uses: dict[str, set[str]] = {}
    for module in sorted((ROOT / "src/banger_root").glob("*.py")):
        for node in ast.walk(ast.parse(module.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in ("run", "find_program")
                and isinstance(node.func.value, ast.Name)
                and node.func.value.id == "process"
            ):
                name = node.args[0]
                assert isinstance(name, ast.Constant), f"{module.name}:{node.lineno}"
                uses.setdefault(name.value, set()).add(module.stem)
    return [
        [f"`{name}`", ", ".join(f"`{m}`" for m in sorted(used))]
        for name, used in sorted(uses.items())
    ]


def capabilities() -> list[list[str]]:
    """The bounding set of the unit, in its order; each has a reason."""
    (line,) = re.findall(r"^CapabilityBoundingSet=(.*)$", UNIT.read_text(), re.MULTILINE)
    return [[f"`{name}`", REASONS[name]] for name in line.split()]


TABLES: dict[str, tuple[list[str], Callable[[], list[list[str]]]]] = {
    "rules": (["Method", "Field", "Must be"], rules),
    "limits": (["What", "At most"], limits),
    "signals": (["Signals"], lambda: [[f"`{name}`"] for name in validate.SIGNALS]),
    "roles": (
        ["Drive", "In the jail"],
        lambda: [
            [f"`{role}`", "read-only" if role in validate.READ_ONLY_ROLES else "writable"]
            for role in validate.ROLES
        ],
    ),
    "steps": (["A lease can hold"], lambda: [[f"`{step}`"] for step in ledger.STEPS]),
    "programs": (["Program", "Started by"], programs),
    "pins": (
        ["Program", "sha256"],
        lambda: [[f"`{name}`", f"`{digest}`"] for name, digest in trust.PINS.items()],
    ),
    "capabilities": (["Capability", "What for"], capabilities),
}


def draw(name: str) -> str:
    head, rows = TABLES[name]
    lines = [head, ["---"] * len(head), *rows()]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def with_tables(text: str) -> str:
    for name in TABLES:
        begin, found, rest = text.partition(f"<!-- {name} -->\n")
        assert found, f"docs/privileges.md has no place for the table {name}"
        text = begin + found + draw(name) + "\n" + rest[rest.index("<!-- end -->") :]
    return text


def test_document_has_the_tables_of_the_code() -> None:
    text = DOCUMENT.read_text()
    if os.environ.get("BANGER_RENEW"):
        DOCUMENT.write_text(with_tables(text))
        text = DOCUMENT.read_text()
    assert with_tables(text) == text, _RENEW


def test_every_method_is_described() -> None:
    text = DOCUMENT.read_text()
    assert set(SAMPLES) == set(PARSERS) == set(validate.METHODS)
    for method in validate.METHODS:
        assert re.search(rf"^- \*\*`{method}`\*\*", text, re.MULTILINE), method
