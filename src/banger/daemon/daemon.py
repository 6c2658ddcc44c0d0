"""One daemon: its rooms, made once, and the order in which they come up and go down.

It may be killed at any moment: VMs run on, and the next daemon adopts them. While no VM runs it
does nothing: no timer ticks, everything waits for a socket or a process.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from weakref import WeakValueDictionary

import msgspec

from banger import __version__
from banger.api.results import VmmVerdict
from banger.config.settings import Settings, read_settings
from banger.daemon import runs
from banger.daemon.image_builds import remove_abandoned_bases
from banger.daemon.leftovers import remove_shadowed, sweep_leftovers
from banger.daemon.names import Names
from banger.daemon.sweeps import Sweeps
from banger.errors import BangerError
from banger.files import ensure_private_directory
from banger.guest.announce import Announcements
from banger.guest.config import GitIdentity
from banger.host.host import Host
from banger.host.lease import Bridge
from banger.host.vmm_process import ProcessRef, is_alive
from banger.process import find_program, run_async
from banger.ssh.keys import ensure_owner_key
from banger.store.database import open_database
from banger.store.vms import VmStore
from banger.vm.context import VmContext
from banger.vm.handles import find_handles
from banger.vm.plan import Jailing
from banger.vm.reconcile import reconcile
from banger.vmm.probe import Verdict, choose_driver, probe
from banger.vmm.programs import find_jailer

if TYPE_CHECKING:
    from collections.abc import Callable

    from banger.config.paths import Paths
    from banger.daemon.turns import Turns
    from banger.rpc.server import Server
    from banger.vmm.driver import Driver

log = logging.getLogger(__name__)

# Started when they are needed: more than there can be VMs (250) with one piece of work each.
_MOST_THREADS = 512


class Daemon:
    """Everything that lives as long as the process."""

    def __init__(self, paths: Paths, host: Host, settings: Settings) -> None:
        self.paths = paths
        self.started = time.monotonic()
        ensure_private_directory(paths.state)
        ensure_private_directory(paths.runtime)
        ensure_private_directory(paths.vms)
        self.store = VmStore(open_database(paths.database))
        self.settings = keep_bridge_in_use(settings, self.store, paths)
        self.stopping = asyncio.Event()
        self.host = host
        self.names = Names(self.settings, host)
        self.vms = VmContext(
            paths=paths,
            settings=self.settings,
            store=self.store,
            host=self.host,
            announcements=Announcements(),
            driver=self.driver,
            authorized_keys=lambda: (ensure_owner_key(self.ssh_key),),
            git_identity=lambda: self._git_identity,
            network=self.network,
            jailing=self.jailing,
            names=self.names,
        )
        self.sweeps = Sweeps(
            self.vms,
            helper_log=paths.helper_log if paths.mode == "user" else None,
            kept=paths.clocks,
        )
        self._git_identity: GitIdentity | None = None
        self._verdict: Verdict | None = None
        self._driver: Driver | None = None
        self._probing = asyncio.Lock()
        self._guards: set[asyncio.Task[None]] = set()
        self.server: Server | None = None
        self.workspace_locks: WeakValueDictionary[str, Turns] = WeakValueDictionary()
        """VM id → the order of work on its workspaces (spec 3.8); never with the VM's own lock."""

        self.image_locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        """Image name → the order of builds of it that take a machine."""

    @classmethod
    async def open(cls, paths: Paths) -> Daemon:
        """A daemon of these paths; finds out what the host lets it do."""
        settings = read_settings(*paths.config_files)
        if paths.mode == "system":
            host = Host.open_service(
                paths.system.helper_socket,
                jail_base=Path(settings.jailer_chroot_base or paths.system.jails),
                pool_size=settings.tap_pool_size,
            )
        else:
            host = await Host.open(ledger=paths.leases, log=paths.helper_log)
        return cls(paths, host, settings)

    @property
    def ssh_key(self) -> Path:
        configured = self.settings.ssh_key_path
        return Path(configured).expanduser() if configured else self.paths.ssh_key

    async def verdict(self) -> Verdict:
        """What this host's KVM can do, found out once by running a vCPU."""
        async with self._probing:
            if self._verdict is None:
                self._verdict = await asyncio.to_thread(
                    probe,
                    bin_directory=self.paths.bin,
                    firecracker_bin=self.settings.firecracker_bin,
                )
            return self._verdict

    async def driver(self) -> Driver:
        """The VMM that serves here, chosen once.

        Raises:
            BangerError: none is usable; the hint says what to install.
        """
        verdict = await self.verdict()
        if self._driver is None:
            self._driver = choose_driver(self.settings.vmm, verdict, network=self.network)
        return self._driver

    async def jailing(self) -> Jailing | None:
        """How Firecracker is jailed: by the installed helper, unless the configuration says no.

        Raises:
            BangerError: unsupported: there is no jailer.
        """
        if self.host.jail_base is None or not self.settings.jailer_enabled:
            return None
        program = (await self.verdict()).firecracker
        assert program is not None  # the driver was chosen by it
        jailer = find_jailer(self.settings.jailer_bin, program.path, self.paths.bin)
        return Jailing(base=self.host.jail_base, firecracker_bin=program.path, jailer_bin=jailer)

    @property
    def network(self) -> Literal["bridge", "user"]:
        """VMs get a tap on the bridge where somebody may make one, else QEMU's own network."""
        return "user" if self.host.privilege.kind == "none" else "bridge"

    def guard(self, vm_id: str, owner: ProcessRef) -> None:
        """Delete an ephemeral VM when the command that it belongs to has ended."""
        task = asyncio.get_running_loop().create_task(runs.delete_with_owner(self, vm_id, owner))
        self._guards.add(task)
        task.add_done_callback(self._guards.discard)

    async def vmm_verdict(self) -> VmmVerdict:
        verdict = await self.verdict()
        try:
            driver: str | None = (await self.driver()).name
            problem, hint = None, None
        except BangerError as e:
            driver, problem, hint = None, str(e), e.hint
        return VmmVerdict(
            driver=driver,
            accel=verdict.accel,
            kvm_usable=verdict.kvm_usable,
            evidence=verdict.evidence,
            problem=problem or "; ".join(x.message for x in verdict.problems) or None,
            hint=hint or next((x.hint for x in verdict.problems if x.hint), None),
        )

    async def _read_git_identity(self) -> None:
        git = find_program("git")
        if git is None:
            return
        values = []
        for key in ("user.name", "user.email"):
            done = await run_async([git, "config", "--global", "--get", key], check=False)
            values.append(done.stdout.decode(errors="replace").strip())
        if all(values):
            self._git_identity = GitIdentity(name=values[0], email=values[1])

    def _tidy_images(self) -> None:
        """Remove what killed builds and replacements left. One image that is damaged, or written
        by a newer banger, is no reason not to start: every VM would be out of reach."""
        used = {vm.image_id for vm in self.store.list()}
        try:
            remove_abandoned_bases(self)
            remove_shadowed(self.paths, used)
        except (BangerError, OSError) as e:
            log.warning("clearing up images: %s", e)

    async def _sweep(self) -> None:
        if self.host.privilege.kind != "service":
            return
        bridge = Bridge(
            name=self.settings.bridge_name,
            address=self.settings.bridge_ip,
            prefix=self.settings.cidr,
        )
        try:
            await self.host.sweep(bridge)
        except BangerError as e:
            log.warning("sweeping: %s", e)

    async def run(self, server: Server, tell_ready: Callable[[], None]) -> None:
        """Reconcile, serve until asked to stop, and leave every running VM alone."""
        self.server = server
        # One that waits for a guest or a mirror holds a thread; the default of a few would make
        # everybody else wait for it, too.
        asyncio.get_running_loop().set_default_executor(
            ThreadPoolExecutor(max_workers=_MOST_THREADS, thread_name_prefix="work")
        )
        await self.names.open()
        await asyncio.to_thread(sweep_leftovers, self.paths)
        await reconcile(self.vms)
        self._tidy_images()
        await self._sweep()
        for vm in self.store.list():
            if vm.ephemeral and vm.owner is not None:
                self.guard(vm.id, runs.process_of(vm.owner))
        await self._read_git_identity()
        server.listen()
        tell_ready()
        log.info("bangerd %s listens at %s (pid %d)", __version__, server.path, os.getpid())
        serving = asyncio.create_task(server.serve())
        sweeping = asyncio.create_task(self.sweeps.run())
        await self.stopping.wait()
        for task in (serving, sweeping):
            task.cancel()
        await asyncio.gather(serving, sweeping, return_exceptions=True)
        await server.close()
        for guard in list(self._guards):
            guard.cancel()  # the owner's own delete, or the next daemon, takes care of its VM
        await asyncio.gather(*self._guards, return_exceptions=True)
        await self.vms.settle()
        await self.vms.close()
        await self.vms.announcements.close()
        await self.names.close()
        await self.host.aclose()
        self.store.close()
        log.info("bangerd ends")


def keep_bridge_in_use(settings: Settings, store: VmStore, paths: Paths) -> Settings:
    """The settings, with the bridge that running VMs are on instead of another one.

    A changed bridge waits until no VM runs; stopped VMs get addresses of it at their next start
    (spec 6.2).
    """
    wanted = Bridge(name=settings.bridge_name, address=settings.bridge_ip, prefix=settings.cidr)
    for vm in store.list():
        if vm.state != "running" or vm.network != "bridge":
            continue
        try:
            handles = find_handles(paths.vm(vm.id))
        except BangerError:
            continue  # damaged: reconcile decides
        if handles is None or handles.lease is None or handles.process is None:
            continue
        used = handles.lease.bridge
        if used != wanted and is_alive(handles.process):
            log.warning(
                "the bridge %s %s/%d of the configuration waits: VM %s runs on %s %s/%d",
                wanted.name, wanted.address, wanted.prefix,
                vm.name, used.name, used.address, used.prefix,
            )  # fmt: skip
            return msgspec.structs.replace(
                settings, bridge_name=used.name, bridge_ip=used.address, cidr=used.prefix
            )
    return settings
