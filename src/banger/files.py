"""Files that appear whole, private directories, and cheap copies.

A state file is written beside its target, synced and renamed; a finished directory is synced and
renamed. So power lost at any moment leaves the old one or the new one, and at most something beside
it whose name says what it is. A directory that others could write is refused before anything is put
into it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import stat
from pathlib import Path
from typing import IO, TYPE_CHECKING

from banger.errors import BangerError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# _IOW(0x94, 9, int), include/uapi/linux/fs.h: share the data extents of another file.
_FICLONE = 0x40049409
_CHUNK = 1 << 20
# include/uapi/linux/fcntl.h, fs.h
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
# What `new_file` and `staging_directory` call what is not whole yet.
_BESIDE = re.compile(r"\..+[.-][0-9a-f]{8}")


def write_atomic(path: Path, content: bytes, *, mode: int = 0o600) -> None:
    """Replace `path` by a file of this content: beside, fsync, rename, fsync of the directory.

    Raises:
        OSError: with the file's name; the old file is then as it was, and nothing lies beside it.
    """
    with new_file(path, mode=mode) as f:
        f.write(content)


@contextlib.contextmanager
def new_file(
    path: Path, *, mode: int = 0o600, check: Callable[[], None] | None = None
) -> Iterator[IO[bytes]]:
    """A file that takes the name `path` when the block ends: whole and on disk by then, or not at
    all. What a killed process left beside it is `remove_leftovers`' to find.

    `check` is called last before the rename, and may refuse it.

    Raises:
        OSError: with the file's name. Whatever `check` raises.
    """
    beside = path.with_name(_name_beside(path))
    try:
        fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        try:
            with os.fdopen(fd, "wb") as f:
                yield f
                f.flush()
                os.fsync(f.fileno())
            if check is not None:
                check()
            os.replace(beside, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(beside)
            raise
        sync_directory(path.parent)
    except OSError as e:
        if e.filename is None:
            e.filename = str(path)  # fsync(2) and write(2) know none
        raise


def _name_beside(path: Path) -> str:
    return f".{path.name[:200]}.{os.urandom(4).hex()}"


def remove_leftovers(directory: Path, *, plain: bool = True) -> list[str]:
    """Remove what `new_file` and `staging_directory` of killed processes left in a directory.

    A staging directory stays while its maker lives. Of a `plain` file nobody can tell, so the
    caller knows that none is being written there. Returns the names; an absent directory has none.
    """
    removed = []
    try:
        names = sorted(os.listdir(directory))
    except FileNotFoundError:
        return []
    for name in names:
        if _BESIDE.fullmatch(name):
            path = directory / name
            if path.is_dir() and not path.is_symlink():
                if not is_abandoned(path):
                    continue
                remove_tree(path)
            elif plain:
                path.unlink(missing_ok=True)
            else:
                continue
            removed.append(name)
    return removed


def publish_directory(new: Path, target: Path) -> None:
    """Give a finished directory its name for good: what is in it first, then the name.

    A directory that has the name already changes places with it, in one step.
    """
    sync_tree(new)
    if target.exists():
        exchange(new, target)
    else:
        os.rename(new, target)
    sync_directory(target.parent)


def exchange(one: Path, other: Path) -> None:
    """Let two names of one filesystem change places at once: rename(2), RENAME_EXCHANGE.

    Where the filesystem cannot do that, `other` goes away for a moment.

    Raises:
        OSError: both are as they were.
    """
    import ctypes  # only a replaced entry needs it

    libc = ctypes.CDLL(None, use_errno=True)
    rename = getattr(libc, "renameat2", None)  # glibc 2.28, musl 1.2.6
    number = errno.ENOSYS
    if rename is not None:
        at, names = ctypes.c_int(_AT_FDCWD), (os.fsencode(one), os.fsencode(other))
        if rename(at, names[0], at, names[1], ctypes.c_uint(_RENAME_EXCHANGE)) == 0:
            return
        number = ctypes.get_errno()
    if number not in (errno.ENOSYS, errno.EINVAL):
        raise OSError(number, os.strerror(number), str(other))
    aside = one.with_name(_name_beside(one))
    os.rename(other, aside)
    try:
        os.rename(one, other)
    except OSError:
        os.rename(aside, other)
        raise
    os.rename(aside, one)


def sync_file(path: Path) -> None:
    """Make a file's content and size durable, whoever wrote them."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as e:
        e.filename = str(path)
        raise
    finally:
        os.close(fd)


def sync_filesystem(fd: int) -> None:
    """Make everything durable that was written to the filesystem on which `fd` is: syncfs(2).

    For many files the cheapest way by far; a few are better off with fsync, which waits for
    nobody else's. Where the C library has none, each filesystem gets its turn.

    Raises:
        OSError: something could not be written.
    """
    import ctypes  # only copies of directories need it

    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, "syncfs", None) is None:
        os.sync()
    elif libc.syncfs(ctypes.c_int(fd)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def sync_tree(directory: Path) -> None:
    """Make a directory of plain files and directories durable, with everything below it."""
    for place, _, names in os.walk(directory, topdown=False):
        for name in names:
            path = Path(place, name)
            if not path.is_symlink():
                sync_file(path)
        sync_directory(Path(place))


def sync_directory(path: Path) -> None:
    """Make renames and new names in this directory durable, where its filesystem can."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
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
            # A parent that is not ours may be closed to our eyes.
            with contextlib.suppress(PermissionError):
                sync_directory(path.parent)
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


def clone_whole(source: Path, target: Path, *, mode: int = 0o600) -> None:
    """As `clone`, but `target` appears when all of it is on disk, and not before.

    Raises:
        FileExistsError: `target` exists. OSError: disk full and the like; no part file is left.
    """
    if target.exists():
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    beside = target.with_name(_name_beside(target))
    try:
        clone(source, beside, mode=mode)
        sync_file(beside)
        os.rename(beside, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(beside)
        raise
    sync_directory(target.parent)


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


def aside(path: Path) -> Path:
    """Where `bound_file` moves the end of a file that has grown too long."""
    return path.with_name(f"{path.name}.1")


def bound_file(path: Path, *, most_bytes: int, kept_bytes: int) -> bool:
    """Empty a file that somebody appends to once it is longer than `most_bytes`; its end goes to
    `aside(path)`. Whether it did.

    The writer needs no notice: it has the file open for append. What it writes in the moment
    between the last look and the truncation is lost.
    """
    try:
        # A guest decides what is in it, never where it is.
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        size = os.fstat(fd).st_size
        if size <= most_bytes:
            return False
        tail = os.pread(fd, kept_bytes, size - kept_bytes)
        try:
            write_atomic(aside(path), tail + os.pread(fd, kept_bytes, size))
            os.ftruncate(fd, 0)
        except OSError as e:
            if e.errno != errno.ENOSPC:
                raise
            # On a full disk the room comes first.
            os.ftruncate(fd, 0)
            write_atomic(aside(path), tail)
        return True
    finally:
        os.close(fd)


def free_bytes(path: Path) -> int:
    """Bytes that this user may still write on the filesystem of `path`."""
    st = os.statvfs(path)
    return st.f_bavail * st.f_frsize


def remove_tree(path: Path) -> None:
    """Remove a directory of ours, without following links; absent is fine."""
    import shutil  # with its compressors, which a command line that removes nothing need not load

    while True:
        try:
            shutil.rmtree(path)
        except FileNotFoundError:
            # Of the whole, or of a part that somebody else removed in the same moment.
            if os.path.lexists(path):
                continue
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
