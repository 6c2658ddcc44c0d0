"""The part of a patch that is about large files, written without holding one of them in memory.

git's own `diff --binary` holds both sides and an index of one, eight times their size. Here a file
that was changed in place becomes a delta of what is equal at the same distance from its beginning
or end, any other one all of its content. Both files lie on disk; a pass reads them in pieces.

Source: git's diff.c (emit_binary_diff_body), apply.c (parse_binary), patch-delta.c; gitformat-pack,
"Deltified representation".
"""

from __future__ import annotations

import base64
import os
import subprocess
import zlib
from typing import TYPE_CHECKING, NamedTuple

from banger.workspace.git import end, failure
from banger.workspace.index import GITLINK, SYMLINK
from banger.workspace.names import format_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from banger.workspace.git import Git

LARGE_BYTES = 32 << 20
"""From here on git's way of making a binary patch costs more memory than a machine likes."""
APPLY_LIMIT = 1023 << 20
"""`git apply` reads no larger patch (apply.c, MAX_APPLY_SIZE)."""
_PIECE = 1 << 20
_BLOCK = 4096
_MOST_COPIED = 0xFFFF
_MOST_INSERTED = 127
_MOST_OFFSET = (1 << 32) - 1
_LINE = 52


class Change(NamedTuple):
    """One line of `diff-index --raw --no-renames`; the mode 0 is an absent file."""

    old_mode: int
    new_mode: int
    old: str
    new: str
    name: bytes


class _Op(NamedTuple):
    """Bytes of the result: copied from `at` of the old file, or inserted from `at` of the new."""

    copied: bool
    at: int
    size: int


def find_large(git: Git, tree: str) -> list[Change]:
    """Changes between a tree and the index that are about a large file. One that only has another
    name is left to git, which sees that by its id.

    Raises:
        BangerError: git failed.
    """
    doing = "comparing the guest's files"
    raw = git.run(
        "diff-index", "--cached", "-z", "--raw", "--no-renames", "--no-abbrev", tree, "--",
        doing=doing,
    ).split(b"\0")[:-1]  # fmt: skip
    changes = [_parse(raw[at], raw[at + 1]) for at in range(0, len(raw), 2)]
    files = [c for c in changes if {c.old_mode, c.new_mode}.isdisjoint((GITLINK, SYMLINK))]
    oids = sorted({o for c in files for o, m in ((c.old, c.old_mode), (c.new, c.new_mode)) if m})
    if not oids:
        return []
    asked = "".join(f"{oid}\n" for oid in oids).encode()
    answer = git.run("cat-file", "--batch-check=%(objectname) %(objectsize)", stdin=asked,
                     doing=doing).decode()  # fmt: skip
    sizes = {words[0]: words[1] for line in answer.splitlines() if len(words := line.split()) == 2}
    large = {o for o in oids if sizes.get(o, "").isdecimal() and int(sizes[o]) >= LARGE_BYTES}
    removed = {c.old for c in files if not c.new_mode}
    added = {c.new for c in files if not c.old_mode}
    moved = removed & added
    return [c for c in files if {c.old, c.new} & large and not {c.old, c.new} & moved]


def _parse(line: bytes, name: bytes) -> Change:
    old_mode, new_mode, old, new, _ = line.decode().removeprefix(":").split()
    return Change(int(old_mode, 8), int(new_mode, 8), old, new, name)


def write_large(
    git: Git, directory: Path, changes: Iterable[Change], out: Callable[[bytes], object]
) -> int:
    """Write the patches of some changes; returns their bytes. `directory` takes both sides of one
    change at a time.

    Raises:
        BangerError: git failed.
    """
    written = 0

    def write(data: bytes) -> None:
        nonlocal written
        out(data)
        written += len(data)

    sides = directory / "old.blob", directory / "new.blob"
    for change in changes:
        write(_header(change))
        if change.old == change.new:
            continue
        for path, oid, mode in zip(sides, change[2:4], change[:2], strict=True):
            _fetch(git, oid if mode else None, path)
        with sides[0].open("rb") as old, sides[1].open("rb") as new:
            _write_binary(old.fileno(), new.fileno(), write)
    for path in sides:
        path.unlink(missing_ok=True)
    return written


def _header(change: Change) -> bytes:
    old, new = (format_name(side + change.name) for side in (b"a/", b"b/"))
    lines = [f"diff --git {old} {new}"]
    mode = ""
    if not change.old_mode:
        lines.append(f"new file mode {change.new_mode:o}")
    elif not change.new_mode:
        lines.append(f"deleted file mode {change.old_mode:o}")
    elif change.old_mode != change.new_mode:
        lines += [f"old mode {change.old_mode:o}", f"new mode {change.new_mode:o}"]
    else:
        mode = f" {change.old_mode:o}"
    if change.old != change.new:
        lines += [f"index {change.old}..{change.new}{mode}", "GIT binary patch"]
    return "".join(f"{line}\n" for line in lines).encode()


def _fetch(git: Git, oid: str | None, target: Path) -> None:
    """A blob as a file; an empty one for none. git streams what is not a delta."""
    with target.open("wb") as file:
        if oid is None:
            return
        p = git.popen(
            "-c", f"core.bigFileThreshold={LARGE_BYTES}", "cat-file", "blob", oid,
            stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.PIPE,
        )  # fmt: skip
        try:
            _, words = p.communicate()
        finally:
            end(p)
    if p.returncode != 0:
        raise failure("writing the patch", words, p.returncode)


