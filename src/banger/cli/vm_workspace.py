"""`banger vm workspace prepare, export, diff`: repositories go in, work comes back."""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from banger.api import workspaces as w
from banger.api.params import ShipWorkspace
from banger.cli.complete import VM
from banger.cli.draw import print_json, progress, quiet_option, verbose_option
from banger.cli.errors import warn
from banger.cli.opened import open_opened
from banger.cli.server import Server
from banger.decoding import decode_json
from banger.errors import BangerError
from banger.files import new_file
from banger.units import format_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from banger.cli.guest_command import GuestCommand

vm_argument = click.argument("vm", type=VM)
guest_path_option = click.option(
    "--guest-path", metavar="DIR", help="Directory in the guest [the recorded one, /root/repo]."
)
_json = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


@click.command()
@vm_argument
@click.argument("src", default=".", type=click.Path())
@click.option("--guest-path", metavar="DIR", help="Where to put it, below /root [/root/repo].")
@click.option(
    "--mode",
    type=click.Choice(["shallow_overlay", "metadata_only", "full_copy"]),
    default="shallow_overlay",
    help="What of the repository goes along [shallow_overlay].",
)
@click.option("--readonly", is_flag=True, help="Without write bits; root can write all the same.")
@click.option("--branch", metavar="NAME", help="Check out a new branch in the guest.")
@click.option("--from", "from_ref", metavar="REF", help="Base of the new branch [HEAD].")
@click.option("--include-untracked", is_flag=True, help="Ship untracked, non-ignored files too.")
@click.option("--dry-run", is_flag=True, help="Print the files that would be shipped, and stop.")
@click.option("--force", is_flag=True, help="Overwrite what was changed in the guest.")
@_json
@quiet_option
@verbose_option
@click.pass_obj
def prepare(guest: GuestCommand, /, vm: str, src: str, as_json: bool, **o: Any) -> None:
    """Put the repository at SRC [.] into a running VM, or bring it up to date there.

    The second time only what has changed goes. Files that git does not know stay in the guest; what
    was changed there is never overwritten without --force.
    """
    guest.refuse()
    if o["from_ref"] and not o["branch"]:
        raise click.UsageError("--from needs --branch")
    path = str(Path(src).absolute())
    server = Server()
    if o["dry_run"]:
        shipped = ShipWorkspace(
            path=path,
            mode=o["mode"],
            branch=o["branch"],
            from_ref=o["from_ref"],
            include_untracked=o["include_untracked"],
        )
        print_shipped(server, shipped)
        return
    params = w.PrepareWorkspace(
        vm=vm,
        path=path,
        guest_path=o["guest_path"],
        mode=o["mode"],
        branch=o["branch"],
        from_ref=o["from_ref"],
        include_untracked=o["include_untracked"],
        readonly=o["readonly"],
        force=o["force"],
    )
    with (
        progress(quiet=o["quiet"], verbose=o["verbose"]) as painter,
        server.stream("vm.workspace.prepare", params, painter) as call,
    ):
        result = call.result(w.PreparedWorkspace)
    if as_json:
        print_json(result)
        return
    workspace = result.workspace
    base = workspace.base_commit[:12] if workspace.base_commit else "no commit"
    branch = f" ({workspace.branch})" if workspace.branch else ""
    sent = "" if result.sent == result.files else f", {result.sent} sent"
    sys.stdout.write(
        f"{workspace.guest_path}: {result.files} files, {format_size(result.bytes)}{sent}, "
        f"at {base}{branch}\n"
    )


@click.command()
@vm_argument
@guest_path_option
@click.option("--base-commit", metavar="SHA", help="Compare with it [what prepare recorded].")
@click.option("-o", "--output", metavar="FILE", type=click.Path(), help="Write it here.")
@click.option(
    "--format",
    "kind",
    type=click.Choice(["patch", "commits", "tar"]),
    default="patch",
    help="A patch, a bundle of the guest's commits, or its files [patch].",
)
@_json
@quiet_option
@click.pass_obj
def export(
    guest: GuestCommand,
    vm: str,
    guest_path: str | None,
    base_commit: str | None,
    output: str | None,
    kind: w.ExportFormat,
    as_json: bool,
    quiet: bool,
) -> None:
    """Write what was done in a guest's workspace; nothing in the guest is changed.

    \b
    banger vm workspace export web | git apply --binary --index
    banger vm workspace export web --format commits -o work.bundle && git pull work.bundle
    banger vm workspace export web --format tar | tar -C ./copy -x

    A patch holds everything that git does not ignore: commits, staged, unstaged and new files.
    """
    guest.refuse()
    if output is None and kind != "patch" and sys.stdout.isatty():
        raise click.UsageError(f"{kind} are no text; write them to a file with -o")
    if as_json and output is None:
        raise click.UsageError("--json needs -o: stdout can hold one of the two")
    params = w.ExportWorkspace(vm=vm, guest_path=guest_path, base_commit=base_commit, format=kind)
    with contextlib.ExitStack() as stack:
        if output is not None:
            write = stack.enter_context(_new_file(Path(output)))
        elif sys.stdout.isatty():
            write = stack.enter_context(shown(colour=False))
        else:
            write = sys.stdout.buffer.write
        result = receive(params, write, quiet=quiet)
    if as_json:
        print_json(result)
    elif output is not None and not quiet:
        _tell(result, kind, output)


