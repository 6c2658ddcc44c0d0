"""Brings a workspace in a guest up to date: sends what differs, loses nothing that was done there.

Three states are compared, file by file: what was shipped (the manifest), what the guest has now,
what the source has now. Files that nobody touched are known by their times on both sides, so the
work follows what has changed. What the guest changed is kept out of the way of nothing: it must be
what the source has now as well, else the update is refused.
"""

from __future__ import annotations

import os
import re
import shlex
import stat
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, BinaryIO

import msgspec

from banger.errors import BangerError
from banger.workspace.files import is_shippable, select, tar_mode
from banger.workspace.git_directory import format_refs, plan_git, prepared
from banger.workspace.guest_git import fetch_refs
from banger.workspace.index import EXECUTABLE, REGULAR, SYMLINK
from banger.workspace.manifest import ShippedFile, tree_id
from banger.workspace.names import format_names
from banger.workspace.options import DIRECTORY, Candidate, HostStat, PackedFile
from banger.workspace.pack import Shipping, host_stat
from banger.workspace.prepare import Prepared, build_manifest, check_received, in_the_way, shipped
from banger.workspace.scratch import Scratch, open_scratch
from banger.workspace.stand_ins import find_stand_ins
from banger.workspace.tar import TarWriter
from banger.workspace.tree_id import TreeHasher
from banger.workspace.view import Content, directories, fetch
from banger.workspace.worktree import WorkTree

if TYPE_CHECKING:
    from collections.abc import Mapping
    from concurrent.futures import Future

    from banger.rpc.trees import Entry, Record
    from banger.workspace.guest_git import GuestRefs
    from banger.workspace.manifest import Manifest
    from banger.workspace.options import GitPlan, Selection
    from banger.workspace.prepare import Preparation

_CHUNK = 1 << 20
_REF = re.compile(r"refs/[^\x00-\x20\x7f~^:?*\[\\]+")
_OVERWRITTEN = "refs/banger/overwritten"

Known = dict[bytes, ShippedFile]


def bring_up_to_date(
    what: Preparation, scanning: Future[dict[bytes, Entry] | None]
) -> Prepared | None:
    """Send what has changed since the manifest. `scanning` gives what lies at the guest path now;
    when nothing does, nothing is done, and None comes back.

    Raises:
        BangerError: already_exists: it is a workspace of another source; operation_failed, reason
            changed_in_guest: something would be lost, and `force` is not set.
    """
    manifest = what.manifest
    assert manifest is not None
    if manifest.workspace.source != str(what.repository.root):
        if scanning.result() is None:
            return None
        raise in_the_way(what.guest_path)
    with open_scratch(what.repository, what.scratch) as scratch:
        selection = select(scratch, what.options)
        plan = plan_git(scratch, selection, what.options)
        wanted = _survey(scratch, selection, manifest)
        scan = scanning.result()
        if scan is None:
            return None
        refs = fetch_refs(what.guest, what.guest_path)
        known = _find_known(what, manifest, wanted, scan, scratch)
        lost = _find_lost(manifest, wanted, known, scan)
        moved = _find_moved(manifest, plan, refs, scratch)
        if (lost or moved) and not what.force:
            raise _refusal(what, lost, moved)
        update = _Update(what, scratch, selection, plan, refs, known, scan, moved=bool(moved))
        return update.send(wanted)


def recognise(what: Preparation) -> Prepared | None:
    """What lies at the guest path taken for the workspace, when it holds exactly what would be put
    there, and nothing else; None when it does not. So is found what a preparation has put that was
    cut off before the host could record it.

    Raises:
        BangerError: the guest's own error, or of the repository.
    """
    with open_scratch(what.repository, what.scratch) as scratch:
        selection = select(scratch, what.options)
        plan = plan_git(scratch, selection, what.options)
        branch = what.options.branch or what.repository.branch
        nothing = build_manifest(what, plan, selection, {}, tree=None, branch=branch)
        wanted = _survey(scratch, selection, nothing)
        scan = what.guest.scan(what.guest_path)
        if scan is None or wanted.keys() != {n for n, entry in scan.items() if not _is_dir(entry)}:
            return None
        refs = fetch_refs(what.guest, what.guest_path)
        if (refs.head, refs.refs) != (plan.head, plan.refs):
            return None
        known = _find_known(what, nothing, wanted, scan, scratch)
        if any(known[n][:2] != (want.mode, want.oid) for n, want in wanted.items()):
            return None
        what = replace(what, manifest=nothing)
        return _Update(what, scratch, selection, plan, refs, known, scan, moved=False).send(wanted)


