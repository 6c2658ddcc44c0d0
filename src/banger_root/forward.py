"""The way out of this host for guests with NAT, past the packet filters of others.

An accept in banger's tables ends banger's chains only: a drop of Docker, ufw, firewalld or an
administrator on the same hook still wins. Docker has a chain for others, `DOCKER-USER`: there a
bridge gets one pair of rules with its first NAT lease, known by its comment, gone with the last.
Elsewhere nothing is changed: the filter is named, with the command that lets us through. Filters
are judged by their base chains, and by those rules that ask for no more than where a packet comes
from; a rule that names the bridge or its addresses and accepts is believed to do what it is for.
`iptables-legacy` is not seen at all.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from ipaddress import IPv4Network
from typing import TYPE_CHECKING, Any

from banger_root import process
from banger_root.errors import HelperError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from banger_root.validate import Bridge

_FORWARDING = "/proc/sys/net/ipv4/ip_forward"
_DOCKER = ("ip", "filter", "DOCKER-USER")
_FAMILIES = ("ip", "inet")
# Words of a rule that do not narrow it down.
_HARMLESS = frozenset({"counter", "comment", "log"})

Rule = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Obstacle:
    """A base chain of somebody else's that drops what a bridge forwards."""

    family: str
    table: str
    chain: str
    why: str
    command: str
    """Lets the bridge through; for a root shell's user, with sudo."""

    def describe(self) -> dict[str, str]:
        return {
            "family": self.family,
            "table": self.table,
            "chain": self.chain,
            "why": self.why,
            "command": self.command,
        }


@dataclass(frozen=True, kw_only=True)
class _Table:
    """The chains of a table, each with its rules as lists of expressions."""

    family: str
    name: str
    rules: dict[str, list[Rule]]
    handles: dict[str, list[tuple[int, str]]]
    """Of the same rules: handle and comment."""


def refuse_obstacles(doing: str, bridge: Bridge) -> None:
    """Refuse NAT on a bridge that somebody's filter would not let through anyway.

    Raises:
        HelperError: reason forward_dropped, naming table and chain; or nft failed.
    """
    for obstacle in find_forward_obstacles(bridge):
        raise HelperError(
            "operation_failed",
            f"{doing}: NAT would not work: {obstacle.why} "
            f"(nft table {obstacle.family} {obstacle.table}, chain {obstacle.chain})",
            hint=obstacle.command,
            reason="forward_dropped",
        )


def find_forward_obstacles(bridge: Bridge, *, docker_open: bool = True) -> list[Obstacle]:
    """The filters of others that drop what this bridge forwards.

    `docker_open`: a filter with a chain DOCKER-USER is none, because `let_through` opens it;
    otherwise it is one as long as our rules are not there.

    Raises:
        HelperError: nft failed.
    """
    found = []
    tables: dict[tuple[str, str], _Table] = {}
    for chain in _forward_chains():
        key = (chain["family"], chain["table"])
        if key not in tables:
            tables[key] = _read_table(*key)
        table, name = tables[key], chain["name"]
        accepted = _judge(table, name, bridge, frozenset())
        if accepted or (accepted is None and chain.get("policy") != "drop"):
            continue
        reached = list(_reachable(table, name))
        if (*key, "DOCKER-USER") == _DOCKER and "DOCKER-USER" in reached and docker_open:
            continue
        found.append(
            Obstacle(
                family=key[0],
                table=key[1],
                chain=name,
                why="its policy is to drop what it forwards"
                if accepted is None
                else "a rule of it refuses whatever no other accepts",
                command=_find_command(table, name, reached, bridge.name),
            )
        )
    return found


def let_through(bridge: str) -> None:
    """Let this host forward, and put our rules into Docker's chain where it has one.

    Raises:
        HelperError: nft failed, or the kernel refused.
    """
    _enable_forwarding()
    if not _docker_handles(bridge):
        _insert_docker_rules(bridge)


