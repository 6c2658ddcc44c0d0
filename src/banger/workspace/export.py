"""What was done in a guest, as a patch, as a tar, as commits, or as a list of changed files.

Nothing is changed in the guest, and its git is asked only for commits that this host does not have.
The files are compared on the host, in a `Ground`. Everything here blocks; the guest is reached
through `GuestFiles`, whose `cancel` ends the call.
"""

from __future__ import annotations

import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import msgspec

from banger.errors import BangerError
from banger.faults import step
from banger.workspace.git import failure
from banger.workspace.ground import GUEST_GIT, Ground, no_git, open_ground
from banger.workspace.guest_git import fetch_refs
from banger.workspace.index import GITLINK, REGULAR, SYMLINK
from banger.workspace.large_patch import APPLY_LIMIT
from banger.workspace.manifest import Manifest, ShippedFile
from banger.workspace.names import format_name
from banger.workspace.tar import TarWriter
from banger.workspace.tar_reader import TarReader
from banger.workspace.view import (
    Content,
    View,
    directories,
    fetch,
    git_mode,
    look,
    warn_of_nested,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from contextlib import AbstractContextManager
    from pathlib import Path

    from banger.progress import Reporter
    from banger.rpc.trees import Entry, GuestFiles
    from banger.workspace.repository import Repository
    from banger.workspace.view import Tree

_SHOWN = 500


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where an export comes from. `repository` is the host's, None when it is not there any more or
    nothing was ever prepared at `path`; `base_commit` what the caller asked for."""

    guest: GuestFiles
    path: str
    repository: Repository | None
    manifest: Manifest | None
    base_commit: str | None
    scratch: Path
    report: Reporter

    @property
    def object_format(self) -> str:
        if self.manifest is not None:
            return self.manifest.object_format
        return self.repository.object_format if self.repository is not None else "sha1"


class Exported(NamedTuple):
    """`names` are the first of the `changed` ones as they are printed, with their status letter."""

    base_commit: str | None
    changed: int
    names: tuple[str, ...]
    byte_count: int


class Change(NamedTuple):
    """One file that is not what was shipped; None: absent."""

    name: bytes
    before: Content | None
    after: Content | None


def export_patch(source: Source, out: Callable[[bytes], object]) -> Exported:
    """Write the patch from the base to the guest's working tree; nothing when they are equal.

    Raises:
        BangerError: not_found: no such directory; the base is unknown; see `look`, `fetch`.
    """
    with open_source_ground(source) as ground:
        base, tree = find_base(source, ground)
        files = ground.read_tree(tree)
        with step("export.compare"):
            view = _look(source, ground, files)
            _record(source, ground, files, view)
            changed = ground.changed_names(tree)
        with step("export.write"):
            size = ground.write_patch(tree, out)
        if size > APPLY_LIMIT:
            source.report.warn(
                f"the patch has {size >> 20} MiB, and git apply takes {APPLY_LIMIT >> 20}: "
                "use `banger vm workspace apply`, or --format tar"
            )
    return Exported(base, len(changed), _shown(changed), size)


def export_tar(source: Source, out: BinaryIO) -> Exported:
    """Write the guest's working tree, without `.git` and what git ignores, as one tar whose files
    are 0644 or 0755 and belong to nobody. Raises as `export_patch`."""
    doing = f"fetching files of {source.path} from the guest"
    with open_source_ground(source) as ground:
        base, tree = find_base(source, ground)
        view = _look(source, ground, ground.read_tree(tree))
        writer = TarWriter(out)

        def receive(stream: BinaryIO) -> None:
            reader = TarReader(stream, doing)
            for member in reader:
                if member.name not in view.files:
                    if member.kind == "directory":
                        continue
                    raise BangerError("operation_failed", f"{doing}: a file that was not asked for")
                if any(above in view.files for above in directories(member.name)):
                    # Whoever unpacks it would follow the file above, should that be a link.
                    raise BangerError("operation_failed", f"{doing}: a file below a file")
                directory = member.name.rpartition(b"/")[0]
                if directory:
                    writer.directory(directory, mtime=member.mtime)
                if member.kind == "symlink":
                    writer.symlink(member.name, member.link, mtime=member.mtime)
                elif member.kind == "file":
                    mode = 0o755 if member.mode & stat.S_IXUSR else 0o644
                    missing = writer.stream(
                        member.name, member.size, reader.read, mode=mode, mtime=member.mtime
                    )
                    if missing:
                        raise BangerError("operation_failed", f"{doing}: a file is cut")

        source.guest.get(source.path, sorted(view.files), receive)
        writer.finish()
    return Exported(base, writer.files, (), writer.content_bytes)


def export_commits(source: Source, out: Callable[[bytes], object]) -> Exported:
    """Write a bundle of the commits that HEAD has in the guest and the base does not; nothing when
    there are none. They are checked on the way: the bundle is made by this host's git.

    Raises:
        BangerError: there is no git in the guest; the base is not part of HEAD's history.
    """
    with open_source_ground(source) as ground:
        base, _ = find_base(source, ground)
        refs = fetch_refs(source.guest, source.path)
        head = refs.commit or _resolve(source, "HEAD")
        if head is None or head == base:
            return Exported(base, 0, (), 0)
        ground.fetch(source.guest, source.path, [head, *([f"^{base}"] if base else [])])
        branch = refs.head.removeprefix("ref: ")
        named = branch if branch.startswith("refs/heads/") else "HEAD"
        git = ground.git
        doing = f"bundling the commits of {source.path}"
        _check_builds_on(source, ground, head, base)
        span = [head, *([f"^{base}"] if base else [])]
        git.run("rev-list", "--objects", "--quiet", *span, "--", doing=doing)
        listed = git.run("log", "-z", "--format=%h %s", *span, "--", doing=doing)
        commits = [c for c in listed.split(b"\0") if c.strip()]
        if named != "HEAD":
            git.run("check-ref-format", named, doing=doing)
            git.run("update-ref", named, head, doing=doing)
            git.run("symbolic-ref", "HEAD", named, doing=doing)
        else:
            git.run("update-ref", "--no-deref", "HEAD", head, doing=doing)
        bundle = ground.directory / "bundle"
        done = git.try_run(
            "bundle", "create", "--quiet", str(bundle), "HEAD",
            *([named] if named != "HEAD" else []), *([f"^{base}"] if base else []),
        )  # fmt: skip
        if done.returncode != 0:
            raise failure(doing, done.stderr, done.returncode)
        size = 0
        with bundle.open("rb") as f:
            while chunk := f.read(256 << 10):
                out(chunk)
                size += len(chunk)
    shown = tuple(format_name(c.rstrip(b"\n"))[:200] for c in commits[:_SHOWN])
    return Exported(base, len(commits), shown, size)


def find_changes(source: Source, ground: Ground) -> tuple[list[Change], Manifest]:
    """What is not as it was shipped, by name; the new files lie in `ground.work`. And what may be
    remembered of the guest once the host has all of it.

    Raises:
        BangerError: nobody remembers what was shipped to `path`.
    """
    manifest = source.manifest
    if manifest is None:
        raise BangerError(
            "not_found",
            f"nothing is recorded of what was put at {source.path} in the guest",
            hint="banger vm workspace export VM -o changes.patch",
        )
    _, tree = _tree_of(source, ground, manifest.workspace.base_commit)
    files = ground.read_tree(tree)
    view = _look(source, ground, files, also=manifest.files.keys())
    wanted = {
        name: entry
        for name, entry in view.files.items()
        if (file := manifest.files.get(name)) is None or not file.is_untouched(entry)
    }
    now = _fetch(source, ground, wanted)
    changes = []
    for name, content in now.items():
        file = manifest.files.get(name)
        before = Content(file.mode, file.oid) if file is not None else None
        if before != content:
            changes.append(Change(name, before, content))
    for name, file in manifest.files.items():
        gone = name not in view.files and name not in view.ignored and name not in view.skipped
        if gone and not view.is_nested(name):
            changes.append(Change(name, Content(file.mode, file.oid), None))
    files_then = dict(manifest.files)
    for change in changes:
        files_then.pop(change.name, None)
        if change.after is not None:
            entry = view.files[change.name]
            files_then[change.name] = ShippedFile(
                change.after.mode, change.after.oid, entry.size, None, None, entry.record
            )
    return sorted(changes), msgspec.structs.replace(manifest, files=files_then)


def open_source_ground(source: Source) -> AbstractContextManager[Ground]:
    """The place in which the exports of this module compare."""
    return open_ground(source.scratch, source.repository, source.object_format)


def find_base(source: Source, ground: Ground) -> tuple[str | None, str]:
    """The commit to compare with (None: none, before the first), and its tree, which is here then.

    Raises:
        BangerError: bad_request: it names no commit that the host or the guest has.
    """
    asked = source.base_commit
    if asked is None and source.manifest is not None:
        return _tree_of(source, ground, source.manifest.workspace.base_commit)
    if asked is None or asked == "HEAD":
        commit = fetch_refs(source.guest, source.path).commit or _resolve(source, "HEAD")
        return _tree_of(source, ground, commit)
    if source.repository is not None:
        found = source.repository.git().try_run(
            "rev-parse", "--verify", "--quiet", "--end-of-options", f"{asked}^{{commit}}"
        )
        if found.returncode == 0:
            return _tree_of(source, ground, found.stdout.decode().strip())
    commit = _resolve(source, asked)
    if commit is None:
        raise BangerError(
            "bad_request",
            f"{asked!r} names no commit on this host or in {source.path} of the guest",
            hint="banger vm exec VM -- git log --oneline",
        )
    return _tree_of(source, ground, commit)


def _tree_of(source: Source, ground: Ground, commit: str | None) -> tuple[str | None, str]:
    if commit is None:
        return None, ground.empty_tree
    if not ground.has(commit):
        recorded = source.manifest.workspace.base_commit if source.manifest is not None else None
        known = recorded is not None and recorded != commit and ground.has(recorded)
        # Without anything in common only the one tree is needed, not its history.
        asked = [commit, f"^{recorded}"] if known else [f"{commit}^{{tree}}"]
        ground.fetch(source.guest, source.path, asked)
        if not known:
            status, tree = _ask(source, "rev-parse", f"{commit}^{{tree}}")
            if status != 0 or ground.git.try_run("cat-file", "-e", f"{tree}^{{tree}}").returncode:
                raise BangerError("operation_failed", f"the guest has no tree of {commit}")
            return commit, tree
    if not ground.has(commit):
        raise BangerError("operation_failed", f"the guest did not send the commit {commit}")
    doing = f"finding the tree of {commit}"
    return commit, ground.git.run("rev-parse", f"{commit}^{{tree}}", doing=doing).decode().strip()


def _resolve(source: Source, name: str) -> str | None:
    """The commit of a name in the guest's repository, by its git; None when there is none."""
    if name.startswith("-"):
        return None
    status, oid = _ask(source, "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}")
    hexadecimal = len(oid) in (40, 64) and all(c in "0123456789abcdef" for c in oid)
    return oid if status == 0 and hexadecimal else None


def _ask(source: Source, *words: str) -> tuple[int, str]:
    answer = bytearray()

    def receive(chunk: bytes) -> None:
        answer.extend(chunk[: 4096 - len(answer)])

    status, _ = source.guest.run([*GUEST_GIT, *words], cwd=source.path, stdin=b"", out=receive)
    if status == 127:
        raise no_git(f"looking for commits of {source.path}")
    return status, answer.decode(errors="replace").strip()


def _check_builds_on(source: Source, ground: Ground, head: str, base: str | None) -> None:
    ancestor = ("merge-base", "--is-ancestor")
    if base is not None and ground.git.try_run(*ancestor, base, head).returncode != 0:
        raise BangerError(
            "operation_failed",
            f"HEAD of {source.path} in the guest does not build on the base {base[:12]}",
            hint="banger vm workspace export VM --format patch",
        )


def _look(source: Source, ground: Ground, files: Tree, *, also: Collection[bytes] = ()) -> View:
    if source.manifest is not None:
        attributes = source.manifest.texts.get(b"info/attributes")
        if attributes is not None:
            (ground.git_dir / "info/attributes").write_bytes(attributes)
    view = look(
        source.guest, source.path, ground, files,
        object_format=source.object_format, also=also, report=source.report,
    )  # fmt: skip
    warn_of_nested(view, source.manifest, source.report)
    return view


def _fetch(source: Source, ground: Ground, wanted: dict[bytes, Entry]) -> dict[bytes, Content]:
    return fetch(
        source.guest, source.path, wanted, ground.work,
        object_format=source.object_format, report=source.report,
    )  # fmt: skip


def _record(source: Source, ground: Ground, base: Tree, view: View) -> None:
    """Make the index of the ground what `git add --all` would make of the guest's tree."""
    shipped = source.manifest.files if source.manifest is not None else {}
    wanted = {}
    for name, entry in view.files.items():
        file, known = shipped.get(name), base.get(name)
        if (
            file is None
            or known is None
            or not file.is_untouched(entry)
            or not _same_mode(ground, git_mode(entry.mode), known[0])
            or known[1] not in (file.oid.hex(), (file.stands_for or b"").hex())
        ):
            wanted[name] = entry
    removed = [
        name
        for name, (mode, _) in base.items()
        if name not in view.files
        and name not in view.skipped
        and (mode != GITLINK or not _is_directory(view, name))
    ]
    found = _fetch(source, ground, wanted)
    gone = [name for name in wanted if name not in found and name in base]
    ground.record([*removed, *gone], found)


def _is_directory(view: View, name: bytes) -> bool:
    entry = view.scan.get(name)
    return entry is not None and stat.S_ISDIR(entry.mode)


def _same_mode(ground: Ground, mode: int, base: int) -> bool:
    """Without symbolic links on the host, a link is a file that holds its target."""
    return mode == base or (not ground.links and base == SYMLINK and mode == REGULAR)


def _shown(changed: list[tuple[str, bytes]]) -> tuple[str, ...]:
    return tuple(f"{letter} {format_name(name)}"[:300] for letter, name in changed[:_SHOWN])
