"""What the checks look at: this host, this installation, and its daemon where one runs.

A fact is found out by the first check that asks for it and kept; checks that ask meanwhile wait.
Tests give facts in advance, and a root directory of their own in place of `/`. Nothing here changes
anything. A world lives as long as one run of the checks.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

import msgspec

from banger import process
from banger.api.doctor import DoctorFacts, HelperFacts
from banger.api.params import Doctor
from banger.config.install import InstallRecord, read_install_record
from banger.config.settings import Settings, read_settings
from banger.doctor.helper import ask_helper_directly
from banger.errors import BangerError
from banger.host.vmm_process import is_alive
from banger.kernel.build_tools import BUILD_TOOLS, BuildTool, find_missing_tools
from banger.rpc import client
from banger.store.look import DatabaseLook, look_at_database
from banger.vm.handles import find_handles
from banger.vmm.probe import Verdict, probe

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Mapping

    from banger.api.records import VmRecord
    from banger.config.paths import Paths

T = TypeVar("T")

# The probe of a KVM that hangs takes 20 s, and a sweep waits for a dying VMM.
_DAEMON_S = 90.0
_PROGRAM_S = 20.0


class DaemonLine(Protocol):
    """Calls to the daemon that start one when none runs."""

    def call(self, method: str, params: Any, result: type[T]) -> T: ...

    def stream(
        self, method: str, params: Any, on_event: client.OnEvent
    ) -> client.StreamingCall: ...


class Configuration(msgspec.Struct, frozen=True, kw_only=True):
    """The settings, or the defaults in their place and why they cannot be read."""

    settings: Settings
    message: str | None = None


class DaemonLook(msgspec.Struct, frozen=True, kw_only=True):
    """The daemon: absent, up (with facts), or there without an answer (with the reason)."""

    state: Literal["absent", "up", "mute"]
    facts: DoctorFacts | None = None
    problem: str | None = None
    hint: str | None = None


class Store(msgspec.Struct, frozen=True, kw_only=True):
    """The database: `look` is None where there is none, or where `problem` says why not."""

    look: DatabaseLook | None = None
    problem: str | None = None


def fact(find: Callable[[World], T]) -> Callable[[World], T]:
    """Make a method of `World` a fact: found out once."""
    name = find.__name__

    @functools.wraps(find)
    def get(world: World, /) -> T:
        with world.lock(name):
            if name not in world.known:
                world.known[name] = find(world)
            found: T = world.known[name]
            return found

    return get


class World:
    """One host, one installation. `root` stands for `/` where checks read /proc, /sys and /etc."""

    def __init__(
        self,
        paths: Paths,
        *,
        line: DaemonLine | None = None,
        root: Path = Path("/"),
        known: Mapping[str, Any] | None = None,
    ) -> None:
        self.paths = paths
        self.line = line
        self.root = root
        self.known: dict[str, Any] = dict(known or {})
        self._locks: dict[str, threading.RLock] = {}
        self._guard = threading.Lock()

    def lock(self, name: str) -> threading.RLock:
        with self._guard:
            return self._locks.setdefault(name, threading.RLock())

    # The host

    def file(self, path: str) -> Path:
        """A file of the host by its absolute path."""
        return self.root / path.lstrip("/")

    def read(self, path: str) -> str | None:
        """The text of a file of the host; None where it cannot be read."""
        try:
            return self.file(path).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return None

    def find_program(self, name: str) -> str | None:
        return process.find_program(name)

    def missing_build_tools(self) -> tuple[BuildTool, ...]:
        """What the host lacks for `banger kernel build`."""
        return find_missing_tools(
            BUILD_TOOLS, find=self.find_program, is_there=lambda path: self.file(path).is_file()
        )

    def run(self, *argv: str) -> subprocess.CompletedProcess[bytes] | None:
        """A host program, ended with any status; None where it is missing or does not end."""
        found = self.find_program(argv[0])
        if found is None:
            return None
        try:
            return process.run([found, *argv[1:]], timeout_s=_PROGRAM_S, check=False)
        except BangerError:
            return None

    def ask(self, *argv: str) -> str | None:
        """What a host program says on stdout; None where it failed or is missing."""
        done = self.run(*argv)
        if done is None or done.returncode != 0:
            return None
        return done.stdout.decode(errors="replace")

    @property
    def uid(self) -> int:
        return os.geteuid()

    @fact
    def verdict(self) -> Verdict:
        """What VMM can run here, tried for real: about half a second."""
        return probe(bin_directory=self.paths.bin, firecracker_bin=self.settings.firecracker_bin)

    # The installation

    @property
    def config_files(self) -> tuple[Path, ...]:
        """The configuration files: the host's, then the owner's, which overrides it."""
        return self.paths.config_files

    @fact
    def record(self) -> InstallRecord | None:
        """Whose system installation this is; None in user mode, and where it cannot be read."""
        if self.paths.mode != "system":
            return None
        try:
            return read_install_record(self.paths.system)
        except BangerError:
            return None

    @fact
    def configuration(self) -> Configuration:
        try:
            return Configuration(settings=read_settings(*self.config_files))
        except BangerError as e:
            return Configuration(settings=Settings(), message=str(e))

    @property
    def settings(self) -> Settings:
        return self.configuration().settings

    @fact
    def vm_places(self) -> tuple[Path, ...]:
        """Directories of VMs, listed before the rows and before the daemon is asked.

        A row is there before its directories and goes after them, so one without a row is of no VM.
        """
        found: list[Path] = []
        for parent in (self.paths.vms, self.paths.runtime / "vms"):
            with contextlib.suppress(OSError):
                found += sorted(parent.iterdir())
        return tuple(found)

    @fact
    def store(self) -> Store:
        self.vm_places()
        try:
            return Store(look=look_at_database(self.paths.database))
        except BangerError as e:
            return Store(problem=str(e))

    @property
    def vms(self) -> tuple[VmRecord, ...]:
        """The VMs of the database; none where it cannot be read, which its own check says."""
        look = self.store().look
        return (look.vms or ()) if look is not None else ()

    @property
    def rows_are_known(self) -> bool:
        """Whether `vms` is the truth: only then is something "of no VM"."""
        store = self.store()
        return store.problem is None and (store.look is None or store.look.vms is not None)

    @fact
    def live(self) -> frozenset[str]:
        """The ids of the VMs that run: as the daemon decides, else by row, handles and process."""
        daemon = self.daemon()
        if daemon.facts is not None:
            return frozenset(daemon.facts.live)
        return frozenset(vm.id for vm in self.vms if vm.state == "running" and self._lives(vm.id))

    def _lives(self, vm_id: str) -> bool:
        try:
            handles = find_handles(self.paths.vm(vm_id))
        except BangerError:
            return False
        return handles is not None and handles.process is not None and is_alive(handles.process)

    # The daemon and the helper

    @fact
    def daemon(self) -> DaemonLook:
        """The daemon's facts. None is started."""
        self.vm_places()
        try:
            facts = client.call(
                self.paths.daemon_socket,
                "daemon.doctor",
                Doctor(),
                DoctorFacts,
                timeout_s=_DAEMON_S,
                state=self.paths.state,
            )
        except client.DaemonAbsent:
            return DaemonLook(state="absent")
        except BangerError as e:
            return DaemonLook(state="mute", problem=str(e), hint=e.hint)
        except OSError as e:
            why = f"no answer within {_DAEMON_S:g} s" if isinstance(e, TimeoutError) else str(e)
            return DaemonLook(state="mute", problem=why)
        except msgspec.ValidationError as e:
            return DaemonLook(state="mute", problem=f"its answer is unreadable: {e}")
        return DaemonLook(state="up", facts=facts)

    @fact
    def helper(self) -> HelperFacts:
        """The root helper's facts, by way of the daemon where one runs."""
        facts = self.daemon().facts
        return facts.helper if facts is not None else ask_helper_directly(self.paths)

    @property
    def network(self) -> Literal["bridge", "user"]:
        """How VMs reach the network, as the daemon decides it."""
        return "user" if self.helper().privilege == "none" else "bridge"


def settings_hash(settings: Settings) -> str:
    """What two readings of one configuration share."""
    return hashlib.sha256(msgspec.json.encode(settings, order="sorted")).hexdigest()
