"""`banger vm cp`: files into a VM, or out of it, spoken with the agent itself.

A file gets its name when it is whole, on either side. What comes out of a guest lands below the
directory that was named and nowhere else.
"""

from __future__ import annotations

import os
import re
import sys
import tarfile
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import click
import msgspec

from banger.api import params as p
from banger.api import results as r
from banger.api.envelope import PROTOCOL_VERSION, Request
from banger.cli.draw import progress, quiet_option
from banger.cli.errors import warn
from banger.cli.guest_run import attended
from banger.cli.server import Server
from banger.errors import BangerError
from banger.rpc.trees import GuestFiles

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from banger.cli.draw import Painter
    from banger.cli.guest_command import GuestCommand
    from banger.rpc.trees import PathFacts

_REMOTE = re.compile(r"(?P<vm>[A-Za-z0-9][A-Za-z0-9-]*):(?P<path>.*)", re.DOTALL)
_HOME = "/root"
_STEP = 1 << 20


class _Remote(NamedTuple):
    vm: str
    path: str


@click.command()
@click.argument("source", metavar="SRC")
@click.argument("target", metavar="DST")
@quiet_option
@click.pass_obj
def cp(guest: GuestCommand, source: str, target: str, quiet: bool) -> None:
    """Copy files into a running VM, or out of it. One side is VM:PATH; `-` is stdin or stdout.

    \b
    banger vm cp ./data web:/root/data        a file or a directory
    banger vm cp web:/var/log/syslog .
    banger vm cp web:result.json - | jq .

    Into an existing directory goes the thing itself, else DST is its new name. A path that is not
    absolute is below the guest's /root. Modes are kept, links stay links; in the guest files belong
    to root, here to you.
    """
    guest.refuse()
    here, there = _parse(source), _parse(target)
    if (here is None) == (there is None):
        raise click.UsageError("one of SRC and DST is VM:PATH, the other a path of this host")
    with progress(quiet=quiet) as painter:
        if here is not None:
            _Copy(here, painter).download(target)
        elif there is not None:
            _Copy(there, painter).upload(source)


def _parse(word: str) -> _Remote | None:
    """A path in a VM; None for one of this host: `-`, or with a slash before its first colon."""
    found = _REMOTE.fullmatch(word)
    if found is None:
        return None
    path = found["path"]
    if not path.startswith("/"):
        path = f"{_HOME}/{path.removeprefix('~/')}"
    return _Remote(found["vm"], path)


