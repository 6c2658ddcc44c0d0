"""The helper's own look at a VMM that it launched: never another process, also after a reboot."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from banger_root import vmm
from banger_root.errors import HelperError
from banger_root.ledger import Entry, Ledger
from banger_root.validate import parse_prepare

VM_ID = "0123456789abcdef0123456789abcdef"
OTHER_BOOT = "0b0d3b5e-5d3a-4a5c-8f2e-000000000000"


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    ledger = Ledger(str(tmp_path / "leases"))
    yield ledger
    ledger.close()


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "1000"]) as process:
        yield process
        process.kill()


@pytest.fixture
def entry(sleeper: subprocess.Popen[bytes]) -> Entry:
    """A lease in which `sleeper` was launched."""
    plan = parse_prepare({
        "vm_id": VM_ID,
        "bridge": {"name": "br-fc-u", "address": "172.31.0.1", "prefix": 24},
        "guest": {"address": "172.31.0.2", "mac": "06:00:ac:1f:00:02"},
        "isolate": True,
        "announce_port": 7001,
        "nat": False,
        "guest_host_ports": [],
        "limits": {"vcpu": 1, "memory_mib": 128},
        "jail": True,
    })  # fmt: skip
    started = vmm.read_start_time(sleeper.pid)
    assert started is not None
    return Entry(
        plan=plan, tap=plan.own_tap, owner_uid=1000, state="ready", held=(), created_at=1.0,
        pid=sleeper.pid, start_time=started, boot_id=vmm.read_boot_id(),
    )  # fmt: skip


def rewrite(ledger: Ledger, *without: str, **changes: Any) -> None:
    """The entry's file as another version would have written it."""
    path = Path(ledger.directory, f"{VM_ID}.json")
    document = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in document.items() if k not in without}))


def test_vmm_is_found_again_by_what_the_ledger_kept(
    ledger: Ledger, entry: Entry, sleeper: subprocess.Popen[bytes]
) -> None:
    ledger.save(entry)
    found = ledger.find(VM_ID)
    assert found == entry
    assert vmm.is_running(entry)
    vmm.kill(entry)
    assert sleeper.wait() == -9


def test_process_that_got_pid_and_start_time_in_another_boot_is_left_alone(
    ledger: Ledger, entry: Entry, sleeper: subprocess.Popen[bytes]
) -> None:
    ledger.save(replace(entry, boot_id=OTHER_BOOT))
    found = ledger.find(VM_ID)
    assert found is not None and not vmm.is_running(found)
    with pytest.raises(HelperError, match="does not run"):
        vmm.send_signal(found, "KILL")
    vmm.kill(found)
    assert sleeper.poll() is None


def test_lease_of_a_helper_that_noted_no_boot_is_judged_by_pid_and_start_time(
    ledger: Ledger, entry: Entry, sleeper: subprocess.Popen[bytes]
) -> None:
    ledger.save(entry)
    rewrite(ledger, "boot_id", schema=2)
    found = ledger.find(VM_ID)
    assert found is not None and found == replace(entry, boot_id=None)
    vmm.kill(found)
    assert sleeper.wait() == -9


@pytest.mark.parametrize("boot_id", [7, ["x"], ""])
def test_boot_that_the_helper_never_writes_is_refused(
    ledger: Ledger, entry: Entry, boot_id: object
) -> None:
    ledger.save(entry)
    rewrite(ledger, boot_id=boot_id)
    with pytest.raises(HelperError, match="never writes"):
        ledger.find(VM_ID)
