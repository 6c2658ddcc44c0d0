"""The daemon as the command line sees it: started when absent, replaced when of another version.

Two first commands start one daemon: the second waits for the lock, then finds the first's. The
daemon of a system installation is systemd's: it is never started, replaced or ended from here.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from banger.api.params import Empty
from banger.api.results import Pong
from banger.config.program import module_command
from banger.config.system_paths import SYSTEM
from banger.config.target import choose_paths
from banger.errors import BangerError
from banger.files import ensure_private_directory
from banger.rpc import client

if TYPE_CHECKING:
    from collections.abc import Callable

    from banger.config.paths import Paths
    from banger.config.system_paths import SystemPaths

T = TypeVar("T")

_START_S = 60.0


class Server:
    """Calls to this user's daemon. Makes the connection per call; holds nothing."""

    def __init__(self, system: SystemPaths = SYSTEM) -> None:
        self._system = system

    @cached_property
    def paths(self) -> Paths:
        """The installation that is meant (spec 1.1). Raises BangerError as `choose_paths`."""
        return choose_paths(self._system)

    @property
    def socket(self) -> Path:
        return self.paths.daemon_socket

    def call(self, method: str, params: Any, result: type[T]) -> T:
        """One call; the daemon is started first when it does not run. Raises BangerError."""
        return self._with_daemon(
            lambda: client.call(self.socket, method, params, result, state=self.paths.state)
        )

    def call_with_fd(self, method: str, params: Any, result: type[T]) -> tuple[T, Any]:
        return self._with_daemon(
            lambda: client.call_with_fd(self.socket, method, params, result, state=self.paths.state)
        )

    def stream(self, method: str, params: Any, on_event: client.OnEvent) -> client.StreamingCall:
        return self._with_daemon(
            lambda: BuildingCall(self.socket, method, params, on_event, state=self.paths.state)
        )

    def find(self, method: str, params: Any, result: type[T], *, timeout_s: float) -> T | None:
        """A call that never starts a daemon and gives up quickly; for completion."""
        try:
            return client.call(self.socket, method, params, result, timeout_s=timeout_s)
        except (BangerError, OSError):
            return None

    def _with_daemon(self, action: Callable[[], T]) -> T:
        try:
            return action()
        except client.DaemonAbsent as e:
            if self.paths.mode == "system":
                raise _service_absent(self.paths) from e
            self._start()
        except BangerError as e:
            if e.code != "bad_version":
                raise
            if self.paths.mode == "system":
                # Only root may replace a service, and its VMs run on meanwhile.
                e.hint = "sudo banger system restart"
                raise
            self._replace()
        return action()

    def _start(self) -> None:
        ensure_private_directory(self.paths.runtime)
        lock = os.open(self.paths.daemon_lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with contextlib.suppress(client.DaemonAbsent):
                client.call(self.socket, "ping", Empty(), Pong)
                return
            self._spawn()
        finally:
            os.close(lock)

    def _spawn(self) -> None:
        """Start a daemon and wait until it listens; its pipe closes when it cannot."""
        from banger.process import host_environment, spawn_detached

        ensure_private_directory(self.paths.state)
        ready, write = os.pipe()
        errors = os.open(
            self.paths.state / "bangerd.err",
            os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC,
            0o600,
        )
        try:
            spawn_detached(
                [*module_command("banger.daemon.main"), "--ready-fd", str(write)],
                cwd=Path("/"),
                output=errors,
                env=self._environment(host_environment()),
                pass_fds=(write,),
            )
            os.close(write)
            write = -1
            readable, _, _ = select.select([ready], [], [], _START_S)
            if readable and os.read(ready, 1):
                return
            os.lseek(errors, 0, os.SEEK_SET)
            words = os.read(errors, 4096).decode(errors="replace").strip()
            raise BangerError(
                "operation_failed",
                f"starting the daemon: {words or 'it did not come up'}",
                hint=f"cat {self.paths.daemon_log}",
            )
        finally:
            for fd in (ready, write, errors):
                if fd >= 0:
                    os.close(fd)

    @staticmethod
    def _environment(env: dict[str, str]) -> dict[str, str]:
        ours = {k: v for k, v in os.environ.items() if k.startswith("BANGER_") or k == "PYTHONPATH"}
        return {**env, **ours}

    def _replace(self) -> None:
        """End a daemon of another version, if it has nothing under way, and start ours."""
        with contextlib.suppress(client.DaemonAbsent):
            pong = client.call(self.socket, "shutdown", Empty(), Pong, state=self.paths.state)
            _wait_for_end(pong.pid)
        self._start()

    def stop(self) -> bool:
        """End the daemon; False when none runs. Raises BangerError when it is busy or a service."""
        if self.paths.mode == "system":
            raise BangerError(
                "operation_failed",
                "stopping the daemon: it is a service of this host, which `banger system` looks "
                "after; VMs run on while it restarts",
                hint="sudo banger system restart",
                reason="unsupported",
            )
        try:
            pong = client.call(self.socket, "shutdown", Empty(), Pong, state=self.paths.state)
        except client.DaemonAbsent:
            return False
        _wait_for_end(pong.pid)
        return True


class BuildingCall(client.StreamingCall):
    """A streaming call that the daemon may interrupt because an image has to be built outside.

    A service without new privileges cannot make the user namespaces that an image's build needs. It
    says so; we, who are the same user outside of it, build into its cache and ask once more.
    """

    def __init__(
        self, path: Path, method: str, params: Any, on_event: client.OnEvent, *, state: Path
    ) -> None:
        super().__init__(path, method, params, on_event, state=state)
        self._request = (path, method, params, on_event)
        self._state = state

    def result(self, kind: type[T]) -> T:
        """As `StreamingCall.result`, with a build on the way where one is needed."""
        try:
            return super().result(kind)
        except BangerError as e:
            if e.reason != "build_outside":
                raise
            from banger.cli.build_outside import build_outside

            self.close()
            build_outside(e, self._request[2], self._on_event)
        super().__init__(*self._request, state=self._state)
        return super().result(kind)


def _service_absent(paths: Paths) -> BangerError:
    there = paths.runtime.exists()
    return BangerError(
        "not_found",
        f"the service bangerd does not run (nothing listens at {paths.daemon_socket})",
        hint="sudo banger system restart" if there else "sudo systemctl start bangerd",
    )


def _wait_for_end(pid: int) -> None:
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        if not select.select([fd], [], [], _START_S)[0]:
            raise BangerError("operation_failed", f"the daemon (pid {pid}) does not end")
    finally:
        os.close(fd)
