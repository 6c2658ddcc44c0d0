"""A repository of our own on the host in which a guest's files become a git tree.

A `Ground` lives for one call in a private temporary directory. It borrows the objects of the
source, knows no configuration but how files compare with blobs, and runs nothing that the guest or
the source names: no hook, filter, driver or textconv exists in it. The guest's files lie in `work`,
its git directory beside it.
"""

from __future__ import annotations

import os
import re
import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING

from banger.errors import BangerError
from banger.files import free_bytes, staging_directory
from banger.workspace.git import end, failure, scratch_git
from banger.workspace.history import read_shallow
from banger.workspace.large_patch import LARGE_BYTES, find_large, write_large
from banger.workspace.scratch import comparing, parse_tree, quote_alternate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from banger.rpc.trees import GuestFiles
    from banger.workspace.git import Git
    from banger.workspace.repository import Repository

_CHUNK = 256 << 10
_RESERVE = 256 << 20
_DIFF = (
    "--full-index", "--no-color", "--no-ext-diff", "--no-textconv", "--src-prefix=a/",
    "--dst-prefix=b/", "--find-renames", "--ignore-submodules=none",
)  # fmt: skip
# A name that git takes for its own directory on some system, and therefore in no repository:
# read-cache.c verify_path, core.protectNTFS.
_PROTECTED = re.compile(rb"(?:\A|/)(?:\.git|git~1)[ .]*(?:[:\\/]|\Z)", re.IGNORECASE)
_INDEX_PACK_S = 3600.0


def is_storable(name: bytes) -> bool:
    """Whether git can hold a file of this name."""
    return not _PROTECTED.search(name)


