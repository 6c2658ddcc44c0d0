"""squashfs files from a tar stream of our own making, by sqfstar; no privilege needed.

sqfstar leaves out what it dislikes and still ends with status 0, so its words are read as errors.
What goes in has each path once, hard links behind their targets, and no entry for the root.
"""

from __future__ import annotations

import io
import os
import re
import subprocess
import tarfile
from typing import IO, TYPE_CHECKING, cast

from banger.disk.squashfs_root import UNCOMPRESSED, SquashfsChanged, own_root_directory
from banger.errors import BangerError
from banger.process import ProcessFailed, get_program

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from _typeshed import ReadableBuffer as Buffer

    from banger.disk.background import Job

# Within the times that ext4, tar and squashfs can all hold; no host clock gets into an image.
DEFAULT_EPOCH = 1_700_000_000
# Python marks headers with binary attributes by this keyword; sqfstar takes all values as binary.
_HARMLESS = 'Unrecognised keyword "hdrcharset" in pax header, ignoring'
_TROUBLE = re.compile(r"ignoring|skipping|failed|fatal|error|warning", re.IGNORECASE)


def write_squashfs(
    target: Path,
    feed: Callable[[IO[bytes]], None],
    *,
    job: Job,
    epoch: int | None = DEFAULT_EPOCH,
    all_root: bool = False,
    root_mode: int = 0o755,
) -> None:
    """Write the new file `target` (lz4) from the tar stream that `feed` writes into the pipe.

    With an `epoch` (seconds) the same stream gives the same bytes: it is the time of the filesystem
    and of its root directory, and later times in the stream become it. Without one, these two are
    the present time and the stream's own times stay. The root directory is root's and has the mode
    `root_mode`; with `all_root` everything is root's, whatever the stream says.

    Raises:
        BangerError: sqfstar is missing (not_found), failed, or left something out. `target` is
            then removed. Whatever `feed` raises goes through.
    """
    sqfstar = get_program("sqfstar", package="squashfs-tools")
    trouble: list[str] = []

    def on_line(line: str) -> None:
        if _TROUBLE.search(line) and line != _HARMLESS:
            trouble.append(line)

    argv = [sqfstar, "-comp", "lz4", "-no-progress", "-root-mode", f"{root_mode:o}"]
    foreign = not all_root and os.geteuid() != 0
    if all_root:
        argv.append("-all-root")
    elif foreign:
        argv += UNCOMPRESSED
    argv.append(str(target))
    try:
        with (
            job.program(
                argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                env={} if epoch is None else {"SOURCE_DATE_EPOCH": str(epoch)},
                on_line=on_line,
            ) as p,
        ):
            assert p.stdin
            fed = False
            try:
                feed(p.stdin)
                fed = True
                p.stdin.close()
            except BrokenPipeError:
                # It ended first: leaving the block reports its status and last words. Of a whole
                # stream it needs no more than the end mark, not the padding behind it.
                if p.wait() == 0 and not fed:
                    raise
        if trouble:
            raise BangerError(
                "operation_failed",
                f"writing {target.name}: sqfstar left something out: {trouble[0]}",
            )
        if foreign:
            own_root_directory(target)
    except BaseException as e:
        target.unlink(missing_ok=True)
        if isinstance(e, ProcessFailed | SquashfsChanged):
            raise BangerError("operation_failed", f"writing {target.name}: {e}") from e
        raise


def open_tar_writer(stream: IO[bytes]) -> tarfile.TarFile:
    """A tar writer for a pipe: pax, which carries long names, large files and xattrs."""
    pipe = cast("IO[bytes]", _Pipe(stream))
    return tarfile.open(fileobj=pipe, mode="w|", format=tarfile.PAX_FORMAT, bufsize=1 << 18)


class _Pipe(io.RawIOBase):
    """A stream that the tar writer cannot close behind our back when an entry fails."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream

    def writable(self) -> bool:
        return True

    def write(self, data: Buffer) -> int:
        return self._stream.write(data)
