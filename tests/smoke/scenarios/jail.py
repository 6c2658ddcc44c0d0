"""What a VMM can do on the host: nothing but run its own machine."""

from __future__ import annotations

import pwd
from pathlib import Path

from tests.smoke import guests
from tests.smoke.calls import banger, expect, host
from tests.smoke.census import JAILS
from tests.smoke.registry import scenario

# What a jailed VMM may see: its inputs, its sockets, the devices that it needs, itself.
_IN_JAIL = {"kernel", "initrd", "image", "overlay", "work", "modules", "api.sock", "vsock.sock",
            "vsock.sock_7001", "metrics.json", "firecracker", "firecracker.pid",
            "dev", "run", "snapshot"}  # fmt: skip
_READ_ONLY = {"kernel", "initrd", "image", "modules"}


@scenario("pure", "the VMM: owner's uid, chroot, own scope with limits, seccomp, read-only inputs",
          shared_vm=True)  # fmt: skip
def jail() -> None:
    vm = guests.shared()
    record, pid = guests.show(vm), guests.vmm_pid(vm)
    expect(record["vmm"] == "firecracker", f"the VMM is {record['vmm']}")
    _check_identity(pid)
    _check_files(pid, record["id"])
    _check_scope(pid, record)


def _status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _check_identity(pid: int) -> None:
    owner = pwd.getpwnam(banger.user)
    status = _status(pid)
    expect(status["Uid"].split() == [str(owner.pw_uid)] * 4, f"uids are {status['Uid']}")
    expect(status["Gid"].split() == [str(owner.pw_gid)] * 4, f"gids are {status['Gid']}")
    for name in ("CapEff", "CapPrm", "CapInh", "CapAmb"):
        expect(int(status[name], 16) == 0, f"{name} is {status[name]}")
    for task in Path(f"/proc/{pid}/task").iterdir():
        seccomp = [line for line in (task / "status").read_text().splitlines()
                   if line.startswith("Seccomp:")]  # fmt: skip
        expect(seccomp == ["Seccomp:\t2"], f"thread {task.name}: {seccomp}")
    environment = Path(f"/proc/{pid}/environ").read_bytes()
    expect(environment == b"", f"its environment is {environment!r}")
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        target = str(descriptor.readlink())
        expect(not target.startswith("/home"), f"it holds {target} open")


def _check_files(pid: int, vm_id: str) -> None:
    root = Path(f"/proc/{pid}/root")
    (jail_root,) = (JAILS / "firecracker").glob(f"{vm_id}/root")
    expect(root.samefile(jail_root), "its root is not the jail's")
    ours, its = (Path(f"/proc/{number}/ns/mnt").readlink() for number in (1, pid))
    expect(ours != its, "it has the host's mounts")
    names = {path.name for path in root.iterdir()}
    expect(names <= _IN_JAIL, f"it sees {sorted(names - _IN_JAIL)} besides")
    devices = {str(path.relative_to(root / "dev")) for path in (root / "dev").rglob("*")
               if not path.is_dir()}  # fmt: skip
    expect(devices <= {"kvm", "net/tun", "urandom", "userfaultfd"}, f"its devices are {devices}")
    mounts: dict[str, set[str]] = {}
    for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines():
        words = line.split()
        mounts[words[4].rsplit("/", 1)[-1]] = set(words[5].split(","))
    print(f"mounts: {mounts}")
    for name in sorted(_READ_ONLY & names):
        expect("ro" in mounts.get(name, set()), f"{name} is mounted {mounts.get(name)}")


def _check_scope(pid: int, record: dict[str, object]) -> None:
    group = Path(f"/proc/{pid}/cgroup").read_text().strip().removeprefix("0::")
    expect(group.startswith("/banger.slice/"), f"its cgroup is {group}")
    expect(group.endswith(f"/banger-vm-{record['id']}.scope"), f"its cgroup is {group}")
    directory = Path(f"/sys/fs/cgroup{group}")
    members = [int(word) for word in (directory / "cgroup.procs").read_text().split()]
    # KVM puts a kernel thread of the machine's beside it; that one has no address space.
    programs = [member for member in members if Path(f"/proc/{member}/maps").read_text()]
    expect(programs == [pid], f"in its scope are {members}")
    memory = int((directory / "memory.max").read_text())
    wanted = (int(str(record["memory_mib"])) + 256) << 20
    expect(memory == wanted, f"memory.max is {memory}, expected {wanted}")
    quota = (directory / "cpu.max").read_text().split()[0]
    expect(quota != "max", "its processor time is not limited")
    tasks = (directory / "pids.max").read_text().strip()
    expect(tasks == "256", f"pids.max is {tasks}")
    # systemd's own view: a unit of its own, in neither service.
    unit = host("systemctl", "show", "-p", "Slice", "--value", group.rsplit("/", 1)[-1]).strip()
    expect(unit == "banger.slice", f"systemd has it in {unit}")