class Ground:
    """Our repository; see the module."""

    def __init__(self, directory: Path, repository: Repository | None, object_format: str) -> None:
        self.directory = directory
        self.git_dir = directory / "git"
        self.work = directory / "work"
        self.work.mkdir()
        for made in ("objects/info", "objects/pack", "refs/heads", "info"):
            (self.git_dir / made).mkdir(parents=True)
        (self.git_dir / "HEAD").write_text("ref: refs/heads/none\n")
        sha256 = object_format == "sha256"
        settings = dict(comparing(repository)) if repository else {}
        # The guest's filesystem has x bits, whatever the host's has.
        settings["core.filemode"] = "true"
        (self.git_dir / "config").write_text(
            f"[core]\n\trepositoryformatversion = {1 if sha256 else 0}\n\tbare = false\n"
            + "".join(f"\t{k.removeprefix('core.')} = {v}\n" for k, v in settings.items())
            + "\tsafecrlf = false\n"
            + ("[extensions]\n\tobjectFormat = sha256\n" if sha256 else "")
        )
        if repository is not None:
            (self.git_dir / "objects/info/alternates").write_bytes(
                quote_alternate(os.fsencode(repository.objects)) + b"\n"
            )
            if boundary := read_shallow(repository.common_dir):
                shallow = "".join(f"{oid}\n" for oid in sorted(boundary))
                (self.git_dir / "shallow").write_text(shallow)
        self.links = settings.get("core.symlinks") != "false"
        self.git = scratch_git(self.git_dir, self.work)
        self.empty_tree = self.git.run(
            "hash-object", "-t", "tree", "--stdin", stdin=b"", doing="preparing a comparison"
        ).decode().strip()  # fmt: skip

    def has(self, commit: str) -> bool:
        """Whether the commit and its tree are here."""
        return (
            self.git.try_run("rev-parse", "--verify", "-q", f"{commit}^{{tree}}").returncode == 0
            and self.git.try_run("cat-file", "-e", f"{commit}^{{tree}}").returncode == 0
        )

    def read_tree(self, tree: str) -> dict[bytes, tuple[int, str]]:
        """Mode and object of every path, and the index set to it. Raises BangerError."""
        doing = f"listing the files of {tree}"
        files = parse_tree(self.git.run("ls-tree", "-r", "-z", "--full-tree", tree, doing=doing))
        if tree == self.empty_tree:
            self.git.run("read-tree", "--empty", doing=doing)
        else:
            self.git.run("read-tree", tree, doing=doing)
        return files

    def find_ignored(self, names: Iterable[bytes]) -> set[bytes]:
        """Those of some untracked names that the `.gitignore` files in `work` leave out."""
        asked = b"".join(b"./%s\0" % n for n in names)
        if not asked:
            return set()
        git = scratch_git(self.git_dir, self.work, literal=False)
        # From the top of the work tree: names are relative to the directory that git runs in.
        done = git.try_run(
            "-C", str(self.work), "check-ignore", "-z", "--stdin", "--no-index", stdin=asked
        )
        if done.returncode not in (0, 1):
            raise failure("finding ignored files", done.stderr, done.returncode)
        return {n.removeprefix(b"./") for n in done.stdout.split(b"\0")[:-1]}

    def record(self, removed: Iterable[bytes], changed: Iterable[bytes]) -> None:
        """Take names out of the index, and files of `work` into it, with git's conversions of line
        ends and without any filter."""
        for options, names in (
            (("--force-remove",), removed),
            (("--add", "--replace"), changed),
        ):
            asked = b"".join(n + b"\0" for n in names)
            if asked:
                # A large file goes into a pack in pieces; it does not stay: no effort for its size.
                self.git.run(
                    "-c", f"core.bigFileThreshold={LARGE_BYTES}", "-c", "core.compression=0",
                    "update-index", *options, "-z", "--stdin",
                    stdin=asked, doing="recording the guest's files",
                )  # fmt: skip

    def changed_names(self, tree: str) -> list[tuple[str, bytes]]:
        """Status letter and name of what differs between a tree and the index."""
        out = self.git.run(
            "diff-index", "--cached", "-z", "--name-status", "--no-renames", tree, "--",
            doing="comparing the guest's files",
        ).split(b"\0")[:-1]  # fmt: skip
        return [(out[i].decode(), out[i + 1]) for i in range(0, len(out), 2)]

    def write_patch(self, tree: str, out: Callable[[bytes], object]) -> int:
        """The patch from a tree to the index, in pieces; returns its bytes. Raises BangerError."""
        large = find_large(self.git, tree)
        # Without `literal`, which would take the exclusion for a name.
        git = scratch_git(self.git_dir, self.work, literal=False) if large else self.git
        others = [f":(top,exclude,literal){os.fsdecode(c.name)}" for c in large]
        written = self._stream(
            git,
            ("diff-index", "--cached", "--patch", "--binary", *_DIFF, tree, "--", *others),
            out,
            "writing the patch",
        )
        return written + write_large(self.git, self.directory, large, out)

    def _stream(
        self, git: Git, args: tuple[str, ...], out: Callable[[bytes], object], doing: str
    ) -> int:
        words = self.directory / "stream.err"
        written = 0
        with words.open("wb") as stderr:
            p = git.popen(*args, stdout=subprocess.PIPE, stderr=stderr)
        try:
            assert p.stdout is not None
            while chunk := p.stdout.read(_CHUNK):
                out(chunk)
                written += len(chunk)
            status = p.wait()
        finally:
            end(p)
        if status != 0:
            raise failure(doing, words.read_bytes(), status)
        return written

    def fetch(self, guest: GuestFiles, path: str, asked: Iterable[str]) -> None:
        """Objects of the guest's repository, packed by its git and checked by ours.

        `asked` are lines for `git pack-objects --revs`.

        Raises:
            BangerError: the guest has no git, or not these objects; the pack is damaged.
        """
        pack = self.directory / "guest.pack"
        budget = free_bytes(self.directory) - _RESERVE
        doing = f"fetching commits of {path} from the guest"
        with pack.open("wb") as file:

            def receive(chunk: bytes) -> None:
                if file.tell() + len(chunk) > budget:
                    raise BangerError(
                        "operation_failed", f"{doing}: no space on this host", reason="disk_full"
                    )
                file.write(chunk)

            status, words = guest.run(
                [*GUEST_GIT, "pack-objects", "--revs", "--stdout", "--quiet", "--thin",
                 "--delta-base-offset"],
                cwd=path, stdin="".join(f"{line}\n" for line in asked).encode(), out=receive,
            )  # fmt: skip
        if status == 127:
            raise no_git(doing)
        if status != 0:
            raise BangerError("operation_failed", f"{doing}: {words}")
        with pack.open("rb") as packed:
            p = self.git.popen(
                "index-pack", "--stdin", "--fix-thin",
                stdin=packed, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            )  # fmt: skip
        try:
            _, stderr = p.communicate(timeout=_INDEX_PACK_S)
        finally:
            end(p)
        if p.returncode != 0:
            raise failure(doing, stderr, p.returncode)


GUEST_GIT = (
    "git", "--no-pager", "--no-replace-objects", "--no-optional-locks", "-c", "safe.directory=*",
    "-c", "core.hooksPath=/dev/null", "-c", "core.fsmonitor=false",
)  # fmt: skip


def no_git(doing: str) -> BangerError:
    """The error of what only the guest's own git can do."""
    return BangerError("operation_failed", f"{doing}: there is no git in the guest")


@contextmanager
def open_ground(
    parent: Path, repository: Repository | None, object_format: str
) -> Iterator[Ground]:
    """A `Ground` below `parent`, removed at the end. Raises BangerError."""
    with staging_directory(parent, "ground") as directory:
        yield Ground(directory, repository, object_format)
