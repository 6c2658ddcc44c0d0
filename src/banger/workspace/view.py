"""A guest's working tree as git would see it, found without running anything in the guest.

What counts is what `git add --all` would take: tracked files, and untracked ones that no
`.gitignore` of the tree and no `info/exclude` leaves out. A `View` belongs to a `Ground`, in whose
`work` it puts the files that had to be fetched; it ends with it.
"""

from __future__ import annotations

import hashlib
import stat
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from banger.errors import BangerError
from banger.files import free_bytes
from banger.workspace.ground import is_storable
from banger.workspace.guest_git import absent, fetch_small, fetch_tracked
from banger.workspace.index import EXECUTABLE, GITLINK, REGULAR, SYMLINK
from banger.workspace.landing import Landing
from banger.workspace.names import MAX_DEPTH, format_names
from banger.workspace.tar_reader import TarReader, split_name

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable
    from pathlib import Path

    from banger.progress import Reporter
    from banger.rpc.trees import Entry, GuestFiles
    from banger.workspace.ground import Ground
    from banger.workspace.manifest import Manifest

_RESERVE = 256 << 20
_EXCLUDE = b".git/info/exclude"

Tree = dict[bytes, tuple[int, str]]


class Content(NamedTuple):
    """What a file is, byte for byte: git's mode, and the id of its bytes as a blob."""

    mode: int
    oid: bytes


class View(NamedTuple):
    """`files` are those that count, `skipped` the tracked ones that are left out on purpose.

    `nested` are the repositories inside, `ignored` the names that do not count.
    """

    scan: dict[bytes, Entry]
    files: dict[bytes, Entry]
    skipped: frozenset[bytes]
    nested: frozenset[bytes]
    ignored: frozenset[bytes]

    def is_nested(self, name: bytes) -> bool:
        """Whether a name is in, or is, a repository inside the workspace."""
        return name in self.nested or any(d in self.nested for d in directories(name))


def directories(name: bytes) -> Iterable[bytes]:
    """The directories above a name, the nearest first."""
    while b"/" in name:
        name = name.rpartition(b"/")[0]
        yield name


def git_mode(st_mode: int) -> int:
    """The mode that git gives to a file or a link."""
    if stat.S_ISLNK(st_mode):
        return SYMLINK
    return EXECUTABLE if st_mode & stat.S_IXUSR else REGULAR


def look(
    guest: GuestFiles,
    path: str,
    ground: Ground,
    base: Tree,
    *,
    object_format: str,
    also: Collection[bytes] = (),
    report: Reporter,
) -> View:
    """List the guest's tree and decide which of its files count. `base` is what is tracked anyway;
    `also` are names about which `ignored` shall tell, there or not.

    Raises:
        BangerError: not_found: nothing is at `path`; what the guest says is malformed.
    """
    scan = guest.scan(path)
    if scan is None:
        raise absent(path)
    tracked = fetch_tracked(guest, path, object_format)
    links = {name for name, (mode, _) in base.items() if mode == GITLINK}
    known = tracked.names | (base.keys() - links)
    nested = links | _find_nested(scan, known)
    view = View(scan, {}, frozenset(), frozenset(nested), frozenset())
    candidates, odd = {}, []
    for name, entry in scan.items():
        if not (stat.S_ISREG(entry.mode) or stat.S_ISLNK(entry.mode)):
            continue
        if name.count(b"/") >= MAX_DEPTH or not is_storable(name):
            if name != b".git":
                odd.append(name)
        elif not nested or name in links or not view.is_nested(name):
            candidates[name] = entry
    if odd:
        report.warn(f"left out, since git cannot hold files of these names: {format_names(odd)}")
    untracked = [n for n in (*candidates, *also) if n not in known and not view.is_nested(n)]
    ignored = _find_ignored(guest, path, ground, candidates, untracked)
    skipped = tracked.skipped | {
        name for name in base if any(name.startswith(d) for d in tracked.skipped_directories)
    }
    return view._replace(
        files={n: e for n, e in candidates.items() if n not in ignored},
        skipped=frozenset(skipped),
        ignored=frozenset(ignored),
    )


def _find_nested(scan: dict[bytes, Entry], known: Collection[bytes]) -> set[bytes]:
    """Directories that are repositories of their own: they hold a `.git`, and no tracked file."""
    roots = {n[:-5] for n in scan if n.endswith(b"/.git")}
    if roots:
        for name in known:
            roots.difference_update(directories(name))
    return roots