def _write_binary(old: int, new: int, write: Callable[[bytes], object]) -> None:
    """One hunk, from the old file to the new one, and the empty line behind it."""
    old_size, new_size = os.fstat(old).st_size, os.fstat(new).st_size
    ops = list(_find_ops(old, old_size, new, new_size)) if old_size <= _MOST_OFFSET else []
    head = _varint(old_size) + _varint(new_size)
    size = len(head) + sum(_encoded_size(op) for op in ops)
    if ops and size < new_size:
        write(b"delta %d\n" % size)
        _write_lines(_delta(head, ops, new), write)
    else:
        write(b"literal %d\n" % new_size)
        _write_lines(_pieces(new, 0, new_size), write)
    write(b"\n")


def _write_lines(pieces: Iterable[bytes], write: Callable[[bytes], object]) -> None:
    """Deflated, in lines of 52 bytes in base 85, the first letter of which is their length."""
    deflate = zlib.compressobj(1)
    held = b""
    for piece in pieces:
        held += deflate.compress(piece)
        whole = len(held) - len(held) % _LINE
        if whole:
            write(b"".join(_line(held[at : at + _LINE]) for at in range(0, whole, _LINE)))
            held = held[whole:]
    held += deflate.flush()
    write(b"".join(_line(held[at : at + _LINE]) for at in range(0, len(held), _LINE)))


def _line(data: bytes) -> bytes:
    count = len(data)
    letter = ord("A") + count - 1 if count <= 26 else ord("a") + count - 27
    return bytes([letter]) + base64.b85encode(data, pad=True) + b"\n"


def _find_ops(old: int, old_size: int, new: int, new_size: int) -> Iterator[_Op]:
    """How the new file comes of the old one."""
    most = min(old_size, new_size)
    first = _count_equal(old, new, most, lambda done, n: (done, done, n))
    last = _count_equal(
        old, new, most - first, lambda done, n: (old_size - done - n, new_size - done - n, n),
        backwards=True,
    )  # fmt: skip
    if first:
        yield _Op(True, 0, first)
    middle = new_size - first - last
    if middle and old_size == new_size:
        yield from _find_equal_blocks(old, new, first, first + middle)
    elif middle:
        yield _Op(False, first, middle)
    if last:
        yield _Op(True, old_size - last, last)


def _count_equal(
    old: int,
    new: int,
    most: int,
    place: Callable[[int, int], tuple[int, int, int]],
    *,
    backwards: bool = False,
) -> int:
    """How many bytes are equal from an end on. `place` gives both offsets of the next piece."""
    done = 0
    while done < most:
        at_old, at_new, size = place(done, min(_PIECE, most - done))
        a, b = os.pread(old, size, at_old), os.pread(new, size, at_new)
        if a == b:
            done += size
            continue
        if backwards:
            a, b = a[::-1], b[::-1]
        low, high = 0, size  # the first `low` are equal, the first `high` are not
        while high - low > 1:
            middle = (low + high) // 2
            if a[:middle] == b[:middle]:
                low = middle
            else:
                high = middle
        return done + low
    return done


def _find_equal_blocks(old: int, new: int, start: int, stop: int) -> Iterator[_Op]:
    """The ranges of two files of one size in which they are equal, and those in which they are
    not."""
    run: _Op | None = None
    for at in range(start, stop, _PIECE):
        size = min(_PIECE, stop - at)
        a, b = os.pread(old, size, at), os.pread(new, size, at)
        step = size if a == b else _BLOCK
        for inside in range(0, size, step):
            count = min(step, size - inside)
            same = a[inside : inside + count] == b[inside : inside + count]
            if run is not None and run.copied == same:
                run = run._replace(size=run.size + count)
                continue
            if run is not None:
                yield run
            run = _Op(same, at + inside, count)
    if run is not None:
        yield run


def _encoded_size(op: _Op) -> int:
    if not op.copied:
        return op.size + -(-op.size // _MOST_INSERTED)
    full, rest = divmod(op.size, _MOST_COPIED)
    size = sum(len(_copy(op.at + n * _MOST_COPIED, _MOST_COPIED)) for n in range(full))
    return size + (len(_copy(op.at + full * _MOST_COPIED, rest)) if rest else 0)


def _delta(head: bytes, ops: Iterable[_Op], new: int) -> Iterator[bytes]:
    yield head
    for op in ops:
        if op.copied:
            for at in range(op.at, op.at + op.size, _MOST_COPIED):
                yield _copy(at, min(_MOST_COPIED, op.at + op.size - at))
            continue
        # Whole instructions in each piece.
        step = _MOST_INSERTED * (_PIECE // _MOST_INSERTED)
        for piece in _pieces(new, op.at, op.size, step):
            yield b"".join(
                bytes([len(part)]) + part
                for at in range(0, len(piece), _MOST_INSERTED)
                if (part := piece[at : at + _MOST_INSERTED])
            )


def _pieces(fd: int, at: int, size: int, step: int = _PIECE) -> Iterator[bytes]:
    for place in range(at, at + size, step):
        yield os.pread(fd, min(step, at + size - place), place)


def _copy(at: int, size: int) -> bytes:
    """The instruction to copy: which bytes of offset and size are not zero, and those."""
    which, numbers = 0x80, bytearray()
    for bit, byte in enumerate((*at.to_bytes(4, "little"), *size.to_bytes(3, "little"))):
        if byte:
            which |= 1 << bit
            numbers.append(byte)
    return bytes([which]) + bytes(numbers)


def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number >= 0x80:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*encoded, number])