def close_behind(bridge: str, *, still_used: Callable[[], bool]) -> None:
    """Take our rules out of Docker's chain, if they are there and nobody uses them any more.

    Forwarding stays on: others may rely on it by now.

    Raises:
        HelperError: nft failed.
    """
    family, table, chain = _DOCKER
    handles = _docker_handles(bridge)
    if handles and not still_used():
        text = "".join(f"delete rule {family} {table} {chain} handle {h}\n" for h in handles)
        process.run("nft", ["-f", "-"], stdin=text)


def _enable_forwarding() -> None:
    try:
        with open(_FORWARDING, "r+", encoding="ascii") as f:
            if f.read().strip() == "1":
                return
            f.seek(0)
            f.write("1")
    except OSError as e:
        raise HelperError(
            "operation_failed",
            f"letting this host forward packets: writing {_FORWARDING}: {e.strerror}",
            hint="sudo sysctl net.ipv4.ip_forward=1",
        ) from e


def _docker_handles(bridge: str) -> list[int] | None:
    """The handles of our rules in Docker's chain; None where there is no such chain."""
    try:
        table = _read_table(*_DOCKER[:2], chain=_DOCKER[2])
    except process.ProgramFailed as e:
        if "No such file or directory" in e.stderr:
            return None
        raise
    return [h for h, comment in table.handles[_DOCKER[2]] if comment == _comment(bridge)]


def _insert_docker_rules(bridge: str) -> None:
    family, table, chain = _DOCKER
    # Only what iptables can say as well, counter included: it calls the whole table incompatible
    # at sight of anything else. What may come in is decided in our own tables.
    text = "".join(
        f"insert rule {family} {table} {chain} "
        f'{direction} "{bridge}" counter accept comment "{_comment(bridge)}"\n'
        for direction in ("oifname", "iifname")
    )
    try:
        process.run("nft", ["-f", "-"], stdin=text)
    except process.ProgramFailed as e:
        if "No such file or directory" not in e.stderr:
            raise


def _comment(bridge: str) -> str:
    return f"banger {bridge}"


def _forward_chains() -> Iterator[dict[str, Any]]:
    """The base chains of others that see forwarded IPv4 packets."""
    for item in _list(["list", "chains"]):
        chain = item.get("chain", {})
        if (
            chain.get("hook") == "forward"
            and chain.get("family") in _FAMILIES
            and chain.get("type") == "filter"
            and chain.get("table") != "banger"
        ):
            yield chain


def _read_table(family: str, name: str, chain: str | None = None) -> _Table:
    what = ["table", family, name] if chain is None else ["chain", family, name, chain]
    rules: dict[str, list[Rule]] = {} if chain is None else {chain: []}
    handles: dict[str, list[tuple[int, str]]] = {} if chain is None else {chain: []}
    for item in _list(["-a", "list", *what]):
        if "chain" in item:
            rules.setdefault(item["chain"]["name"], [])
            handles.setdefault(item["chain"]["name"], [])
        elif "rule" in item:
            rule = item["rule"]
            rules.setdefault(rule["chain"], []).append(rule.get("expr", []))
            handles.setdefault(rule["chain"], []).append((rule["handle"], rule.get("comment", "")))
    return _Table(family=family, name=name, rules=rules, handles=handles)


def _list(words: list[str]) -> list[dict[str, Any]]:
    text = process.run("nft", ["-j", *words])
    # Some versions print a remark about tables of iptables behind it.
    document, _ = json.JSONDecoder().raw_decode(text.lstrip())
    items: list[dict[str, Any]] = document["nftables"]
    return items


def _reachable(table: _Table, start: str) -> Iterator[str]:
    """The chain and all that it leads to, each once."""
    seen: set[str] = set()
    ahead = [start]
    while ahead:
        name = ahead.pop()
        if name in seen or name not in table.rules:
            continue
        seen.add(name)
        yield name
        for rule in table.rules[name]:
            ahead += _targets(rule)


