"""One tar stream with a workspace: the files as they are on disk, then a self-contained `.git`.

The stream is made while it is written: memory is bounded whatever the files' sizes, and the history
is packed by git beside it. A failure leaves a stream without end marker, and no temporary files.
Runs in a thread: everything here blocks.
"""

from __future__ import annotations

import os
import stat
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, BinaryIO

from banger.errors import BangerError
from banger.progress import Reporter, Silent
from banger.workspace.files import is_shippable, select, tar_mode
from banger.workspace.git import cancellation, never
from banger.workspace.git_directory import plan_git, prepared
from banger.workspace.index import EXECUTABLE, REGULAR, SYMLINK
from banger.workspace.inspect import inspect_repository
from banger.workspace.names import format_name, format_names
from banger.workspace.objects import ObjectReader
from banger.workspace.options import (
    DIRECTORY,
    Candidate,
    HostStat,
    PackedFile,
    Selection,
    ShipOptions,
    ShipResult,
)
from banger.workspace.scratch import Scratch, open_scratch
from banger.workspace.stand_ins import find_stand_ins
from banger.workspace.tar import TarWriter
from banger.workspace.tree_id import TreeHasher
from banger.workspace.worktree import WorkTree

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from banger.workspace.repository import Repository

_IN_MEMORY = 1 << 20
_REPORT_EVERY = 500
_MAX_LINK = 4096
_TICK_NS = 20_000_000


def pack(
    repository: Repository,
    options: ShipOptions,
    out: BinaryIO,
    *,
    cancelled: Callable[[], bool] = never,
    reporter: Reporter | None = None,
    scratch_parent: Path | None = None,
) -> ShipResult:
    """Write the workspace to `out` as one tar and say what it was. Names are relative to the root.

    `cancelled` is asked between files and while git works. `scratch_parent` is where the temporary
    git directory is made (default: the system's temporary directory).

    Raises:
        BangerError: what `select` refuses, before the first byte; later: a file cannot be read or
            changed its size while it was read, an object is missing, reason `cancelled`.
        OSError: `out` failed.
    """
    with ExitStack() as stack:
        scratch = stack.enter_context(open_scratch(repository, scratch_parent))
        selection = select(scratch, options)
        shipping = Shipping(
            scratch, selection, TarWriter(out), cancelled, reporter if reporter else Silent()
        )
        plan = plan_git(scratch, selection, options)
        emit = stack.enter_context(prepared(scratch, selection, options, plan))
        shipping.tar.read_only = options.readonly
        shipping.tar.root(mtime=shipping.now)
        shipping.ship_files()
        shipping.tar.read_only = False
        files, size = shipping.tar.files, shipping.tar.content_bytes
        shipping.tar.directory(b".git", mtime=shipping.now)
        emit(shipping.tar, b".git", cancelled)
        shipping.ship_nested(scratch_parent)
        shipping.tar.finish()
        tree = shipping.hasher.finish()
        stand_ins = find_stand_ins(
            scratch, selection.target, {f.name: f.oid for f in shipping.packed}, tree=tree
        )
    full = options.mode == "full_copy"
    return ShipResult(
        guest_name=repository.name,
        subdirectory=repository.subdirectory,
        base_commit=selection.target,
        branch=options.branch if options.branch is not None else repository.branch,
        file_count=files,
        byte_count=size,
        stream_files=shipping.tar.files,
        stream_bytes=shipping.tar.content_bytes,
        tree_id=None if full else tree,
        packed=tuple(shipping.packed),
        stand_ins=stand_ins,
        selection=selection,
        git=plan,
        members=tuple(shipping.tar.names),
    )