def _survey(scratch: Scratch, selection: Selection, manifest: Manifest) -> dict[bytes, PackedFile]:
    """What the source has now. Content is read only where times have changed."""
    trust = scratch.repository.setting("core.filemode") != "false"
    found = {}
    with WorkTree(scratch.repository.root) as tree:
        for candidate in selection.candidates:
            name, git_mode, oid = candidate
            if git_mode == DIRECTORY:
                continue
            if oid is not None:
                mode = (
                    git_mode
                    if git_mode == SYMLINK
                    else _git_mode(tar_mode(git_mode, 0, trust_disk=False))
                )
                found[name] = PackedFile(name, mode, bytes.fromhex(oid), 0, None)
                continue
            st = tree.find(name)
            if st is None or not is_shippable(st.st_mode):
                continue
            mode = SYMLINK
            if stat.S_ISREG(st.st_mode):
                mode = _git_mode(tar_mode(git_mode, st.st_mode, trust_disk=trust))
            old = manifest.files.get(name)
            now = HostStat(st.st_ino, st.st_size, st.st_mtime_ns, st.st_ctime_ns)
            if old is not None and old.host == now and (old.mode == SYMLINK) == (mode == SYMLINK):
                found[name] = PackedFile(name, mode, old.oid, old.size, now)
                continue
            seen = _read(tree, name, mode, scratch.repository.object_format)
            if seen is not None:
                found[name] = seen
    return found


def _git_mode(tar: int) -> int:
    return EXECUTABLE if tar & 0o100 else REGULAR


def _read(tree: WorkTree, name: bytes, mode: int, object_format: str) -> PackedFile | None:
    hasher = TreeHasher(object_format)
    if mode == SYMLINK:
        target = tree.read_link(name)
        if target is None:
            return None
        hashed = hasher.begin_blob(len(target))
        hashed.update(target)
        return PackedFile(name, mode, hashed.digest(), len(target), None)
    fd = tree.open(name)
    if fd is None:
        return None
    try:
        st = os.fstat(fd)
        if not stat.S_ISREG(st.st_mode):
            return None
        hashed = hasher.begin_blob(st.st_size)
        size = 0
        while chunk := os.read(fd, _CHUNK):
            hashed.update(chunk)
            size += len(chunk)
        kept = host_stat(st) if size == st.st_size else None
        return PackedFile(name, mode, hashed.digest(), size, kept)
    finally:
        os.close(fd)


def _find_known(
    what: Preparation,
    manifest: Manifest,
    wanted: Mapping[bytes, PackedFile],
    scan: Mapping[bytes, Entry],
    scratch: Scratch,
) -> Known:
    """The guest's files that matter, with their content: those that were shipped, and those that
    stand where something is to go."""
    known, touched = {}, {}
    for name in (*manifest.files, *(wanted.keys() - manifest.files.keys())):
        entry, file = scan.get(name), manifest.files.get(name)
        if entry is None or not is_shippable(entry.mode):
            continue
        if file is not None and file.is_untouched(entry):
            known[name] = file
        else:
            touched[name] = entry
    place = scratch.directory / "touched"
    place.mkdir()
    contents = fetch(
        what.guest, what.guest_path, touched, place,
        object_format=manifest.object_format, report=what.report,
    )  # fmt: skip
    for name, content in contents.items():
        file, entry = manifest.files.get(name), touched[name]
        if file is not None and Content(file.mode, file.oid) == content:
            known[name] = file._replace(guest=entry.record, size=entry.size)
        else:
            known[name] = ShippedFile(
                content.mode, content.oid, entry.size, None, None, entry.record
            )
    return known


