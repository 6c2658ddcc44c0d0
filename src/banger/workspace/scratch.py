"""A git directory of our own on the host, and what the guest's `.git` is made of.

A `Scratch` lives for one call: a private temporary directory, removed at the end, whose objects are
the user's by way of `alternates`. The user's configuration does not apply in it and nothing is ever
written to the user's repository. What the guest gets is packed from here; `alternates` and the
configuration used here stay behind.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from banger.errors import BangerError
from banger.files import staging_directory
from banger.workspace.git import await_exit, end, failure, scratch_git
from banger.workspace.git_files import open_plain
from banger.workspace.names import check_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from banger.workspace.repository import Repository

_PACKING = (
    # The copy crosses a socket on one machine: time matters, size does not.
    "-c", "pack.compression=1",
    "-c", "core.bigFileThreshold=32m",
    "-c", "core.fsync=none",
    "-c", "pack.writeReverseIndex=false",
)  # fmt: skip
_SHARED_INDEX = re.compile(r"sharedindex\.[0-9a-f]{40,64}")


class Scratch:
    """Our git directory for one repository."""

    def __init__(self, directory: Path, repository: Repository) -> None:
        self.directory = directory
        self.repository = repository
        self.git_dir = directory / "git"
        self.objects = self.git_dir / "objects"
        empty = directory / "empty"
        empty.mkdir()
        for made in ("objects/info", "objects/pack", "refs/heads", "info"):
            (self.git_dir / made).mkdir(parents=True)
        (self.git_dir / "HEAD").write_text("ref: refs/heads/none\n")
        sha256 = repository.object_format == "sha256"
        (self.git_dir / "config").write_text(
            "[core]\n"
            f"\trepositoryformatversion = {1 if sha256 else 0}\n"
            "\tbare = false\n"
            + "".join(f"\t{k.removeprefix('core.')} = {v}\n" for k, v in comparing(repository))
            + ("[extensions]\n\tobjectFormat = sha256\n" if sha256 else "")
        )
        (self.objects / "info/alternates").write_bytes(
            quote_alternate(os.fsencode(repository.objects)) + b"\n"
        )
        self.git = scratch_git(self.git_dir, empty)
        """On an empty work tree: for objects and for the index alone."""

    def read_tree(self, commit: str) -> dict[bytes, tuple[int, str]]:
        """Mode and object of every path of a commit, in git's order.

        Raises:
            BangerError: a tree is missing, or holds a name that no checkout can have.
        """
        out = self.git.run(
            "ls-tree", "-r", "-z", "--full-tree", commit, doing=f"listing the files of {commit}"
        )
        return parse_tree(out)

    def list_changed(self, commit: str) -> set[bytes]:
        """Paths whose file on disk, or whose index entry, is not that of `commit`.

        A copy of the user's index is refreshed here against the user's files, so that a touched
        file is not a changed one. Line ends are converted as the repository asks; a filter has no
        driver here and does nothing, so a filtered file counts as unchanged only while its
        recorded times and size still hold.
        """
        self.copy_index()
        git = scratch_git(self.git_dir, self.repository.root)
        # Status 1 only says that some entries need an update.
        refreshed = git.try_run("update-index", "-q", "--unmerged", "--refresh")
        if refreshed.returncode not in (0, 1):
            raise failure("comparing the files", refreshed.stderr, refreshed.returncode)
        out = git.run("diff-index", "-z", "--name-only", commit, "--", doing="comparing the files")
        (self.git_dir / "index").unlink(missing_ok=True)
        return {check_name(n) for n in out.split(b"\0")[:-1]}

    def copy_index(self) -> None:
        """The user's index as ours, in one piece; none if there is none."""
        git_dir = self.repository.git_dir
        shared = [p.name for p in git_dir.iterdir() if _SHARED_INDEX.fullmatch(p.name)]
        for file in ("index", *shared):
            _copy_file(git_dir / file, self.git_dir / file)
        if shared:
            self.git.run(
                "update-index", "--no-split-index", "--force-write-index", doing="copying the index"
            )
            for file in shared:
                (self.git_dir / file).unlink(missing_ok=True)

    def _list_to_pack(
        self, tips: tuple[str, ...], have: tuple[str, ...], *, indexed: bool
    ) -> BinaryIO:
        """The tips; of a partial clone every object that is there, since `pack-objects` (2.39)
        takes a missing tree for damage whatever `--missing` says."""
        asked = self.directory / "pack.in"
        content = "".join(f"{oid}\n" for oid in (*tips, *(f"^{oid}" for oid in have))).encode()
        if self.repository.partial:
            content = self.git.run(
                "rev-list",
                "--objects",
                "--no-object-names",
                "--missing=allow-any",
                *(["--indexed-objects"] if indexed else []),
                "--stdin",
                stdin=content,
                doing=f"listing the objects of {self.repository.root}",
            )
        asked.write_bytes(content)
        return asked.open("rb")

    def write_index(
        self, commit: str, *, skip_worktree: list[bytes], assume_unchanged: list[bytes]
    ) -> None:
        """An index equal to `commit`, with those flags."""
        self.git.run("read-tree", commit, doing="writing the index")
        for flag, names in (
            ("--skip-worktree", skip_worktree),
            ("--assume-unchanged", assume_unchanged),
        ):
            if names:
                self.git.run(
                    "update-index",
                    flag,
                    "-z",
                    "--stdin",
                    stdin=b"".join(n + b"\0" for n in names),
                    doing="writing the index",
                )

    @contextmanager
    def packing(
        self,
        tips: tuple[str, ...],
        boundary: tuple[str, ...],
        *,
        indexed: bool = False,
        have: tuple[str, ...] = (),
    ) -> Iterator[Callable[[Callable[[], bool]], None]]:
        """Pack what the tips reach, up to the boundary, beside whatever the caller does meanwhile.

        Yields a function that waits for the end of it. Objects that a partial clone does not have
        are left out. With `indexed`, what the index names is packed too; what the commits `have`
        reach is left out.

        Raises:
            BangerError: from that function: an object is missing or damaged; cancelled.
        """
        doing = f"packing the history of {self.repository.root}"
        if boundary:
            (self.git_dir / "shallow").write_text("".join(f"{oid}\n" for oid in boundary))
        if not tips and not indexed:
            yield lambda cancelled: None
            return
        words = self.directory / "pack.err"
        with ExitStack() as files:
            stdin = files.enter_context(self._list_to_pack(tips, have, indexed=indexed))
            stdout = files.enter_context((self.directory / "pack.out").open("wb"))
            stderr = files.enter_context(words.open("wb"))
            p = self.git.popen(
                *_PACKING,
                "pack-objects",
                *([] if self.repository.partial else ["--revs"]),
                "--quiet",
                "--window=0",
                "--delta-base-offset",
                *(["--indexed-objects"] if indexed and not self.repository.partial else []),
                str(self.objects / "pack/pack"),
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
            )

        def join(cancelled: Callable[[], bool]) -> None:
            status = await_exit(p, cancelled=cancelled, doing=doing)
            if status != 0:
                raise failure(doing, words.read_bytes(), status)

        try:
            yield join
        finally:
            end(p)


