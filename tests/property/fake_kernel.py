"""A kernel made of dictionaries: links, and the elements of banger's nft sets.

It stands in for `Rtnetlink`, the tap device and the program nft. Before each change, and after it,
it may die (`Killed`), as a helper does that is killed between two system calls.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from ipaddress import IPv4Address
from typing import Any

import pytest

from banger_root import cgroup, conntrack, forward, leases, nft, pool, process, steps, sweep
from banger_root.ledger import Ledger
from banger_root.netlink import Address, Link, NetlinkError, Route
from banger_root.process import ProgramFailed

_ELEMENT = re.compile(r"(create|add|delete) element (\w+) banger (\w+) \{ (.*) \}")


class Killed(BaseException):
    """What no `except` of the helper catches."""


class FakeKernel:
    """`fuse`: how many changes from now the helper is killed; None: it lives."""

    def __init__(self) -> None:
        self.found: dict[int, Link] = {}
        self.held: dict[int, Address] = {}
        self.elements: set[tuple[str, str, tuple[str, ...]]] = set()
        self.layout = False
        self.fuse: int | None = None
        self._next = 1

    @contextmanager
    def change(self) -> Iterator[None]:
        self.burn()
        yield
        self.burn()

    def burn(self) -> None:
        if self.fuse is not None:
            self.fuse -= 1
            if self.fuse < 0:
                self.fuse = None
                raise Killed

    # The part of Rtnetlink that is used.
    def __call__(self) -> FakeKernel:
        return self

    def __enter__(self) -> FakeKernel:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def links(self) -> list[Link]:
        return list(self.found.values())

    def find_link(self, name: str) -> Link | None:
        return next((link for link in self.found.values() if link.name == name), None)

    def addresses(self) -> list[Address]:
        return list(self.held.values())

    def routes(self) -> list[Route]:
        return []

    def add_bridge(self, name: str, mac: str) -> None:
        with self.change():
            self._add(name, "bridge", mac, None)

    def make_tap(self, name: str, *, owner_uid: int) -> None:
        with self.change():
            assert self.find_link(name) is None
            self._add(name, "tun", "02:00:00:00:00:01", owner_uid)

    def _add(self, name: str, kind: str, mac: str, owner: int | None) -> None:
        index, self._next = self._next, self._next + 1
        self.found[index] = Link(
            index=index, name=name, kind=kind, mac=mac, master=0, up=False, carrier=False,
            alias="", owner=owner,
        )  # fmt: skip

    def refuse_ipv6(self, index: int) -> None:
        assert index in self.found

    def add_address(self, index: int, address: IPv4Address, prefix: int) -> None:
        with self.change():
            self.held[index] = Address(index=index, address=address, prefix=prefix)

    def set_up(self, index: int) -> None:
        self.set(index, up=True)

    def set_master(self, index: int, master: int) -> None:
        assert master in self.found
        self.set(index, master=master)

    def set_alias(self, index: int, alias: str) -> None:
        self.set(index, alias=alias)

    def reset_port(self, index: int, *, isolated: bool) -> None:
        assert self.found[index].master in self.found
        with self.change():
            pass

    def set(self, index: int, **fields: Any) -> None:
        with self.change():
            self.found[index] = replace(self.found[index], **fields)

    def delete_link(self, index: int) -> None:
        with self.change():
            if index not in self.found:
                raise NetlinkError(19, "no such device")
            del self.found[index]
            self.held.pop(index, None)
            for other in self.links():
                if other.master == index:
                    self.found[other.index] = replace(other, master=0)

    # The part of nft that is used.
    def run(self, name: str, arguments: list[str], *, stdin: str = "") -> str:
        assert name == "nft"
        if arguments == ["-f", "-"]:
            with self.change():
                self._apply(stdin)
            return ""
        if arguments[:3] == ["-j", "list", "table"]:
            if not self.layout:
                raise ProgramFailed(["nft"], 1, "No such file or directory")
            return self._list(arguments[3])
        if arguments == ["-j", "list", "chains"]:
            return '{"nftables": []}'
        raise ProgramFailed(["nft"], 1, "No such file or directory")

    def _apply(self, text: str) -> None:
        elements, layout = set(self.elements), self.layout
        for line in text.splitlines():
            if match := _ELEMENT.fullmatch(line):
                verb, family, set_name, value = match.groups()
                parts = tuple(p.strip('"') for p in value.split(" . "))
                if set_name == "layout":
                    if verb == "delete" and not layout:
                        raise ProgramFailed(["nft"], 1, "No such file or directory")
                    layout = True
                    continue
                if not layout:
                    raise ProgramFailed(["nft"], 1, "No such file or directory")
                element = (family, set_name, parts)
                if (element in elements) is (verb == "create"):
                    words = "File exists" if verb == "create" else "No such file or directory"
                    raise ProgramFailed(["nft"], 1, words)
                elements ^= {element}
            elif line.startswith("add set inet banger layout "):
                layout = True
            elif line.startswith("delete table"):
                elements, layout = set(), False
        self.elements, self.layout = elements, layout

    def _list(self, family: str) -> str:
        sets: dict[str, list[Any]] = {}
        for where, name, parts in self.elements:
            if where == family:
                value = parts[0] if len(parts) == 1 else {"concat": list(parts)}
                sets.setdefault(name, []).append(value)
        return json.dumps(
            {"nftables": [{"set": {"name": n, "elem": e}} for n, e in sorted(sets.items())]}
        )

    @contextmanager
    def installed(self) -> Iterator[None]:
        """In the place of the real one, for the helper's modules in this process."""

        @contextmanager
        def no_lock() -> Iterator[None]:
            yield

        with pytest.MonkeyPatch.context() as patch:
            for module in (steps, pool, leases, sweep):
                patch.setattr(module, "Rtnetlink", self)
                if hasattr(module, "host_lock"):
                    patch.setattr(module, "host_lock", no_lock)
                if hasattr(module, "make_tap"):
                    patch.setattr(module, "make_tap", self.make_tap)
            patch.setattr(process, "run", self.run)
            patch.setattr(forward, "_enable_forwarding", lambda: None)
            patch.setattr(conntrack, "forget_connections", lambda _: 0)
            patch.setattr(cgroup, "find_mount", lambda: None)
            # No power fails here, and a disk would take most of the time.
            patch.setattr(os, "fsync", lambda _: None)
            real = Ledger._write

            def write(ledger: Ledger, *arguments: Any) -> None:
                with self.change():
                    real(ledger, *arguments)

            patch.setattr(Ledger, "_write", write)
            yield


def banger_elements(kernel: FakeKernel) -> frozenset[nft.Element]:
    return frozenset(nft.Element(family=f, set_name=s, parts=p) for f, s, p in kernel.elements)