def _find_lost(
    manifest: Manifest,
    wanted: Mapping[bytes, PackedFile],
    known: Known,
    scan: Mapping[bytes, Entry],
) -> list[bytes]:
    """What the guest has done that the update would undo."""
    lost = set()
    for name, file in manifest.files.items():
        now, want = known.get(name), wanted.get(name)
        if now is not None and now[:2] == file[:2]:
            continue
        if now is None and want is None and name not in scan:
            continue
        if now is None or want is None or now[:2] != (want.mode, want.oid):
            lost.add(name)
    above = {d for n in scan for d in directories(n)} if wanted else set()
    for name, want in wanted.items():
        if name in manifest.files:
            continue
        now = known.get(name)
        if now is not None and now[:2] != (want.mode, want.oid):
            lost.add(name)
        elif name in above:
            # A directory gives way when all that is in it was shipped and goes; nobody has looked
            # into a `.git`, which may hold commits.
            inside = [
                n
                for n in scan
                if n.startswith(name + b"/") and (not _is_dir(scan[n]) or n.endswith(b"/.git"))
            ]
            lost.update(n for n in inside if n not in manifest.files)
        for directory in directories(name):
            entry = scan.get(directory)
            if entry is not None and not _is_dir(entry) and directory not in manifest.files:
                lost.add(directory)
    return sorted(lost)


def _is_dir(entry: Entry) -> bool:
    return stat.S_ISDIR(entry.mode)


def _find_moved(manifest: Manifest, plan: GitPlan, refs: GuestRefs, scratch: Scratch) -> list[str]:
    """What of the guest's HEAD and branches the update would take back. A commit that the source
    has as well cannot be lost."""
    moved = [] if refs.head in (manifest.head, plan.head) else ["HEAD"]
    for ref in sorted(manifest.refs.keys() | plan.refs.keys()):
        oid = refs.refs.get(ref)
        if oid is None or oid in (manifest.refs.get(ref), plan.refs.get(ref)):
            continue
        if scratch.git.try_run("cat-file", "-e", oid).returncode != 0:
            moved.append(ref)
    return moved


def _refusal(what: Preparation, lost: list[bytes], moved: list[str]) -> BangerError:
    names = ", ".join(ref.removeprefix("refs/heads/") for ref in moved[:5])
    parts = [f"commits on {names}"] if moved else []
    if lost:
        parts.append(format_names(lost))
    return BangerError(
        "operation_failed",
        f"{what.guest_path} was changed in the guest since it was prepared: {'; '.join(parts)}",
        hint="banger vm workspace diff VM; to overwrite it: banger vm workspace prepare VM "
        f"{shlex.quote(str(what.repository.root))} --force",
        reason="changed_in_guest",
    )