@click.command()
@vm_argument
@guest_path_option
@click.option("--base-commit", metavar="SHA", help="Compare with it [what prepare recorded].")
@click.pass_obj
def diff(guest: GuestCommand, vm: str, guest_path: str | None, base_commit: str | None) -> None:
    """Show what was done in a guest's workspace, coloured on a terminal."""
    guest.refuse()
    params = w.ExportWorkspace(vm=vm, guest_path=guest_path, base_commit=base_commit)
    if not sys.stdout.isatty():
        receive(params, sys.stdout.buffer.write, quiet=True)
        return
    with shown(colour=not os.environ.get("NO_COLOR")) as write:
        receive(params, write, quiet=True)


def print_shipped(server: Server, params: ShipWorkspace) -> None:
    """Print the files that would be shipped, one a line. Raises BangerError."""
    with server.stream("vm.workspace.files", params, lambda event: None) as call:
        for chunk in call.frames():
            # Whole lines: no character is cut in two.
            sys.stdout.write(chunk.decode(errors="replace"))


def receive(
    params: w.ExportWorkspace, write: Callable[[bytes], object], *, quiet: bool
) -> w.ExportedWorkspace:
    """Export to `write`, piece by piece. Raises BangerError."""
    with (
        progress(quiet=quiet) as painter,
        Server().stream("vm.workspace.export", params, painter) as call,
    ):
        for chunk in call.frames():
            write(chunk)
        return decode_json(call.result_payload, type=w.ExportedWorkspace)


def _tell(result: w.ExportedWorkspace, kind: str, output: str) -> None:
    if not result.changed:
        warn(f"nothing to export from {result.guest_path}")
        return
    what = "commit" if kind == "commits" else "file"
    count = f"{result.changed} {what}{'' if result.changed == 1 else 's'}"
    bring = {"patch": "git apply --binary", "commits": "git pull", "tar": "tar -xf"}[kind]
    warn(f"{count} in {output}; bring them in with: {bring} {shlex.quote(output)}")


@contextlib.contextmanager
def _new_file(path: Path) -> Iterator[Callable[[bytes], object]]:
    """A file that gets its name when it is whole; a failure leaves the old one. What is no file, a
    pipe or /dev/null, stays what it is."""
    try:
        there = open_opened(str(path))
        if there is None and path.exists() and not path.is_file():
            there = path.open("wb")
        if there is not None:
            with there:
                yield there.write
            return
        # Through a link: it is the user's, and says where the file is to be.
        with new_file(_follow(path), mode=0o666) as f:
            yield f.write
    except OSError as e:
        raise BangerError("operation_failed", f"writing {path}: {e.strerror}") from e


def _follow(path: Path) -> Path:
    try:
        return path.resolve()
    except RuntimeError as e:  # links in a ring, in the words of Python 3.11
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path)) from e


_PLAIN, _BOLD, _RED, _GREEN, _CYAN = "\x1b[m", "\x1b[1m", "\x1b[31m", "\x1b[32m", "\x1b[36m"


@contextlib.contextmanager
def shown(*, colour: bool) -> Iterator[Callable[[bytes], object]]:
    """A patch for a terminal: line by line, without what a terminal would act on."""
    painter = _PatchPainter(colour=colour)
    rest = b""

    def write(chunk: bytes) -> None:
        nonlocal rest
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            painter.line(line)

    yield write
    if rest:
        painter.line(rest)
    sys.stdout.flush()


class _PatchPainter:
    def __init__(self, *, colour: bool) -> None:
        self._colour = colour
        self._in_hunk = False

    def line(self, raw: bytes) -> None:
        text = raw.decode(errors="replace")
        text = "".join(c if c.isprintable() or c == "\t" else "�" for c in text)
        paint = self._paint(text)
        sys.stdout.write(f"{paint}{text}{_PLAIN}\n" if paint and self._colour else f"{text}\n")

    def _paint(self, text: str) -> str:
        if text.startswith("diff --git "):
            self._in_hunk = False
            return _BOLD
        if text.startswith("@@ "):
            self._in_hunk = True
            return _CYAN
        if not self._in_hunk:
            return _BOLD
        return {"+": _GREEN, "-": _RED}.get(text[:1], "")