def _targets(value: Any) -> Iterator[str]:
    """The chains that an expression jumps to, verdict maps included."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in ("jump", "goto") and isinstance(inner, dict) and "target" in inner:
                yield str(inner["target"])
            else:
                yield from _targets(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _targets(inner)


def _judge(table: _Table, chain: str, bridge: Bridge, seen: frozenset[str]) -> bool | None:
    """Whether a chain accepts or drops whatever comes from the bridge; None: it says neither.

    Rules with any other condition say nothing here.
    """
    if chain in seen or chain not in table.rules:
        return None
    seen |= {chain}
    for rule in table.rules[chain]:
        verdict = _verdict(rule, bridge)
        if verdict is None:
            continue
        word, target = verdict
        if word in ("accept", "drop"):
            return word == "accept"
        if word == "return":
            return None
        judged = _judge(table, target, bridge, seen)
        if judged is not None or word == "goto":
            return judged
    return None


def _verdict(rule: Rule, bridge: Bridge) -> tuple[str, str] | None:
    """What a rule does with whatever comes from the bridge; None where it depends, or nothing."""
    found = None
    named = narrowed = False
    for part in rule:
        (key, value), *_ = part.items()
        if key == "match":
            holds = _holds(value, bridge)
            if holds is False:
                return None
            named |= holds is True
            narrowed |= holds is None
        elif key in ("accept", "return"):
            found = (key, "")
        elif key in ("drop", "reject"):
            found = ("drop", "")
        elif key in ("jump", "goto"):
            found = (key, str(value["target"]))
        elif key not in _HARMLESS and not _is_comment(part):
            narrowed = True
    return found if not narrowed or (named and found == ("accept", "")) else None


def _holds(match: dict[str, Any], bridge: Bridge) -> bool | None:
    """Whether a condition is true of everything that comes from the bridge; None: it depends."""
    left, right, op = match.get("left"), match["right"], match.get("op")
    values = right["set"] if isinstance(right, dict) and "set" in right else [right]
    if left == {"meta": {"key": "iifname"}}:
        named = any(_is_name(value, bridge.name) for value in values)
    elif left == {"payload": {"protocol": "ip", "field": "saddr"}}:
        named = any(_covers(value, bridge.subnet) for value in values)
        if not named:
            return None
    else:
        return None
    return named if op == "==" else not named if op == "!=" else None


def _is_name(value: Any, name: str) -> bool:
    return isinstance(value, str) and (
        value == name or (value.endswith("*") and name.startswith(value[:-1]))
    )


def _covers(value: Any, subnet: IPv4Network) -> bool:
    prefix = value.get("prefix") if isinstance(value, dict) else None
    if not isinstance(prefix, dict):
        return False
    try:
        return subnet.subnet_of(IPv4Network((prefix["addr"], prefix["len"])))
    except ValueError:
        return False


def _is_comment(part: dict[str, Any]) -> bool:
    """The comment of a rule of iptables, which nft shows as a foreign match."""
    xt = part.get("xt")
    return isinstance(xt, dict) and xt.get("name") == "comment"


def _find_command(table: _Table, chain: str, reached: list[str], bridge: str) -> str:
    if table.name == "firewalld":
        return (
            f"sudo firewall-cmd --permanent --zone=trusted --add-interface={bridge} "
            f"&& sudo firewall-cmd --reload"
        )
    if "ufw-before-forward" in reached:
        return f"sudo ufw route allow in on {bridge}"
    if (table.family, table.name, chain) == ("ip", "filter", "FORWARD"):
        into = "DOCKER-USER" if "DOCKER-USER" in reached else "FORWARD"
        return (
            f"sudo iptables -I {into} -i {bridge} -j ACCEPT "
            f"&& sudo iptables -I {into} -o {bridge} -j ACCEPT"
        )
    where = f"{table.family} {table.name} {chain}"
    return (
        f'sudo nft \'insert rule {where} iifname "{bridge}" accept; '
        f'insert rule {where} oifname "{bridge}" ct state established,related accept\''
    )
