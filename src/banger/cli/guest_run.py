"""Run one guest command for the user, and tell honestly what became of it."""

from __future__ import annotations

import contextlib
import os
import select
from typing import TYPE_CHECKING, Any

from banger.cli import stream
from banger.errors import BangerError
from banger.process import open_process

if TYPE_CHECKING:
    from collections.abc import Iterator

    from banger.api.records import VmRecord
    from banger.api.results import AgentAccess

_EXIT_FOLLOWS_S = 2.0
_PASSED = ("TERM", "LANG", "LC_ALL", "COLORTERM")


# The words of the command stay a list: `"$@"` is all that the shell sees of them.
_MISE = """mise=$(command -v mise || command -v /root/.local/bin/mise) || exec "$@"
exec {env}"$mise" exec -- "$@\""""
# Where nothing can be fetched, a tool that is not installed would end the command.
_OFFLINE = "env MISE_OFFLINE=1 MISE_EXEC_AUTO_INSTALL=false "


def through_mise(
    access: AgentAccess, argv: tuple[str, ...], directory: str | None = None
) -> tuple[str, ...]:
    """The command as it runs in a workspace with a mise file: with the tools that it names, where
    the guest has mise. `directory`: where it runs, unless in the workspace."""
    workspace = access.vm.workspace
    if not argv or workspace is None or not workspace.mise:
        return argv
    if directory is not None and not f"{directory}/".startswith(f"{workspace.guest_path}/"):
        return argv
    script = _MISE.replace("{env}", "" if access.vm.nat else _OFFLINE)
    return ("sh", "-c", script, "sh", *argv)


def run(
    sock: Any,
    access: AgentAccess,
    *,
    argv: tuple[str, ...],
    env: dict[str, str],
    user: str | None,
    want_tty: bool,
    cwd: str | None = None,
    login: bool | None = None,
) -> int:
    """The exit status of a guest command run over a connected agent socket.

    Raises:
        BangerError: the command never ran, or its fate is not known (reason connection_lost), or
            the machine ended under it.
    """
    use_tty = want_tty and (stream.interactive() or (not argv and os.isatty(0)))
    passed = {k: v for k in _PASSED if use_tty and (v := os.environ.get(k))}
    process = stream.GuestProcess(
        argv=argv,
        token=access.token,
        cwd=cwd or access.cwd,
        env={**passed, "BANGER_VM": access.vm.name, **env},
        user=user,
        login=access.login if login is None else login,
        tty=use_tty,
    )
    with attended(access) as machine:
        return stream.run(sock, process, machine=machine)


@contextlib.contextmanager
def attended(access: AgentAccess) -> Iterator[int | None]:
    """A pidfd of the VM's machine; a connection that is lost inside is explained by its end."""
    machine = open_process(access.vmm_pid, access.vmm_start_time)
    try:
        yield machine
    except BangerError as e:
        if e.reason != "connection_lost":
            raise
        raise _what_became_of(access.vm, machine, e) from e
    finally:
        if machine is not None:
            os.close(machine)


def _what_became_of(vm: VmRecord, machine: int | None, lost: BangerError) -> BangerError:
    """The machine's end explains a lost connection; else nobody knows.

    A VMM that dies closes its connections before its exit can be seen, so the exit gets a moment.
    """
    if machine is None or select.select([machine], [], [], _EXIT_FOLLOWS_S)[0]:
        return BangerError(
            "operation_failed",
            f"VM {vm.name}: the machine ended while the command ran",
            hint=f"banger vm logs {vm.name}",
            reason="connection_lost",
            outcome="unknown",
        )
    return BangerError(
        "operation_failed",
        f"VM {vm.name}: {lost.message}; what became of the command is unknown",
        hint=f"banger vm exec {vm.name} -- ps ax",
        reason="connection_lost",
        outcome="unknown",
    )
