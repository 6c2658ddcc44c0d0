"""An installation on fakes: real store, files, processes and announcements; no kernel, no VMM.

`World.ctx` is the daemon of the moment; `crash` replaces it as `kill -9` and a new start would.
Everything else outlives it. `census` is what a test compares before and after.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

from banger import process
from banger.api.params import CreateVm
from banger.api.records import ImageRecord, VmRecord
from banger.config.paths import Paths
from banger.config.settings import Settings
from banger.disk.blank import ensure_template
from banger.disk.identity import identify
from banger.files import ensure_private_directory, link_or_copy, sha256_file
from banger.guest.announce import Announcements
from banger.host.lease import LaunchPlan
from banger.host.privilege import Privilege
from banger.host.vmm_process import ProcessRef, is_alive, launch_vmm
from banger.image import entries as images
from banger.kernel import entries as kernels
from banger.kernel import pull
from banger.kernel.base_initrd import build_module_members, write_base_initrd
from banger.process import spawn_detached
from banger.progress import Silent
from banger.store.database import open_database
from banger.store.vms import VmStore
from banger.units import MIB
from banger.vm.context import VmContext
from banger.vm.create import create
from banger.vm.handles import Handles, find_handles
from banger.vm.plan import Jailing
from banger.vm.reconcile import reconcile
from banger.vm.start import start
from banger.vmm.driver import Driver
from banger.vmm.machine import Drive, Machine
from fakes.driver import FakeDriver
from fakes.faults import Faults
from fakes.host import NOBODY, ROOT, FakeHost
from fakes.transitions import watch_rows

DISK = 64 * MIB
IMAGE_ID = "1" * 32
# A container may give little of it, for all tests that run beside each other.
_ENOUGH_MEMORY = 1 << 30


def _find_memory() -> Path | None:
    """Where files are in memory, if that is to be had: what is synced for the power's sake costs
    nothing there."""
    if not os.access("/dev/shm", os.W_OK):
        return None
    room = os.statvfs("/dev/shm")
    return Path("/dev/shm") if room.f_bavail * room.f_frsize >= _ENOUGH_MEMORY else None


MEMORY = _find_memory()
KERNEL = "fake-kernel"
EMPTY: dict[str, list[str]] = {
    "leases": [], "processes": [], "sockets": [], "directories": [], "rows": [], "known_hosts": [],
    "handles": [], "names": [],
}  # fmt: skip


def processes_below(directory: Path) -> list[int]:
    """The processes whose working directory lies below `directory`; zombies have none."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                where = os.readlink(f"/proc/{name}/cwd").removesuffix(" (deleted)")
            except OSError:
                continue
            if f"{where}/".startswith(f"{directory}/"):
                found.append(int(name))
    return found


class FakeNames:
    """What the name server would answer: VM id → name."""

    def __init__(self) -> None:
        self.published: dict[str, str] = {}

    def publish(self, vm: VmRecord) -> None:
        self.published[vm.id] = vm.name

    def withdraw(self, vm_id: str) -> None:
        self.published.pop(vm_id, None)


