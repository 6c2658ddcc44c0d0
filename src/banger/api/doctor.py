"""What `banger doctor` says, and what it asks the daemon for."""

from __future__ import annotations

from typing import Literal

from banger.api.base import Wire

Level = Literal["PASS", "WARN", "FAIL"]


class DoctorRow(Wire, frozen=True, kw_only=True):
    """One finding. `command` mends it when typed as it stands; `fixable`: `--fix` does that.

    `fixed` holds what `--fix` did, one sentence each.
    """

    check: str
    level: Level
    message: str
    details: tuple[str, ...] = ()
    command: str | None = None
    fixable: bool = False
    fixed: tuple[str, ...] = ()


class DoctorLease(Wire, frozen=True, kw_only=True):
    """One lease of the root helper's ledger. `state`: making, ready or releasing."""

    id: str
    vm_id: str
    tap: str
    address: str
    bridge: str
    state: str


class DoctorObstacle(Wire, frozen=True, kw_only=True):
    """Somebody else's packet filter that drops what guests with NAT send."""

    family: str
    table: str
    chain: str
    why: str
    command: str


class HelperFacts(Wire, frozen=True, kw_only=True):
    """The root helper as it answered. `privilege`: how it runs, "none" where it cannot.

    `problem` and `hint` say why it did not answer; then everything else is empty.
    """

    privilege: Literal["root", "sudo", "service", "none"]
    version: int | None = None
    leases: tuple[DoctorLease, ...] = ()
    obstacles: tuple[DoctorObstacle, ...] = ()
    ledger_problems: tuple[str, ...] = ()
    problem: str | None = None
    hint: str | None = None


class TriedLease(Wire, frozen=True, kw_only=True):
    """A lease that was made and given back, and how long that took."""

    tap: str
    address: str
    prepare_ms: float
    release_ms: float


class Undecided(Wire, frozen=True, kw_only=True):
    """Something that banger must not decide by itself, and the command by which its user does."""

    what: str
    command: str
    level: Literal["WARN", "FAIL"] = "FAIL"


class DoctorFacts(Wire, frozen=True, kw_only=True):
    """What only a running daemon knows.

    `live` holds the ids of VMs that run, `busy` those that hold something or are being worked on.
    `settings_sha256` is the hash of the settings that it read when it started. `dns` is where it
    answers for `.vm`; `dns_problem` and `routing_problem` say why it or the resolver does not.
    `undecided` is what the last comparison of records and machines left to its user.
    """

    version: str
    pid: int
    network: Literal["bridge", "user"]
    settings_sha256: str
    live: tuple[str, ...]
    busy: tuple[str, ...]
    helper: HelperFacts
    dns: str | None = None
    dns_problem: str | None = None
    routing_problem: str | None = None
    undecided: tuple[Undecided, ...] = ()
    swept: tuple[str, ...] = ()
    tried: TriedLease | None = None