def _find_ignored(
    guest: GuestFiles,
    path: str,
    ground: Ground,
    candidates: dict[bytes, Entry],
    untracked: list[bytes],
) -> set[bytes]:
    if not untracked:
        return set()
    rules = [
        n
        for n, e in candidates.items()
        if (n == b".gitignore" or n.endswith(b"/.gitignore")) and stat.S_ISREG(e.mode)
    ]
    texts = fetch_small(guest, path, [*rules, _EXCLUDE])
    (ground.git_dir / "info/exclude").write_bytes(texts.pop(_EXCLUDE, b""))
    doing = f"fetching files of {path} from the guest"
    with Landing(ground.work, doing) as landing:
        for name, text in texts.items():
            if name in candidates:
                read = _reading(text)
                landing.file(split_name(name, doing), len(text), read, mode=0o644)
    return ground.find_ignored(untracked)


def _reading(text: bytes) -> Callable[[int], bytes]:
    position = 0

    def read(most: int) -> bytes:
        nonlocal position
        piece = text[position : position + most]
        position += len(piece)
        return piece

    return read


def fetch(
    guest: GuestFiles,
    path: str,
    names: dict[bytes, Entry],
    target: Path,
    *,
    object_format: str,
    report: Reporter,
) -> dict[bytes, Content]:
    """Copy some files of the guest below `target` and say what they are. Those that have gone
    meanwhile, or have become something else than a file or a link, are missing in the result.

    Raises:
        BangerError: they do not fit on this host; the guest sends something else.
    """
    doing = f"fetching files of {path} from the guest"
    if not names:
        return {}
    wanted = sum(e.size for e in names.values())
    budget = free_bytes(target) - _RESERVE
    if wanted > budget:
        raise BangerError(
            "operation_failed",
            f"{doing}: {wanted >> 20} MiB do not fit on this host",
            hint=f"df -h {target}",
            reason="disk_full",
        )
    new = hashlib.sha256 if object_format == "sha256" else hashlib.sha1

    def receive(stream: BinaryIO) -> dict[bytes, Content]:
        nonlocal budget
        found: dict[bytes, Content] = {}
        reader = TarReader(stream, doing)
        with Landing(target, doing) as landing:
            for member in reader:
                if member.kind == "directory":
                    continue  # it was a file when it was listed
                if member.name not in names or member.name in found:
                    raise BangerError("operation_failed", f"{doing}: a file that was not asked for")
                budget -= member.size + 4096
                if budget < 0:
                    raise BangerError("operation_failed", f"{doing}: no space on this host")
                parts = split_name(member.name, doing)
                if member.kind == "file":
                    hashed = new(b"blob %d\0" % member.size, usedforsecurity=False)

                    def read(most: int, hashed: hashlib._Hash = hashed) -> bytes:
                        chunk = reader.read(most)
                        hashed.update(chunk)
                        return chunk

                    landing.file(parts, member.size, read, mode=member.mode | 0o600)
                    mode = EXECUTABLE if member.mode & stat.S_IXUSR else REGULAR
                elif member.kind == "symlink":
                    hashed = new(b"blob %d\0" % len(member.link), usedforsecurity=False)
                    hashed.update(member.link)
                    landing.symlink(parts, member.link)
                    mode = SYMLINK
                else:
                    continue
                found[member.name] = Content(mode, hashed.digest())
                if len(found) % 500 == 0:
                    report.advance(len(found), len(names))
        return found

    return guest.get(path, sorted(names), receive)


def warn_of_nested(view: View, manifest: Manifest | None, report: Reporter) -> None:
    """Name the repositories inside the workspace whose files differ from those that were put
    there: they are not exported."""
    files = manifest.files if manifest is not None else {}
    changed = set()
    for name, entry in view.scan.items():
        if stat.S_ISDIR(entry.mode) or name.endswith(b"/.git"):
            continue
        root = next((d for d in (name, *directories(name)) if d in view.nested), None)
        if root is not None:
            file = files.get(name)
            if file is None or not file.is_untouched(entry):
                changed.add(root)
    for name in files.keys() - view.scan.keys():
        changed.update(d for d in directories(name) if d in view.nested)
    if changed:
        report.warn(
            "not exported, since they are repositories of their own: "
            f"{format_names(sorted(changed))}"
        )
