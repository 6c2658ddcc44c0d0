"""What is refused: nothing may be left of it, and the message says what to do."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from tests.smoke import guests
from tests.smoke.calls import banger, expect, host
from tests.smoke.registry import scenario

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def _no_new_vm() -> Iterator[None]:
    before = banger.vm_names()
    yield
    expect(banger.vm_names() == before, "a refused call left a VM")


@scenario("pure", "`--vcpu 0`, no memory, a disk that is too big: refused, no row left")
def invalid_spec() -> None:
    with _no_new_vm():
        for option in (("--vcpu", "0"), ("--vcpu", "-1"), ("--memory", "0"), ("--disk-size", "1P")):
            done = banger.done("vm", "create", *option)
            expect(done.status in (1, 2), f"{option}: status {done.status}")
            expect("banger: " in done.err or "Error" in done.err, f"{option}: {done.err!r}")
        banger.refused("vm", "run", "--branch", "x", "--", "true", status=2)


@scenario("pure", "bad names are refused with the reason, no row left")
def invalid_name() -> None:
    with _no_new_vm():
        for name in ("UPPER", "-edge", "edge-", "dot.ted", "x" * 64, "localhost", "ns"):
            done = banger.done("vm", "create", "--no-start", f"--name={name}")
            expect(done.status in (1, 2), f"{name!r}: status {done.status}")
            expect("name" in done.err, f"{name!r}: the message is {done.err!r}")


@scenario("pure", "more memory than the budget: refused with the figures; the override works")
def admission() -> None:
    total_kib = int(host("grep", "^MemTotal:", "/proc/meminfo").split()[1])
    memory = f"{total_kib // 1024 * 9 // 10}M"
    with _no_new_vm():
        call = ("vm", "create", "--name", "big", "--memory", memory)
        text = banger.refused(*call, because="banger may use")
        # Which hint is the best depends on what else runs.
        expect("hint: banger vm stop" in text or "--allow-overcommit" in text, f"no hint: {text!r}")
    with guests.vm("big", "--memory", memory, "--allow-overcommit") as vm:
        banger("vm", "exec", vm, "--", "true")


@scenario("global", "a bridge that would overlap another network is refused, a free one named")
def subnet_overlap() -> None:
    # Made again by the next start; it has no VM now.
    host("ip", "link", "delete", "br-fc", status=None)
    host("ip", "link", "add", "vpn0", "type", "dummy")
    try:
        host("ip", "address", "add", "172.16.0.200/25", "dev", "vpn0")
        host("ip", "link", "set", "vpn0", "up")
        with _no_new_vm():
            text = banger.refused("vm", "create", "--name", "lost", because="overlap")
        expect("vpn0" in text, f"the message does not name the interface: {text!r}")
        expect("bridge_ip" in text, f"the hint does not say what to set: {text!r}")
    finally:
        host("ip", "link", "delete", "vpn0")
    with guests.vm("found", "--no-start") as vm:
        banger("vm", "start", vm)
