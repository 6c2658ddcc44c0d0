"""The `.git` that a guest gets: self-contained, and nothing in it from the source's configuration
but identity, origin and how files compare with blobs.

No hooks, filters, aliases, credentials or includes go along. Everything is packed from a `Scratch`.
"""

from __future__ import annotations

import os
import time
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from banger.errors import BangerError
from banger.workspace.git_files import find_start
from banger.workspace.history import find_boundary, read_shallow
from banger.workspace.objects import ObjectReader
from banger.workspace.options import GitPlan

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from banger.workspace.git import Git
    from banger.workspace.options import Selection, ShipOptions
    from banger.workspace.repository import Repository
    from banger.workspace.scratch import Scratch
    from banger.workspace.tar import TarWriter

_MAX_SMALL_FILE = 1 << 20
_INFO = ("exclude", "sparse-checkout", "attributes")
_UNFINISHED = (
    "MERGE_HEAD", "MERGE_MSG", "MERGE_MODE", "CHERRY_PICK_HEAD", "REVERT_HEAD", "SQUASH_MSG",
)  # fmt: skip


def plan_git(scratch: Scratch, selection: Selection, options: ShipOptions) -> GitPlan:
    """Decide what the guest's `.git` will say; nothing is packed yet.

    Raises:
        BangerError: a commit of the history is missing.
    """
    repository = scratch.repository
    full = options.mode == "full_copy"
    refs = _list_refs(repository.git()) if full else _choose_refs(repository, selection, options)
    branch = _branch(repository, options)
    head = f"ref: refs/heads/{branch}" if branch else None
    if head is None:
        assert selection.target is not None
        head = selection.target
    tips = {oid for oid in (*refs.values(), selection.target, repository.head_commit) if oid}
    unfinished = _read_unfinished(repository) if full else {}
    already = read_shallow(repository.common_dir)
    if full:
        boundary = tuple(sorted(already))
        tips |= _commits_named(unfinished, repository)
    else:
        with ObjectReader(scratch.git) as reader:
            boundary = find_boundary(reader, sorted(tips), already)
    texts = {b"HEAD": f"{head}\n".encode(errors="surrogateescape")}
    texts[b"config"] = _format_config(repository, branch)
    texts[b"packed-refs"] = format_refs(refs)
    texts.update(_read_info(repository))
    texts.update(unfinished)
    return GitPlan(head=head, refs=refs, tips=tuple(sorted(tips)), boundary=boundary, texts=texts)


@contextmanager
def prepared(
    scratch: Scratch,
    selection: Selection,
    options: ShipOptions,
    plan: GitPlan,
    *,
    have: tuple[str, ...] = (),
) -> Iterator[Callable[[TarWriter, bytes, Callable[[], bool]], None]]:
    """Start making the guest's `.git`; packing runs while the caller ships files.

    Yields `emit(tar, name, cancelled)`, which waits for it and writes it to the stream as `name`.
    `have` are commits that the guest has already, with their history up to the plan's boundary.
    """
    full = options.mode == "full_copy"
    with ExitStack() as stack:
        if full:
            scratch.copy_index()
        join = stack.enter_context(
            scratch.packing(plan.tips, plan.boundary, indexed=full, have=have)
        )
        if selection.target is not None and not full:
            scratch.write_index(
                selection.target,
                skip_worktree=list(selection.skip_worktree),
                assume_unchanged=list(selection.assume_unchanged),
            )

        def emit(tar: TarWriter, name: bytes, cancelled: Callable[[], bool]) -> None:
            join(cancelled)
            _emit(tar, name, scratch.git_dir, plan.texts)

        yield emit


def _emit(tar: TarWriter, name: bytes, git_dir: Path, texts: dict[bytes, bytes]) -> None:
    now = int(time.time())
    for made in (b"objects/info", b"objects/pack", b"refs/heads", b"refs/tags", b"info"):
        tar.directory(name + b"/" + made, mtime=now)
    for inside, text in sorted(texts.items()):
        if text:
            tar.file(name + b"/" + inside, text, mode=0o644, mtime=now)
    made_here = [p for p in git_dir.iterdir() if p.name == "shallow" or "index" in p.name]
    for path in sorted((*made_here, *(git_dir / "objects/pack").iterdir())):
        inside = os.fsencode(path.relative_to(git_dir))
        with path.open("rb") as f:
            size = os.fstat(f.fileno()).st_size
            mode = 0o444 if inside.startswith(b"objects/") else 0o644
            tar.stream(name + b"/" + inside, size, f.read, mode=mode, mtime=now)
            if inside.endswith(b".pack") and b"config" in texts and _is_partial(texts[b"config"]):
                # What this pack refers to and does not hold is promised: git does not call it
                # damage (gitrepository-layout, partial-clone.txt).
                promisor = inside.removesuffix(b".pack") + b".promisor"
                tar.file(name + b"/" + promisor, b"", mode=0o444, mtime=now)