class _Copy:
    """One command: its VM, and how far it is. Each exchange has a connection of its own."""

    def __init__(self, remote: _Remote, painter: Painter) -> None:
        self._vm = remote.vm
        self._path = remote.path
        self._painter = painter
        self._server = Server()
        self._token = ""
        self._access: r.AgentAccess | None = None
        self._done = 0
        self._told = 0
        self.files = GuestFiles(self._connect, self._request)

    def _connect(self) -> socket.socket:
        access, sock = self._server.call_with_fd(
            "vm.connect", p.ConnectVm(vm=self._vm), r.AgentAccess
        )
        self._access, self._token = access, access.token
        connected: socket.socket = sock
        return connected

    def _request(self, method: str, params: dict[str, Any]) -> Request:
        raw = msgspec.Raw(msgspec.json.encode(params))
        return Request(version=PROTOCOL_VERSION, method=method, params=raw, token=self._token)

    def _stage(self, label: str, detail: str) -> None:
        self._painter({"stage": "copy", "label": label, "detail": detail})

    def _advance(self, count: int, total: int | None = None) -> None:
        self._done += count
        if self._done - self._told >= _STEP:
            self._told = self._done
            self._painter({"done": self._done, "total": total})

    def _attended(self, work: Callable[[], Any]) -> Any:
        """Run an exchange; it ends when the machine does, where its socket would stay silent."""
        assert self._access is not None  # a stat came first
        with attended(self._access) as machine:
            read, write = os.pipe()
            watcher = threading.Thread(
                target=_watch, args=(machine, read, self.files.cancel), daemon=True
            )
            watcher.start()
            try:
                return work()
            finally:
                os.close(write)
                watcher.join()
                os.close(read)

    # Into the guest

    def upload(self, source: str) -> None:
        if source == "-":
            with tempfile.TemporaryFile() as spool:
                while chunk := sys.stdin.buffer.read(_STEP):
                    spool.write(chunk)
                self._upload_file(spool, None)
            return
        path = Path(source)
        try:
            if path.is_dir() and not path.is_symlink():
                # pathlib has dropped what says "the content": DIR/. and . itself.
                self._upload_directory(path, inside=os.path.basename(source) in (".", ".."))  # noqa: PTH119
            else:
                self._upload_file(None, path)
        except OSError as e:
            raise BangerError("operation_failed", f"reading {e.filename}: {e.strerror}") from e

    def _upload_file(self, spool: BinaryIO | None, path: Path | None) -> None:
        name = os.fsencode(path.name) if path is not None else None
        if path is not None:
            path.lstat()  # before the guest is asked
        directory, base = self._find_target(name)
        self._stage("copying into the guest", f"{directory}/{os.fsdecode(base)}")

        def write(out: BinaryIO) -> None:
            with _open_tar(out) as tar:
                if path is not None:
                    self._add(tar, path, os.fsdecode(base))
                    return
                assert spool is not None
                member = tarfile.TarInfo(os.fsdecode(base))
                member.size, member.mode = spool.tell(), 0o644
                spool.seek(0)
                tar.addfile(member, _Counting(spool, self._advance, member.size))

        self._attended(lambda: self.files.put(directory, write, mode="merge"))

    def _upload_directory(self, path: Path, *, inside: bool) -> None:
        facts = self.files.stat(self._path)
        target = self._path
        if facts is not None:
            if facts.kind != "directory":
                raise BangerError("bad_request", f"{self._path} in the guest is no directory")
            target = facts.path if inside else f"{facts.path.rstrip('/')}/{path.name}"
        else:
            target = self._real(self._path)
        self._stage("copying into the guest", target)

        def write(out: BinaryIO) -> None:
            with _open_tar(out) as tar:
                self._add(tar, path, ".")

        self._attended(lambda: self.files.put(target, write, mode="merge"))

    def _find_target(self, name: bytes | None) -> tuple[str, bytes]:
        """Directory and base name in the guest for one file."""
        facts = self.files.stat(self._path)
        if facts is not None and facts.kind == "directory":
            if name is None:
                raise BangerError(
                    "bad_request", f"{self._path} in the guest is a directory; name a file"
                )
            return facts.path, name
        base = self._path.rstrip("/").rpartition("/")[2]
        if self._path.endswith("/") or base in ("", ".", ".."):
            raise BangerError("not_found", f"there is no directory {self._path} in the guest")
        return self._real(self._path).rpartition("/")[0] or "/", os.fsencode(base)

    def _real(self, path: str) -> str:
        """The path with the links of its existing part followed: `put` follows none."""
        parts = [x for x in path.split("/") if x not in ("", ".")]
        for count in range(len(parts) - 1, 0, -1):
            facts = self.files.stat("/" + "/".join(parts[:count]))
            if facts is not None:
                return "/".join([facts.path.rstrip("/"), *parts[count:]])
        return "/" + "/".join(parts)

    def _add(self, tar: tarfile.TarFile, path: Path, name: str) -> None:
        """A file or a directory with all that is in it; links stay links."""
        member = tar.gettarinfo(str(path), arcname=name)
        if member is None or not (
            member.isreg() or member.isdir() or member.issym() or member.islnk()
        ):
            warn(f"left out, since it is no plain file: {path}")
            return
        member.uid = member.gid = 0
        member.uname = member.gname = ""
        if member.isreg():
            with path.open("rb") as f:
                tar.addfile(member, _Counting(f, self._advance, None))
            return
        tar.addfile(member)
        if member.isdir():
            for child in sorted(path.iterdir()):
                self._add(tar, child, f"{name}/{child.name}")

    # Out of the guest

    def download(self, target: str) -> None:
        facts = self.files.stat(self._path)
        if facts is None:
            raise BangerError("not_found", f"there is no {self._path} in VM {self._vm}")
        if facts.kind == "other":
            raise BangerError("bad_request", f"{self._path} in the guest is no file or directory")
        self._stage("copying out of the guest", self._path)
        if target == "-":
            self._to_stdout(facts)
            return
        try:
            if facts.kind == "file":
                self._download_file(Path(target))
            else:
                self._download_directory(Path(target))
        except OSError as e:
            raise BangerError("operation_failed", f"writing {target}: {e.strerror}") from e

    def _to_stdout(self, facts: PathFacts) -> None:
        if facts.kind != "file":
            raise BangerError(
                "bad_request",
                f"{self._path} is a directory; `-` takes a file",
                hint=f"banger vm exec {self._vm} -- tar -C {self._path} -c .",
            )

        def receive(stream: BinaryIO) -> None:
            reader = _reader(stream, self._path)
            for _ in reader:
                while chunk := reader.read(_STEP):
                    sys.stdout.buffer.write(chunk)
                    self._advance(len(chunk), facts.size)

        self._attended(lambda: self.files.get(self._path, None, receive))
        sys.stdout.buffer.flush()

    def _download_file(self, target: Path) -> None:
        from banger.workspace.landing import Landing

        name = os.fsencode(self._path.rstrip("/").rpartition("/")[2])
        if target.is_dir():
            directory = target
        else:
            directory, name = target.absolute().parent, os.fsencode(target.name)

        def receive(stream: BinaryIO) -> None:
            reader = _reader(stream, self._path)
            with Landing(directory, f"copying {self._path}") as landing:
                for member in reader:
                    if member.kind == "file":
                        read = _counted(reader.read, self._advance, member.size)
                        landing.file([name], member.size, read, mode=member.mode)
                        return
            raise BangerError("operation_failed", f"{self._path} in the guest is no plain file")

        self._attended(lambda: self.files.get(self._path, None, receive))

    def _download_directory(self, target: Path) -> None:
        if target.is_dir() and not self._path.endswith("/."):
            name = self._path.rstrip("/").rpartition("/")[2]
            target = target / name if name not in ("", ".", "..") else target
        target.mkdir(exist_ok=True)

        def receive(stream: BinaryIO) -> list[bytes]:
            return _land(stream, target, self._path, self._advance)

        left_out = self._attended(lambda: self.files.get(self._path, None, receive))
        if left_out:
            from banger.workspace.names import format_names

            warn(f"left out, since they are no plain files: {format_names(left_out)}")


