"""What must hold of the helper's gate for any line at all: shared by tests and by the fuzzer.

`tools/fuzz_root.py` grows `root_lines.corpus`, one request a line; tests replay it.
"""

from __future__ import annotations

import os
import posixpath
from pathlib import Path

from banger_root import paths, validate
from banger_root.errors import HelperError

CORPUS = Path(__file__).with_name("root_lines.corpus")


def read_corpus() -> list[bytes]:
    """The stored lines: right ones, wrong ones, and those that reached new code."""
    return CORPUS.read_bytes().split(b"\n")[:-1]


def judge(line: bytes) -> str:
    """Put a line through decoder and validators; `refused`, or the method that it asks for.

    Raises:
        AssertionError: something passed that must not.
        Exception: anything but a typed refusal is a defect.
    """
    try:
        return _judge(line)
    except HelperError as e:
        assert e.code in ("bad_request", "bad_version", "unknown_method")
        # It goes into an answer and a log line, each one line long.
        assert "\n" not in str(e)
        assert len(str(e)) < 1000
        return "refused"


def _judge(line: bytes) -> str:
    request = validate.parse_request(line)
    assert request.method in validate.METHODS
    if request.method == "prepare":
        _check_lease(validate.parse_prepare(request.params))
    elif request.method == "launch":
        _check_launch(validate.parse_launch(request.params))
    elif request.method == "signal":
        wanted = validate.parse_signal(request.params)
        assert wanted.name in validate.SIGNALS
        _check_id(wanted.lease_id)
    elif request.method == "release":
        _check_id(validate.parse_release(request.params))
    elif request.method == "sweep":
        pool = validate.parse_sweep(request.params)
        if pool is not None:
            assert 0 <= pool.size <= validate.POOL_LIMIT
            _check_link(pool.bridge.name)
    elif request.method == "resolver":
        resolver = validate.parse_resolver(request.params)
        _check_link(resolver.link)
        assert not set(resolver.server) - set("0123456789.:")
        for domain in resolver.domains:
            assert domain == "~vm" or domain.endswith(".in-addr.arpa")
            assert not set(domain) & set(" \n/;\"'")
    else:
        validate.parse_nothing(request.params)
        assert request.params == {}
    return request.method


def _check_lease(plan: validate.LeasePlan) -> None:
    _check_id(plan.vm_id)
    _check_link(plan.bridge.name)
    assert len(plan.own_tap) <= 15
    assert plan.address in plan.bridge.subnet
    assert plan.address != plan.bridge.address
    assert not plan.bridge.subnet.is_loopback
    assert len(plan.guest_host_ports) <= validate.PORTS_LIMIT
    assert all(0 < port < 65536 for port in (*plan.host_ports, plan.announce_port))
    assert 1 <= plan.vcpu <= validate.VCPU_LIMIT
    assert plan.memory_mib >= validate.MEMORY_MIN_MIB
    # The ledger keeps it, and reads it back through the same gate.
    assert validate.parse_prepare(validate.format_plan(plan)) == plan


def _check_launch(plan: validate.LaunchPlan) -> None:
    _check_id(plan.lease_id)
    assert len(plan.drives) == len(validate.ROLES)
    for path in (
        plan.firecracker_bin,
        plan.jailer_bin,
        plan.kernel,
        plan.initrd,
        plan.console,
        *plan.drives,
    ):
        assert len(os.fsencode(path)) <= validate.PATH_LIMIT
        assert path.startswith("/")
        assert posixpath.normpath(path) == path
        assert not set(path) & {"\0", "\n"}
        assert "/" + "/".join(paths.split_path(path)) == path
        assert not paths.is_beneath(path, path)


def _check_id(vm_id: str) -> None:
    assert len(vm_id) == 32
    assert set(vm_id) <= set("0123456789abcdef")


def _check_link(name: str) -> None:
    assert name.startswith("br-fc")
    assert len(name) <= 15
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