class Shipping:
    """The state of one stream. Lives as long as the stream is written."""

    def __init__(
        self,
        scratch: Scratch,
        selection: Selection,
        tar: TarWriter,
        cancelled: Callable[[], bool],
        reporter: Reporter,
    ) -> None:
        self.scratch = scratch
        self.repository = scratch.repository
        self.selection = selection
        self.tar = tar
        self.cancelled = cancelled
        self.reporter = reporter
        self.hasher = TreeHasher(self.repository.object_format)
        self.now = int(time.time())
        self._trust_disk = self.repository.setting("core.filemode") != "false"
        self.packed: list[PackedFile] = []
        self._left_out = list(selection.left_out)

    def ship_files(self) -> None:
        total = len(self.selection.candidates)
        with ExitStack() as stack:
            tree = stack.enter_context(WorkTree(self.repository.root))
            reader: ObjectReader | None = None
            for done, candidate in enumerate(self.selection.candidates):
                if done % _REPORT_EVERY == 0:
                    self._check_cancelled()
                    self.reporter.advance(done, total)
                if candidate.mode == DIRECTORY:
                    self.tar.directory(candidate.name, mtime=self.now)
                elif candidate.oid is None:
                    self._ship_from_disk(tree, candidate)
                else:
                    if reader is None:
                        reader = stack.enter_context(ObjectReader(self.scratch.git))
                    self._ship_blob(reader, candidate)
        self._check_cancelled()
        self.reporter.advance(total, total)
        if self._left_out:
            self.reporter.warn(
                f"not shipped, since they are no plain files: {format_names(self._left_out)}"
            )

    def ship_nested(self, scratch_parent: Path | None) -> None:
        """The `.git` of submodules and other repositories inside a full copy, each a directory of
        its own in place: a `.git` file names a path that the guest does not have."""
        options = ShipOptions(mode="full_copy")
        for name in self.selection.nested:
            self._check_cancelled()
            where = self.repository.root / os.fsdecode(name)
            try:
                inner = inspect_repository(where)
            except BangerError as e:
                self.reporter.warn(f"{format_name(name)} is shipped without its history: {e}")
                continue
            if inner.root != where:
                self.reporter.warn(f"{format_name(name)} is shipped without its .git: not usable")
                continue
            with open_scratch(inner, scratch_parent) as scratch:
                selection = Selection(target=inner.head_commit, candidates=())
                plan = plan_git(scratch, selection, options)
                with prepared(scratch, selection, options, plan) as emit:
                    emit(self.tar, name + b"/.git", self.cancelled)

    def _ship_from_disk(self, tree: WorkTree, candidate: Candidate) -> None:
        name = candidate.name
        found = tree.find(name)
        if found is None:  # deleted
            return
        if stat.S_ISLNK(found.st_mode):
            target = tree.read_link(name)
            if target is not None:
                self._enter_directory(name)
                self._ship_link(name, target, int(found.st_mtime), host_stat(found))
        elif stat.S_ISREG(found.st_mode):
            fd = tree.open(name)
            if fd is None:
                return
            try:
                self._ship_open_file(fd, candidate)
            finally:
                os.close(fd)
        elif not is_shippable(found.st_mode) and not stat.S_ISDIR(found.st_mode):
            self._left_out.append(name)

    def _ship_open_file(self, fd: int, candidate: Candidate) -> None:
        name = candidate.name
        st = os.fstat(fd)
        if not stat.S_ISREG(st.st_mode):
            self._left_out.append(name)
            return
        mode = tar_mode(candidate.mode, st.st_mode, trust_disk=self._trust_disk)
        self._enter_directory(name)
        if st.st_size < _IN_MEMORY:
            # What is read is what the header says, so a small file may change under us.
            content = _read_up_to(fd, st.st_size + 1)
            if len(content) <= _IN_MEMORY and len(content) <= st.st_size:
                kept = host_stat(st) if len(content) == st.st_size else None
                self._add(name, self._hash(content), len(content), mode, kept)
                self.tar.file(name, content, mode=mode, mtime=int(st.st_mtime))
                return
            os.lseek(fd, 0, os.SEEK_SET)
        hashed = self.hasher.begin_blob(st.st_size)

        def read(most: int) -> bytes:
            self._check_cancelled()
            chunk = os.read(fd, most)
            hashed.update(chunk)
            return chunk

        missing = self.tar.stream(name, st.st_size, read, mode=mode, mtime=int(st.st_mtime))
        if missing or os.read(fd, 1):
            shape = f"{missing} bytes shorter" if missing else "longer"
            raise BangerError(
                "operation_failed",
                f"reading {format_name(name)} in {self.repository.root}: "
                f"it became {shape} while it was read",
                hint="stop what writes to it, then run the command again",
                reason="file_changed",
            )
        self._add(name, hashed.digest(), st.st_size, mode, host_stat(st))

    def _ship_blob(self, reader: ObjectReader, candidate: Candidate) -> None:
        name, git_mode, oid = candidate
        assert oid is not None
        found = reader.open_blob(oid)
        if found is None:
            raise BangerError(
                "operation_failed",
                f"reading {format_name(name)}: its object {oid} is missing from the repository",
                hint=f"git -C {self.repository.root} cat-file -e {oid}",
            )
        size, read = found
        self._enter_directory(name)
        if git_mode == SYMLINK:
            if size >= _MAX_LINK:
                raise BangerError(
                    "bad_request", f"the symlink {format_name(name)} has a target of {size} bytes"
                )
            target = b""
            while len(target) < size:
                target += read(size)
            self._ship_link(name, target, self.now, None)
            return
        mode = tar_mode(git_mode, 0, trust_disk=False)
        self.tar.stream(name, size, read, mode=mode, mtime=self.now)
        self._add(name, bytes.fromhex(oid), size, mode, None)

    def _ship_link(self, name: bytes, target: bytes, mtime: int, host: HostStat | None) -> None:
        self._add(name, self._hash(target), len(target), SYMLINK, host)
        self.tar.symlink(name, target, mtime=mtime)

    def _enter_directory(self, name: bytes) -> None:
        directory = name.rpartition(b"/")[0]
        if directory:
            self.tar.directory(directory, mtime=self.now)

    def _hash(self, content: bytes) -> bytes:
        hashed = self.hasher.begin_blob(len(content))
        hashed.update(content)
        digest: bytes = hashed.digest()
        return digest

    def _add(self, name: bytes, digest: bytes, size: int, mode: int, host: HostStat | None) -> None:
        executable, link = mode == 0o755, mode == SYMLINK
        self.hasher.add(name, digest, executable=executable, link=link)
        git_mode = SYMLINK if link else EXECUTABLE if executable else REGULAR
        self.packed.append(PackedFile(name, git_mode, digest, size, host))

    def _check_cancelled(self) -> None:
        if self.cancelled():
            raise cancellation(f"packing {self.repository.root}")


def host_stat(st: os.stat_result) -> HostStat | None:
    """What to remember of a file that has just been read; None when it is so young that its next
    change may leave all of this as it is: the kernel's clock of file times has ticks."""
    if time.time_ns() - st.st_ctime_ns < _TICK_NS:
        return None
    return HostStat(st.st_ino, st.st_size, st.st_mtime_ns, st.st_ctime_ns)


def _read_up_to(fd: int, most: int) -> bytes:
    """Until the end of the file or `most` bytes; a signal may make one read shorter."""
    content = os.read(fd, most)
    if len(content) < most and content:
        while len(content) < most and (more := os.read(fd, most - len(content))):
            content += more
    return content