class _Update:
    """One stream of changes. Lives as long as the call."""

    def __init__(
        self,
        what: Preparation,
        scratch: Scratch,
        selection: Selection,
        plan: GitPlan,
        refs: GuestRefs,
        known: Known,
        scan: Mapping[bytes, Entry],
        *,
        moved: bool,
    ) -> None:
        assert what.manifest is not None
        self.what, self.scratch, self.selection, self.plan = what, scratch, selection, plan
        self.manifest, self.refs, self.known, self.scan = what.manifest, refs, known, scan
        self.moved = moved
        self.options = what.options

    def send(self, wanted: dict[bytes, PackedFile]) -> Prepared:
        everything = self.options.readonly != self.manifest.workspace.readonly
        differing = {
            name
            for name, want in wanted.items()
            if everything
            or (now := self.known.get(name)) is None
            or now[:2] != (want.mode, want.oid)
        }
        gone = [n for n in self.manifest.files if n not in wanted and n in self.scan]
        candidates = tuple(c for c in self.selection.candidates if self._goes(c, differing))
        git = self._git_differs()
        files: Known = {}
        sent: dict[bytes, PackedFile] = {}
        records: dict[bytes, Record] = {}
        if candidates or gone or git:
            sent, records = self._put(candidates, gone, git=git)
        for name, want in wanted.items():
            if name in sent:
                files[name] = shipped(sent[name], records.get(name), {})
            elif name not in differing:
                files[name] = self.known[name]._replace(host=want.host)
        files.update((n, shipped(f, records.get(n), {})) for n, f in sent.items())
        files = self._with_stand_ins(files, sent)
        tree = tree_id(files, self.manifest.object_format)
        branch = self.options.branch or self.what.repository.branch
        manifest = build_manifest(
            self.what, self.plan, self.selection, files,
            tree=None if self.options.mode == "full_copy" else tree, branch=branch,
        )  # fmt: skip
        size = sum(f.size for f in files.values() if f.mode != SYMLINK)
        return Prepared(manifest, len(files), size, len(sent))

    def _goes(self, candidate: Candidate, differing: set[bytes]) -> bool:
        if candidate.mode == DIRECTORY:
            return candidate.name not in self.scan
        return candidate.name in differing

    def _git_differs(self) -> bool:
        """Whether anything of `.git` has to go. The index of a full copy may always be another."""
        old = self.manifest
        return (
            self.moved
            or self.options.mode == "full_copy"
            or self.plan.texts != old.texts
            or self.plan.refs != {r: self.refs.refs.get(r) for r in self.plan.refs}
            or self.refs.head != self.plan.head
            or self.selection.target != old.workspace.base_commit
            or set(self.selection.skip_worktree) != set(old.skip_worktree)
            or set(self.selection.assume_unchanged) != set(old.assume_unchanged)
        )

    def _put(
        self, candidates: tuple[Candidate, ...], gone: list[bytes], *, git: bool
    ) -> tuple[dict[bytes, PackedFile], dict[bytes, Record]]:
        what = self.what
        selection = msgspec.structs.replace(self.selection, candidates=candidates)

        def write(out: BinaryIO) -> Shipping:
            with ExitStack() as stack:
                shipping = Shipping(
                    self.scratch, selection, TarWriter(out), lambda: what.guest.cancelled,
                    what.report,
                )  # fmt: skip
                plan = self._guest_plan()
                emit = None
                if git:
                    have = () if self.moved else self._find_common()
                    emit = stack.enter_context(
                        prepared(self.scratch, selection, self.options, plan, have=have)
                    )
                for name in gone:
                    shipping.tar.whiteout(name)
                shipping.tar.read_only = self.options.readonly
                if self.options.readonly != self.manifest.workspace.readonly:
                    shipping.tar.root(mtime=shipping.now)
                shipping.ship_files()
                shipping.tar.read_only = False
                if emit is not None:
                    for text in self.manifest.texts.keys() - plan.texts.keys():
                        shipping.tar.whiteout(b".git/" + text)
                    for ref in sorted(self.refs.loose & plan.refs.keys()):
                        shipping.tar.whiteout(b".git/" + os.fsencode(ref))
                    emit(shipping.tar, b".git", shipping.cancelled)
                    shipping.ship_nested(what.scratch)
                shipping.tar.finish()
            return shipping

        shipping, received, records = what.guest.put(what.guest_path, write, mode="update")
        check_received(what, shipping.tar.files, shipping.tar.content_bytes, received)
        return (
            {f.name: f for f in shipping.packed},
            dict(zip(shipping.tar.names, records, strict=True)),
        )

    def _guest_plan(self) -> GitPlan:
        """The plan for this guest: its own branches stay, and its history ends where it ended."""
        refs = {ref: oid for ref, oid in self.refs.refs.items() if _REF.fullmatch(ref)}
        if self.moved and self.refs.commit is not None:
            refs[_OVERWRITTEN] = self.refs.commit
        texts = {**self.plan.texts, b"packed-refs": format_refs({**refs, **self.plan.refs})}
        boundary = tuple(sorted({*self.plan.boundary, *self.manifest.boundary}))
        return msgspec.structs.replace(self.plan, texts=texts, boundary=boundary)

    def _find_common(self) -> tuple[str, ...]:
        """The commits that were shipped before and are still here."""
        git = self.scratch.git
        return tuple(
            oid for oid in self.manifest.tips if git.try_run("cat-file", "-e", oid).returncode == 0
        )

    def _with_stand_ins(self, files: Known, sent: Mapping[bytes, PackedFile]) -> Known:
        same = self.selection.target == self.manifest.workspace.base_commit
        asked = {n: f.oid for n, f in files.items() if not same or n in sent}
        tree = None if same else tree_id(files, self.manifest.object_format)
        found = find_stand_ins(self.scratch, self.selection.target, asked, tree=tree)
        for name in asked:
            if files[name].stands_for != found.get(name):
                files[name] = files[name]._replace(stands_for=found.get(name))
        return files
