"""Files that appear whole, private directories, and cheap copies.

A state file is written beside its target, synced and renamed; a directory that others could write
is refused before anything is put into it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from typing import TYPE_CHECKING

from banger.errors import BangerError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# _IOW(0x94, 9, int), include/uapi/linux/fs.h: share the data extents of another file.
_FICLONE = 0x40049409
_CHUNK = 1 << 20


def write_atomic(path: Path, content: bytes, *, mode: int = 0o600) -> None:
    """Replace `path` by a file of this content: beside, fsync, rename, fsync of the directory."""
    tmp = path.with_name(f".{path.name}.{os.urandom(4).hex()}")
    fd = os.open(tmp, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(fd, "wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(tmp)
        raise
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make renames and new names in this directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def ensure_private_directory(path: Path) -> Path:
    """Make `path` (0700, ours) or check that it is so already.

    Raises:
        BangerError: it cannot be made, is a symlink, no directory, or somebody else's.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
    except OSError as e:
        raise BangerError(
            "operation_failed",
            f"making the directory {path}: {e.strerror}",
            hint=f"ls -ld {path.parent}",
            reason="disk_full" if e.errno == errno.ENOSPC else None,
        ) from e
    st = os.lstat(path)
    if not stat.S_ISDIR(st.st_mode):
        raise BangerError("operation_failed", f"{path} is no directory", hint=f"ls -ld {path}")
    if st.st_uid != os.geteuid():
        raise BangerError(
            "operation_failed",
            f"{path} belongs to uid {st.st_uid}, not to you (uid {os.geteuid()})",
            hint=f"ls -ld {path}",
        )
    if st.st_mode & 0o077:
        path.chmod(0o700)
    return path


def clone(source: Path, target: Path, *, mode: int = 0o600) -> None:
    """Copy `source` to the new file `target`: shared extents where the filesystem can, else only
    the data extents, so that a sparse file stays sparse.

    Raises:
        FileExistsError: `target` exists. OSError: disk full and the like; no part file is left.
    """
    with source.open("rb") as src:
        fd = os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        try:
            with os.fdopen(fd, "r+b") as dst:
                try:
                    fcntl.ioctl(dst.fileno(), _FICLONE, src.fileno())
                except OSError as e:
                    # The filesystem cannot share (ext4, tmpfs), or the two are on different ones.
                    if e.errno not in (errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY):
                        raise
                    _copy_extents(src.fileno(), dst.fileno())
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                target.unlink()
            raise


def can_share_extents(directory: Path) -> bool:
    """Whether copies in this directory share their data, tried with a real file.

    Raises:
        OSError: nothing can be written there.
    """
    names = [directory / f".share-{os.urandom(4).hex()}" for _ in range(2)]
    try:
        with names[0].open("xb") as source:
            # An empty file can be "shared" anywhere; a whole block is what counts.
            source.write(b"x" * 4096)
        with names[0].open("rb") as source, names[1].open("xb") as target:
            fcntl.ioctl(target.fileno(), _FICLONE, source.fileno())
    except OSError as e:
        if e.errno not in (errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY):
            raise
        return False
    finally:
        for name in names:
            name.unlink(missing_ok=True)
    return True


def _copy_extents(src: int, dst: int) -> None:
    size = os.fstat(src).st_size
    os.ftruncate(dst, size)
    for start, end in _data_extents(src, size):
        offset = start
        while offset < end:
            copied = _copy_some(src, dst, offset, min(end - offset, 64 * _CHUNK))
            if copied == 0:
                raise OSError(errno.EIO, "the source became shorter while it was copied")
            offset += copied


def _copy_some(src: int, dst: int, offset: int, count: int) -> int:
    try:
        return os.copy_file_range(src, dst, count, offset, offset)
    except OSError as e:
        # Between filesystems of different types the kernel refuses (since Linux 5.19).
        if e.errno not in (errno.EXDEV, errno.EOPNOTSUPP, errno.EINVAL):
            raise
        return os.pwrite(dst, os.pread(src, min(count, _CHUNK), offset), offset)


def _data_extents(fd: int, size: int) -> Iterator[tuple[int, int]]:
    end = 0
    while end < size:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError as e:
            if e.errno == errno.ENXIO:  # only a hole is left
                return
            raise
        end = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, end


def link_or_copy(source: Path, target: Path) -> None:
    """Give an immutable file a second name; a copy where the filesystem does not allow that."""
    try:
        os.link(source, target)
    except OSError as e:
        if e.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP):
            raise
        clone(source, target, mode=0o444)


def sha256_file(path: Path) -> str:
    """The hex sha256 of a file."""
    import hashlib  # OpenSSL's part takes longer to load than most commands have work

    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def free_bytes(path: Path) -> int:
    """Bytes that this user may still write on the filesystem of `path`."""
    st = os.statvfs(path)
    return st.f_bavail * st.f_frsize


def remove_tree(path: Path) -> None:
    """Remove a directory of ours, without following links; absent is fine."""
    import shutil  # with its compressors, which a command line that removes nothing need not load

    try:
        shutil.rmtree(path)
    except FileNotFoundError:
        return


@contextlib.contextmanager
def staging_directory(parent: Path, prefix: str) -> Iterator[Path]:
    """A private directory beside a result; what is left in it at the end is removed.

    It is locked meanwhile, so that one whose maker was killed can be told: see `is_abandoned`.
    """
    parent.mkdir(parents=True, exist_ok=True)
    while True:
        path = parent / f".{prefix}-{os.urandom(4).hex()}"
        path.mkdir(mode=0o700)
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(fd, fcntl.LOCK_EX)
        # Between the two somebody may have taken it for abandoned.
        if os.fstat(fd).st_nlink:
            break
        os.close(fd)
    try:
        yield path
    finally:
        try:
            remove_tree(path)
        finally:
            os.close(fd)


def is_abandoned(path: Path) -> bool:
    """Whether nobody works in a staging directory any more. Raises OSError: it is not ours."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock between processes on a lock file; blocks until it is ours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
