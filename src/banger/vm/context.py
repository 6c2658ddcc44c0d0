"""What every VM operation needs, made once by the daemon and passed down.

Holds the locks (one per VM) and the watchers (one task per running VM, which ends when the VMM
does). Nothing here outlives the daemon; the VMs do.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar
from weakref import WeakValueDictionary

from banger.errors import BangerError
from banger.vm.handles import read_secrets

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine

    from banger.api.doctor import Undecided
    from banger.api.records import VmRecord
    from banger.config.paths import Paths, VmPaths
    from banger.config.settings import Settings
    from banger.guest.announce import Announcements
    from banger.guest.config import GitIdentity
    from banger.host.host import Host
    from banger.store.vms import VmStore
    from banger.vm.handles import Handles
    from banger.vm.plan import Jailing
    from banger.vmm.driver import Driver

from banger.guest.client import GuestClient
from banger.host.vmm_process import wait_exit

log = logging.getLogger(__name__)

T = TypeVar("T")


class NameTable(Protocol):
    """Where the names of running VMs are published."""

    def publish(self, vm: VmRecord) -> None: ...
    def withdraw(self, vm_id: str) -> None: ...


@dataclass(kw_only=True)
class VmContext:
    """The rooms that VM operations use. `driver` decides, once, which VMM serves; `jailing`, how
    its VMMs are jailed (None: they are not)."""

    paths: Paths
    settings: Settings
    store: VmStore
    host: Host
    announcements: Announcements
    driver: Callable[[], Coroutine[Any, Any, Driver]]
    authorized_keys: Callable[[], tuple[str, ...]]
    git_identity: Callable[[], GitIdentity | None]
    network: Literal["bridge", "user"]
    jailing: Callable[[], Coroutine[Any, Any, Jailing | None]]
    names: NameTable
    home: Path = field(default_factory=Path.home)
    """The owner's, where `[[file_sync]]` reads."""
    handles: dict[str, Handles] = field(default_factory=dict)
    undecided: dict[str, Undecided] = field(default_factory=dict)
    """VM id → what reconcile found and may not decide; only the user's own word ends it."""
    admitted: set[str] = field(default_factory=set)
    """VMs whose start was let through, until what they held is given back."""
    some_run: asyncio.Event = field(default_factory=asyncio.Event)
    none_run: asyncio.Event = field(default_factory=asyncio.Event)
    """Whether VMs are watched: what has to look now and then does so only while some are."""
    _locks: WeakValueDictionary[str, asyncio.Lock] = field(default_factory=WeakValueDictionary)
    _watchers: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    _background: set[asyncio.Task[Any]] = field(default_factory=set)

    def vm_paths(self, vm_id: str) -> VmPaths:
        return self.paths.vm(vm_id)

    @contextlib.asynccontextmanager
    async def locked(self, vm_id: str) -> AsyncIterator[None]:
        """The order of operations on one VM. Never held while a guest runs the user's work."""
        lock = self._locks.setdefault(vm_id, asyncio.Lock())
        async with lock:
            yield

    def is_locked(self, vm_id: str) -> bool:
        """Whether an operation on this VM is under way."""
        lock = self._locks.get(vm_id)
        return lock is not None and lock.locked()

    def spawn(self, work: Coroutine[Any, Any, Any], what: str) -> asyncio.Task[Any]:
        """Work that belongs to nobody's request: it goes on when the client has left."""
        task = asyncio.get_running_loop().create_task(work, name=what)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task

    async def finish_alone(self, work: Coroutine[Any, Any, Any], what: str) -> Any:
        """Await work that a client's leaving must not stop half-way."""
        return await asyncio.shield(self.spawn(work, what))

    async def settle(self) -> None:
        """Wait for background work; for the daemon's own end."""
        await asyncio.gather(*self._background, return_exceptions=True)

    @property
    def busy(self) -> int:
        return len(self._background)

    def watch(self, vm_id: str, watcher: Coroutine[Any, Any, None]) -> None:
        self._watchers[vm_id] = asyncio.get_running_loop().create_task(
            watcher, name=f"watch {vm_id[:8]}"
        )
        self.some_run.set()
        self.none_run.clear()

    def unwatch(self, vm_id: str) -> None:
        watcher = self._watchers.pop(vm_id, None)
        if watcher is not None and watcher is not asyncio.current_task():
            watcher.cancel()
        if not self._watchers:
            self.some_run.clear()
            self.none_run.set()

    async def close(self) -> None:
        """Stop watching. Running VMs are not touched."""
        watchers = list(self._watchers.values())
        for watcher in watchers:
            watcher.cancel()
        await asyncio.gather(*watchers, return_exceptions=True)

    async def while_running(self, vm: VmRecord, work: Coroutine[Any, Any, T]) -> T:
        """The result of work that talks to a guest, unless the machine ends first.

        A TCP connection into a machine that is gone would stay silent for minutes.

        Raises:
            BangerError: reason connection_lost; and whatever `work` raises.
        """
        process = self.handles[vm.id].process
        assert process is not None
        task = asyncio.ensure_future(work)
        ended = asyncio.ensure_future(wait_exit(process))
        try:
            racers: list[asyncio.Future[Any]] = [task, ended]
            await asyncio.wait(racers, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
        finally:
            for racer in (task, ended):
                racer.cancel()
            await asyncio.gather(task, ended, return_exceptions=True)
        raise BangerError(
            "operation_failed",
            f"VM {vm.name}: the machine ended",
            hint=f"banger vm logs {vm.name}",
            reason="connection_lost",
            outcome="unknown",
        )

    def client(self, vm: VmRecord) -> GuestClient:
        """The agent of a running VM.

        Raises:
            BangerError: not_running; operation_failed where its processors stand still.
        """
        handles = self.handles.get(vm.id)
        if vm.state == "running" and vm.paused is not None:
            raise BangerError(
                "operation_failed",
                f"VM {vm.name} is paused: {vm.paused}",
                hint="banger vm prune",
                reason="disk_full",
            )
        if vm.state != "running" or handles is None:
            why = f" ({vm.last_error})" if vm.last_error else ""
            raise BangerError(
                "not_running",
                f"VM {vm.name} is {vm.state}{why}",
                hint=f"banger vm start {vm.name}",
            )
        return GuestClient(handles.endpoint, read_secrets(self.vm_paths(vm.id)).token)