@contextmanager
def open_scratch(repository: Repository, parent: Path | None = None) -> Iterator[Scratch]:
    """A `Scratch` below `parent` (default: the temporary directory); removed at the end."""
    with ExitStack() as stack:
        try:
            directory = stack.enter_context(
                staging_directory(parent or Path(tempfile.gettempdir()), "workspace")
            )
            scratch = Scratch(directory, repository)
        except OSError as e:
            doing = f"making a temporary directory to pack {repository.root}"
            raise BangerError("operation_failed", f"{doing}: {e}") from e
        yield scratch


def parse_tree(listing: bytes) -> dict[bytes, tuple[int, str]]:
    """Mode and object of each line of `git ls-tree -r -z`. Raises as `Scratch.read_tree`."""
    tree = {}
    for record in listing.split(b"\0")[:-1]:
        meta, _, name = record.partition(b"\t")
        mode, _, oid = meta.split(b" ")
        tree[check_name(name)] = (int(mode, 8), oid.decode())
    return tree


def comparing(repository: Repository) -> list[tuple[str, str]]:
    """The settings that matter for comparing files; sparseness is in the index's bits."""
    return [(k, v) for k, v in repository.settings if "sparse" not in k]


def quote_alternate(path: bytes) -> bytes:
    """gitrepository-layout(5), objects/info/alternates: a line, C-quoted when it has to be."""
    if not re.search(rb'[\n"#\\]', path):
        return path
    escaped = path.replace(b"\\", b"\\\\").replace(b'"', b'\\"').replace(b"\n", b"\\n")
    return b'"' + escaped + b'"'


def _copy_file(source: Path, target: Path) -> None:
    """A regular file of the git directory, never through a link; absent is fine."""
    f = open_plain(source)
    if f is None:
        return
    with f:
        found = os.fstat(f.fileno())
        with target.open("wb") as copy:
            shutil.copyfileobj(f, copy, 1 << 20)
    # git compares the content of entries that are as new as their index: with a newer copy, a file
    # that was changed in the second of its commit would count as unchanged (git's racy-git.txt).
    os.utime(target, ns=(found.st_atime_ns, found.st_mtime_ns))
