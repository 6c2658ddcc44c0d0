"""`banger vm workspace apply`: what was done in the guest is done to the user's files.

It runs with the user's own rights, and changes nothing unless every file that the guest changed is
still what was shipped.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from banger.api import workspaces as w
from banger.api.params import VmRef
from banger.cli.draw import progress, quiet_option
from banger.cli.errors import warn
from banger.cli.server import Server
from banger.cli.vm_workspace import guest_path_option, vm_argument
from banger.decoding import decode_json
from banger.errors import BangerError
from banger.rpc.outcomes import fill_in

if TYPE_CHECKING:
    from collections.abc import Iterator

    from banger.cli.guest_command import GuestCommand


@click.command()
@vm_argument
@guest_path_option
@click.option("--check", is_flag=True, help="Only say what would be done, and whether it can be.")
@quiet_option
@click.pass_obj
def apply(guest: GuestCommand, vm: str, guest_path: str | None, check: bool, quiet: bool) -> int:
    """Do to the repository here what was done to its copy in the guest.

    Files that you have changed here since are never overwritten: then nothing is done, and the
    files are named. Commits come with: banger vm workspace export VM --format commits
    """
    guest.refuse()
    from banger.workspace.landed import HostFacts, apply_changes, compare, read_changes
    from banger.workspace.names import format_name

    params = w.WorkspaceRef(vm=vm, guest_path=guest_path)
    server = Server()
    with (
        progress(quiet=quiet) as painter,
        server.stream("vm.workspace.changes", params, painter) as call,
    ):
        stream = io.BufferedReader(_Frames(call.frames()), 256 << 10)
        header = decode_json(stream.readline(64 << 10), type=w.ChangedFiles)
        root = Path(header.source)
        if not (root / ".git").exists():
            raise BangerError(
                "not_found",
                f"the repository {root} is not there any more",
                hint=f"banger vm workspace export {vm} -o changes.patch",
            )
        changes = read_changes(stream)
        host = HostFacts(root, header.object_format, header.file_mode)
        try:
            done = compare(host, changes) if check else apply_changes(host, changes, stream)
        except BangerError as e:
            raise fill_in(e, vm) from None
        while stream.read(1 << 20):
            pass
        result = decode_json(call.result_payload, type=w.ExportedWorkspace)
    if not check:
        known = w.AppliedWorkspace(vm=vm, guest_path=header.guest_path, offer=result.offer)
        server.call("vm.workspace.applied", known, VmRef)
    for letter, name in done.written:
        sys.stdout.write(f"{letter} {format_name(name)}\n")
    for name in done.conflicts:
        sys.stdout.write(f"! {format_name(name)}\n")
    if done.conflicts:
        count = len(done.conflicts)
        files = "1 file was" if count == 1 else f"{count} files were"
        warn(f"{files} changed here as well; nothing can be applied")
        return 1
    if not quiet and not done.written:
        warn(f"nothing to apply: {root} has all of it")
    return 0


class _Frames(io.RawIOBase):
    """The data of a streaming call as a file."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._rest = memoryview(chunk)
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count