def _is_partial(config: bytes) -> bool:
    return b"\tpartialClone = " in config


def _branch(repository: Repository, options: ShipOptions) -> str | None:
    return options.branch if options.branch is not None else repository.branch


def _choose_refs(
    repository: Repository, selection: Selection, options: ShipOptions
) -> dict[str, str]:
    """The new branch, and the one that the user is on as far as both names can exist."""
    refs = {}
    branch = _branch(repository, options)
    if repository.branch is not None and repository.head_commit is not None:
        refs[f"refs/heads/{repository.branch}"] = repository.head_commit
    if branch is not None and selection.target is not None:
        new = f"refs/heads/{branch}"
        refs = {
            ref: oid
            for ref, oid in refs.items()
            if not ref.startswith(f"{new}/") and not new.startswith(f"{ref}/")
        }
        refs[new] = selection.target
    return refs


def _list_refs(git: Git) -> dict[str, str]:
    out = git.run("for-each-ref", "--format=%(objectname) %(refname)", doing="listing the refs")
    refs = {}
    for line in os.fsdecode(out).splitlines():
        oid, _, ref = line.partition(" ")
        refs[ref] = oid
    return refs


def format_refs(refs: dict[str, str]) -> bytes:
    """git-pack-refs(1); without the `peeled` trait git looks up what a tag points to itself."""
    if not refs:
        return b""
    lines = sorted(f"{oid} {ref}\n".encode(errors="surrogateescape") for ref, oid in refs.items())
    lines.sort(key=lambda line: line.partition(b" ")[2])
    return b"# pack-refs with: sorted \n" + b"".join(lines)


def _format_config(repository: Repository, branch: str | None) -> bytes:
    """The guest's configuration: nothing in it names a program."""
    settings = dict(repository.settings)
    extended = repository.object_format != "sha1" or repository.partial
    core = {
        "repositoryformatversion": "1" if extended else "0",
        "filemode": "true",
        "bare": "false",
        "logallrefupdates": "true",
        **{key.removeprefix("core."): value for key, value in settings.items()},
    }
    sections: list[tuple[str, dict[str, str]]] = [("core", core)]
    extensions = {}
    if repository.object_format != "sha1":
        extensions["objectFormat"] = repository.object_format
    if repository.partial:
        extensions["partialClone"] = "origin"
    if extensions:
        sections.append(("extensions", extensions))
    if repository.origin is not None or repository.partial:
        remote = {"url": repository.origin} if repository.origin is not None else {}
        remote["fetch"] = "+refs/heads/*:refs/remotes/origin/*"
        if repository.partial:
            remote["promisor"] = "true"
        sections.append(('remote "origin"', remote))
    user = {"name": repository.user_name, "email": repository.user_email}
    if identity := {k: v for k, v in user.items() if v}:
        sections.append(("user", identity))
    text = ""
    for section, values in sections:
        text += f"[{section}]\n" + "".join(f"\t{k} = {_quote(v)}\n" for k, v in values.items())
    return text.encode(errors="surrogateescape")


def _quote(value: str) -> str:
    """git-config(1), Syntax: quotes keep spaces and comment signs; newlines are escaped."""
    if value and all(c.isalnum() or c in "-_./:@+*~" for c in value):
        return value
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    escaped = escaped.replace("\n", "\\n").replace("\t", "\\t")
    return f'"{escaped}"'


def _read_info(repository: Repository) -> dict[bytes, bytes]:
    """The user's own ignores, attributes and sparse patterns; they decide what `status` says.

    sparse-checkout belongs to the worktree, the others to all of them.
    """
    found = {}
    for file in _INFO:
        directory = repository.git_dir if file == "sparse-checkout" else repository.common_dir
        if (text := _read_small(directory / "info" / file)) is not None:
            found[b"info/" + file.encode()] = text
    return found


def _read_unfinished(repository: Repository) -> dict[bytes, bytes]:
    """A merge, cherry-pick or revert that was under way."""
    found = {file.encode(): _read_small(repository.git_dir / file) for file in _UNFINISHED}
    return {file: text for file, text in found.items() if text is not None}


def _commits_named(unfinished: dict[bytes, bytes], repository: Repository) -> set[str]:
    length = 64 if repository.object_format == "sha256" else 40
    heads = [text.split() for file, text in unfinished.items() if file.endswith(b"_HEAD")]
    words = [w.decode(errors="replace") for head in heads for w in head]
    return {w for w in words if len(w) == length and all(c in "0123456789abcdef" for c in w)}


def _read_small(path: Path) -> bytes | None:
    """A file of the git directory; None if there is none."""
    text = find_start(path, _MAX_SMALL_FILE + 1)
    if text is not None and len(text) > _MAX_SMALL_FILE:
        raise BangerError("bad_request", f"{path} is larger than {_MAX_SMALL_FILE >> 20} MiB")
    return text