class World:
    """Everything that a VM needs and leaves. Make it inside a running event loop."""

    def __init__(
        self,
        *,
        network: Literal["bridge", "user"] = "bridge",
        jailed: bool = False,
        templates: Path | None = None,
        root: Path | None = None,
        **settings: Any,
    ) -> None:
        # Short, as sun_path is; of its own, as tests run beside each other.
        self.root = Path(tempfile.mkdtemp(prefix="bw", dir=root or MEMORY))
        self.paths = Paths(
            state=self.root / "state",
            cache=self.root / "cache",
            runtime=self.root / "run",
            config_file=self.root / "config.toml",
        )
        for path in (self.paths.state, self.paths.runtime, self.paths.vms):
            ensure_private_directory(path)
        defaults: dict[str, Any] = {
            "disk_reserve": "1M", "memory_budget_percent": 95, "ready_timeout": "30s",
            "stop_timeout": "30s",
        }  # fmt: skip
        self.settings = Settings(**{**defaults, **settings})
        self.network = network
        self.faults = Faults()
        privilege: Privilege = ROOT if network == "bridge" else NOBODY
        programs = {"firecracker_bin": Path("/bin/sh"), "jailer_bin": Path("/bin/sh")}
        self.jailing = Jailing(base=self.root / "jail", **programs) if jailed else None
        self.names = FakeNames()
        self.host = FakeHost(
            self.root / "cgroups",
            self.faults,
            privilege,
            launcher=self._launch,
            jail_base=self.jailing.base if self.jailing else None,
        )
        self.driver = FakeDriver(self.faults, user_network=network == "user")
        self.store = VmStore(open_database(self.paths.database))
        self._patch = pytest.MonkeyPatch()
        self.transitions = watch_rows(self._patch)
        self._children: list[int] = []
        self._patch.setattr(process, "spawn_detached", self._spawn)
        if templates is not None:
            self.paths.templates.mkdir(mode=0o700)
            for template in templates.iterdir():
                link_or_copy(template, self.paths.templates / template.name)
        self.image = self._make_image()
        self.ctx = self.new_context()
        self._old: list[VmContext] = []
        self._left: set[asyncio.Task[Any]] = set()

    def _spawn(self, *args: Any, **options: Any) -> int:
        self._children.append(spawn_detached(*args, **options))
        return self._children[-1]

    def _make_image(self) -> ImageRecord:
        agent = self.root / "agent"
        agent.write_bytes(b"agent")
        self._patch.setattr(pull, "agent_binary", lambda arch: agent)
        directory = self.paths.kernels / KERNEL
        directory.mkdir(parents=True)
        write_base_initrd(
            directory / kernels.INITRD, agent=agent, modules=build_module_members({"a.ko": b"A"})
        )
        for name in (kernels.VMLINUX, kernels.MODULES):
            (directory / name).write_bytes(name.encode())
        kernels.write_manifest(
            directory,
            kernels.KernelManifest(
                name=KERNEL, distro="debian", arch="amd64", kernel_version="6", release="6",
                source="test", agent_version=sha256_file(agent), imported_at="",
                files={p.name: identify(p) for p in directory.iterdir()},
            ),
        )  # fmt: skip
        directory = self.paths.images / IMAGE_ID
        directory.mkdir(parents=True)
        rootfs = directory / images.ROOTFS
        rootfs.write_bytes(b"rootfs")
        known = identify(rootfs)
        images.write_manifest(
            directory,
            images.ImageManifest(
                name="debian", distro="debian", arch="amd64", kernel_ref=KERNEL,
                rootfs_file=rootfs.name, rootfs_sha256=known.sha256,
                rootfs_bytes=known.size_bytes, rootfs_mtime_ns=known.mtime_ns,
            ),
        )  # fmt: skip
        return images.get_image(self.paths, "debian")

    @property
    def rootfs(self) -> Path:
        return Path(self.image.rootfs_path)

    def new_context(self) -> VmContext:
        async def driver() -> Driver:
            return self.driver

        return VmContext(
            paths=self.paths,
            settings=self.settings,
            store=self.store,
            host=self.host,  # type: ignore[arg-type]  # answers as Host does
            announcements=Announcements(),
            driver=driver,
            authorized_keys=lambda: ("ssh-ed25519 AAAA banger",),
            git_identity=lambda: None,
            network=self.network,
            jailing=self._jailing,
            names=self.names,
        )

    async def _jailing(self) -> Jailing | None:
        return self.jailing

    async def _launch(self, plan: LaunchPlan) -> ProcessRef:
        """As the helper does: the VMM in its jail, which is the owner's from then on."""
        assert self.jailing is not None
        root = self.jailing.root(plan.id)
        root.mkdir(parents=True)
        machine = Machine(
            vm_id=plan.id,
            vcpu=1,
            memory_mib=128,
            kernel=Path(plan.kernel),
            initrd=Path(plan.initrd),
            drives=tuple(
                Drive(role=d.role, path=Path(d.path), read_only=d.role in ("image", "modules"))
                for d in plan.drives
            ),
            nic=None,
            vsock_cid=None,
            runtime=root,
        )
        argv = self.driver.build_launch(machine).argv
        return await launch_vmm(argv, cwd=root, console=Path(plan.console), cgroup=None)

    async def crash(self) -> None:
        """The daemon is killed and the next one starts: what it knew in memory is gone.

        An operation that hangs in a fake goes on hanging, so that nothing of it is ever undone.
        """
        await self.ctx.close()
        self._old.append(self.ctx)
        # What it published, and who listens for guests, was in its memory.
        self.names = FakeNames()
        self.ctx = self.new_context()
        await reconcile(self.ctx)

    def leave(self, work: Any) -> asyncio.Task[Any]:
        """Begin an operation that will hang; it is cancelled when the world ends."""
        task: asyncio.Task[Any] = asyncio.get_running_loop().create_task(work)
        self._left.add(task)
        return task

    def params(self, name: str | None = None, **changes: Any) -> CreateVm:
        sizes: dict[str, Any] = {
            "vcpu": 1, "memory_mib": 128, "disk_bytes": DISK, "overlay_bytes": DISK,
        }  # fmt: skip
        return CreateVm(name=name, image="debian", **{**sizes, **changes})

    async def create(self, name: str | None = "web", **changes: Any) -> VmRecord:
        return await create(self.ctx, self.params(name, **changes), self.image, Silent())

    async def start(self, vm: VmRecord) -> VmRecord:
        async with self.ctx.locked(vm.id):
            return await start(self.ctx, vm, Silent(), allow_overcommit=False)

    def lose_row(self, vm: VmRecord) -> None:
        """As an older copy of the database would: nobody took the way of a delete."""
        self.store._db.execute("DELETE FROM vms WHERE id = ?", (vm.id,))

    def handles(self, vm: VmRecord) -> Handles:
        handles = find_handles(self.paths.vm(vm.id))
        assert handles is not None
        return handles

    def alive(self, vm: VmRecord) -> bool:
        process = self.handles(vm).process
        return process is not None and is_alive(process)

    def census(self) -> dict[str, list[str]]:
        """All that VMs have on the host, by VM id where there is one."""
        runtime = self.paths.runtime / "vms"
        known = self.paths.known_hosts
        return {
            "leases": sorted(self.host.leases),
            "processes": [
                str(pid) for pid in processes_below(runtime) + processes_below(self.root / "jail")
            ],
            "sockets": sorted(p.name for p in runtime.glob("*")),
            "directories": sorted(p.name for p in self.paths.vms.iterdir()),
            "rows": sorted(vm.name for vm in self.store.list()),
            "known_hosts": known.read_text().splitlines() if known.exists() else [],
            "handles": sorted(p.parent.name for p in self.paths.vms.glob("*/handles.json")),
            "names": sorted(self.names.published.values()),
        }

    async def close(self) -> None:
        self.faults.clear()
        for task in self._left:
            task.cancel()
        await asyncio.gather(*self._left, return_exceptions=True)
        for ctx in (*self._old, self.ctx):
            await ctx.settle()
            await ctx.close()
            await ctx.announcements.close()
        await self.driver.close()
        for pid in processes_below(self.root):
            with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
                os.kill(pid, 9)
        for pid in self._children:
            # Most were reaped by those who waited for them.
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)
        self.store.close()
        self._patch.undo()
        shutil.rmtree(self.root)


def make_templates(directory: Path) -> Path:
    """Blank disks that many worlds can copy, made by mke2fs once."""
    paths = Paths(state=directory, cache=directory, runtime=directory, config_file=directory)
    ensure_template(paths, "overlay", DISK)
    ensure_template(paths, "work", DISK)
    return paths.templates


def temporary_templates() -> Iterator[Path]:
    """For a session: `make_templates` in a directory of its own."""
    with tempfile.TemporaryDirectory(prefix="bt", dir=MEMORY) as directory:
        yield make_templates(Path(directory))
