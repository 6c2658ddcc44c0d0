"""`--deep`: a real lease and a real VM, made and removed, with their times.

Both go through the daemon as any command does. The VM belongs to this process: however it ends, the
daemon deletes the VM.
"""

from __future__ import annotations

import secrets
import time
from typing import TYPE_CHECKING

from banger.api import params as p
from banger.api import results as r
from banger.api.doctor import DoctorFacts, DoctorRow
from banger.doctor.check import Finding, failed, passed
from banger.errors import BangerError
from banger.units import MIB

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from banger.doctor.world import DaemonLine, World
    from banger.progress import Reporter

_MEMORY_MIB, _DISK_BYTES = 512, 512 * MIB


def look_deeper(world: World, report: Reporter) -> list[DoctorRow]:
    """The rows of both trials. Starts the daemon where none runs; runs in the calling thread."""
    line = world.line
    assert line is not None
    rows = []
    trials: list[tuple[str, Callable[[World, DaemonLine, Reporter], Iterator[Finding]]]] = [
        ("trial lease", _try_lease),
        ("trial VM", _try_vm),
    ]
    for name, trial in trials:
        try:
            rows += [finding.row(name) for finding in trial(world, line, report)]
        except BangerError as e:
            rows.append(failed(str(e), command=e.hint).row(name))
    return rows


def _try_lease(world: World, line: DaemonLine, report: Reporter) -> Iterator[Finding]:
    report.stage("lease", "making and releasing a lease")
    if line.call("daemon.doctor", p.Doctor(), DoctorFacts).network == "user":
        yield passed("VMs have QEMU's own network here: there is no lease to make")
        return
    tried = line.call("daemon.doctor", p.Doctor(try_lease=True), DoctorFacts).tried
    assert tried is not None
    yield passed(
        f"a lease ({tried.tap}, {tried.address}) was made in {tried.prepare_ms:g} ms and released "
        f"in {tried.release_ms:g} ms"
    )


def _try_vm(world: World, line: DaemonLine, report: Reporter) -> Iterator[Finding]:
    name = f"doctor-{secrets.token_hex(4)}"
    params = p.RunVm(
        create=p.CreateVm(
            name=name,
            image=world.settings.default_image_name,
            vcpu=1,
            memory_mib=_MEMORY_MIB,
            disk_bytes=_DISK_BYTES,
            overlay_bytes=_DISK_BYTES,
        ),
        rm=True,
    )
    stages: list[str] = []

    def heard(event: dict[str, object]) -> None:
        if "stage" in event:
            stages.append(str(event["stage"]))
            report.stage("vm", str(event.get("label", "")), str(event.get("detail", "")))

    began = time.perf_counter()
    with line.stream("vm.run", params, heard) as call:
        result = call.result(r.RunResult)
        call.fd().close()
    ready = time.perf_counter()
    report.stage("vm", "deleting the VM")
    line.call("vm.delete", p.VmRef(vm=result.vm.id), r.Deleted)
    gone = time.perf_counter()
    yield passed(
        f"a VM of {result.vm.image} under {result.vm.vmm} was ready in {ready - began:.2f} s and "
        f"deleted in {gone - ready:.2f} s",
        f"stages: {', '.join(dict.fromkeys(stages))}",
    )