def _land(stream: BinaryIO, target: Path, path: str, advance: Callable[[int], None]) -> list[bytes]:
    """Unpack a guest's tar below `target`; the names of what is neither file nor directory nor
    link come back."""
    from banger.workspace.landing import Landing
    from banger.workspace.tar_reader import split_name

    doing = f"copying {path}"
    reader = _reader(stream, path)
    modes: list[tuple[list[bytes], int]] = []
    landed: set[bytes] = set()
    left_out: list[bytes] = []
    with Landing(target, doing) as landing:
        for member in reader:
            parts = split_name(member.name, doing)
            if member.kind == "directory":
                landing.directory(parts)
                modes.append((parts, member.mode))
            elif member.kind == "file":
                read = _counted(reader.read, advance, None)
                landing.file(parts, member.size, read, mode=member.mode)
                landed.add(b"/".join(parts))
            elif member.kind == "symlink":
                landing.symlink(parts, member.link)
            elif member.kind == "hardlink":
                to = split_name(member.link, doing)
                if b"/".join(to) not in landed:
                    raise BangerError("operation_failed", f"{doing}: a link to what did not come")
                landing.hardlink(parts, to)
            else:
                left_out.append(member.name)
        for parts, mode in reversed(modes):
            landing.set_directory_mode(parts, mode)
    return left_out


def _reader(stream: BinaryIO, path: str) -> Any:
    from banger.workspace.tar_reader import TarReader

    return TarReader(stream, f"copying {path}")


def _counted(
    read: Callable[[int], bytes], advance: Callable[..., None], total: int | None
) -> Callable[[int], bytes]:
    def counted(most: int) -> bytes:
        chunk = read(most)
        advance(len(chunk), total)
        return chunk

    return counted


def _open_tar(out: BinaryIO) -> tarfile.TarFile:
    # GNU format: names are bytes there; a pax record has to be UTF-8.
    return tarfile.open(
        fileobj=out, mode="w|", format=tarfile.GNU_FORMAT, encoding="utf-8",
        errors="surrogateescape", dereference=False,
    )  # fmt: skip


class _Counting:
    """A file that tells how much of it was read."""

    def __init__(self, file: Any, advance: Callable[..., None], total: int | None) -> None:
        self._file = file
        self._advance = advance
        self._total = total

    def read(self, size: int = -1) -> bytes:
        data: bytes = self._file.read(size)
        self._advance(len(data), self._total)
        return data


def _watch(machine: int | None, stop: int, cancel: Callable[[], None]) -> None:
    import select

    if machine is None:
        return
    ready = select.select([machine, stop], [], [])[0]
    if machine in ready and stop not in ready:
        cancel()
