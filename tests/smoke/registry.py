"""The registry of smoke scenarios, and how they are dealt to the hosts of a run.

Read by the runner outside, on any Python and with nothing set up, and by the loop inside the nested
host. A scenario registers itself where it is written; `scenarios/__init__.py` names the modules, in
the order in which their scenarios are shown and dealt.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

Kind = Literal["pure", "repodir", "global"]


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One scenario.

    `pure` ones share nothing with others, or the host's shared VM only (`chain`); `repodir` ones
    are a chain that shares a repository; `global` ones change the host and come last. A `measured`
    one takes figures and is run by name only. After a `final` one the host is of no more use.
    """

    name: str
    kind: Kind
    description: str
    run: Callable[[], None]
    chain: str | None = None
    final: bool = False
    measured: bool = False


class Skipped(Exception):
    """The host lacks what the scenario needs; the text names it."""


_registered: list[Scenario] = []


def scenario(
    kind: Kind,
    description: str,
    *,
    shared_vm: bool = False,
    final: bool = False,
    measured: bool = False,
) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Register a function as the scenario of its name.

    `shared_vm`: it uses the VM of `guests.shared()`, so it is run on one host with the others that
    do, one after the other; each must take the VM in any state and leave it existing.
    """
    chain = "repository" if kind == "repodir" else "shared VM" if shared_vm else None

    def register(run: Callable[[], None]) -> Callable[[], None]:
        _registered.append(
            Scenario(
                name=run.__name__,
                kind=kind,
                description=description,
                run=run,
                chain=chain,
                final=final,
                measured=measured,
            )
        )
        return run

    return register


def all_scenarios() -> list[Scenario]:
    """Every scenario in the order of the list: global ones after the others, final ones last."""
    # Importing them registers them.
    from tests.smoke import scenarios as _  # noqa: F401

    return sorted(_registered, key=lambda each: (each.measured, each.final, each.kind == "global"))


def choose(names: Sequence[str]) -> list[Scenario]:
    """The named scenarios in the list's order, or all that a run without a choice has.

    Raises:
        KeyError: with the names that no scenario has.
    """
    known = all_scenarios()
    if not names:
        return [each for each in known if not each.measured]
    if unknown := set(names) - {each.name for each in known}:
        raise KeyError(", ".join(sorted(unknown)))
    return [each for each in known if each.name in names]


class Deal:
    """Hands out the scenarios of a run, a unit at a time, to whichever host asks next.

    A unit is what has to stay on one host and in order: a chain, or a single scenario. Chains go
    first, because they take longest; global scenarios when all others have been handed out, so that
    a host which has one gets nothing but others of the kind afterwards.
    """

    def __init__(self, scenarios: Iterable[Scenario]) -> None:
        self._lock = threading.Lock()
        chains: dict[str, list[Scenario]] = {}
        singles: list[list[Scenario]] = []
        for each in scenarios:
            if each.chain is not None and each.kind != "global":
                chains.setdefault(each.chain, []).append(each)
            else:
                singles.append([each])
        self._units = sorted(chains.values(), key=len, reverse=True) + singles

    def __len__(self) -> int:
        """How many units wait."""
        return len(self._units)

    def take(self) -> list[Scenario]:
        """The next unit; empty when there is none."""
        with self._lock:
            return self._units.pop(0) if self._units else []
