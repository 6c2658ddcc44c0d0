"""VMs from create to delete: power, sizes, kill, prune."""

from __future__ import annotations

from tests.smoke import guests
from tests.smoke.calls import banger, expect
from tests.smoke.census import STATE, take_census, vmm_processes
from tests.smoke.registry import scenario


@scenario("pure", "create, stop, start, ssh; data kept; the record says what is")
def vm_lifecycle() -> None:
    with guests.vm("life") as vm:
        record = guests.show(vm)
        expect(record["state"] == "running", f"after create it is {record['state']}")
        expect(record["vmm"] == "firecracker", f"the VMM is {record['vmm']}")
        _check_disk(record["id"])
        banger("vm", "exec", vm, "--", "sh", "-c", "echo kept > /root/data")
        pid = guests.vmm_pid(vm)
        banger("vm", "stop", vm)
        expect(guests.show(vm)["state"] == "stopped", "it is not stopped")
        expect(pid not in vmm_processes(), "the VMM runs on after stop")
        banger("vm", "start", vm)
        after = guests.show(vm)
        expect(after["state"] == "running", f"after start it is {after['state']}")
        expect(after["boot_id"] not in (None, record["boot_id"]), "the boot id is the old one")
        out = banger("vm", "ssh", vm, "--", "cat /root/data; hostname")
        expect(out == f"kept\n{vm}\n", f"ssh gave {out!r}")


def _check_disk(vm_id: str) -> None:
    """What one more VM takes of the host's disk, apart from what its guest has written."""
    files = [path for path in (STATE / "vms" / vm_id).rglob("*") if path.is_file()]
    taken = {path.name: path.stat().st_blocks * 512 for path in files}
    print(f"taken of the disk: {taken}")
    expect(taken["initrd.img"] <= 4096, "its initrd is still there, though the machine has it")
    blank = [path.stat().st_blocks * 512 for path in (STATE / "templates").glob("*.ext4")]
    expect(0 < 2 * max(blank) < 2_000_000, f"the blank disks take {blank}")


@scenario("pure", "a second CPU and a bigger disk are there after restart; shrinking is refused",
          shared_vm=True)  # fmt: skip
def vm_set() -> None:
    vm = guests.shared()
    vcpu = guests.show(vm)["vcpu"]
    blocks = "df --output=size /root | tail -n 1"
    before = int(banger("vm", "exec", vm, "--", "sh", "-c", blocks))
    out = banger("vm", "set", vm, "--vcpu", str(vcpu + 1), "--disk-size", "3G")
    expect("at its next start" in out, f"it does not say when: {out!r}")
    banger("vm", "restart", vm)
    seen = banger("vm", "exec", vm, "--", "sh", "-c", f"nproc; {blocks}").split()
    expect(int(seen[0]) == vcpu + 1, f"the guest has {seen[0]} CPUs")
    expect(int(seen[1]) > before + (512 << 10), f"/root had {before} KiB, and has {seen[1]}")
    banger.refused("vm", "set", vm, "--disk-size", "1G", because="grow")
    expect(guests.show(vm)["work_disk_bytes"] == 3 << 30, "the refused size was noted")


@scenario("pure", "restart gives a new boot id and keeps the disk", shared_vm=True)
def vm_restart() -> None:
    vm = guests.shared()
    before = guests.boot_id(vm)
    banger("vm", "exec", vm, "--", "sh", "-c", "echo written just before > /root/marker")
    banger("vm", "restart", vm)
    out = banger("vm", "exec", vm, "--", "cat", "/root/marker", "/proc/sys/kernel/random/boot_id")
    marker, after = out.splitlines()
    expect(marker == "written just before", f"the marker is {marker!r}")
    expect(after != before, "the boot id is the old one")
    expect(guests.show(vm)["boot_id"] == after, "the record has another boot id")


@scenario("pure", "killed: stopped, and no lease, tap, element, scope or process is left",
          shared_vm=True)  # fmt: skip
def vm_kill() -> None:
    vm = guests.shared()
    record, pid = guests.show(vm), guests.vmm_pid(vm)
    banger("vm", "kill", vm)
    expect(guests.show(vm)["state"] == "stopped", "it is not stopped")
    expect(pid not in vmm_processes(), "the VMM runs on")
    kept = ("row ", "known host ", f"directory /var/lib/banger/vms/{record['id']}")
    held = [
        line
        for line in take_census()
        if (record["id"] in line or record["address"] in line or record["mac"] in line)
        and not line.startswith(kept)
    ]
    expect(not held, f"a killed VM holds {held}")


@scenario("global", "removes what does not run, keeps what does")
def vm_prune() -> None:
    with guests.vm("stays") as running:
        guests.create("goes", "--no-start")
        banger("vm", "prune", "-f")
        expect(banger.vm_names() == [running], "prune took the wrong ones")
        expect(guests.show(running)["state"] == "running", "prune stopped a running VM")
        banger("vm", "exec", running, "--", "true")
