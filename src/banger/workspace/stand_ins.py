"""Files whose bytes on disk are not those of their blob, and yet are no change: converted line
ends, and what a filter (Git LFS) made of a blob.

Such a file stands for its blob as long as nobody touches it. Which files those are is asked of the
repository's attributes; that a file is no change is asked of its index, as in `Scratch`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from banger.workspace.git import scratch_git

if TYPE_CHECKING:
    from collections.abc import Mapping

    from banger.workspace.scratch import Scratch

# gitattributes(5), "Checking-out and checking-in": what changes bytes between blob and file.
_CONVERTING = ("text", "crlf", "eol", "ident", "filter", "working-tree-encoding")


def find_stand_ins(
    scratch: Scratch, commit: str | None, files: Mapping[bytes, bytes], *, tree: str | None = None
) -> dict[bytes, bytes]:
    """The blob of `commit` for each of some files that stands for one. `files` are names with the
    id of their bytes; `tree` is the tree of all of them, where that is known."""
    if commit is None or not files:
        return {}
    doing = f"comparing the files with {commit}"
    if tree == scratch.git.run("rev-parse", f"{commit}^{{tree}}", doing=doing).decode().strip():
        return {}
    convertible = _find_convertible(scratch, files)
    if not convertible:
        return {}
    wanted = scratch.read_tree(commit)
    others = {
        name: bytes.fromhex(wanted[name][1])
        for name in convertible
        if name in wanted and wanted[name][1] != files[name].hex()
    }
    if not others:
        return {}
    changed = scratch.list_changed(commit)
    return {name: oid for name, oid in others.items() if name not in changed}


def _find_convertible(scratch: Scratch, files: Mapping[bytes, bytes]) -> set[bytes]:
    if scratch.repository.setting("core.autocrlf") in ("true", "input"):
        return set(files)
    git = scratch_git(scratch.git_dir, scratch.repository.root)
    out = git.run(
        "check-attr", "-z", "--stdin", *_CONVERTING,
        stdin=b"".join(name + b"\0" for name in files), doing="reading the attributes",
    ).split(b"\0")[:-1]  # fmt: skip
    return {out[i] for i in range(0, len(out), 3) if out[i + 2] not in (b"unspecified", b"unset")}
