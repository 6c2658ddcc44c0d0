"""What a recipe puts into a running machine: packages, files and downloads, scripts, in this order.

Everything goes through the guest's agent. What the guest says is shown a line at a time, made
harmless for a terminal. The machine belongs to the caller, who throws it away.
"""

from __future__ import annotations

import io
import tarfile
import time
from typing import TYPE_CHECKING, BinaryIO, cast, get_args

from banger.errors import BangerError
from banger.image.build import collect_additions
from banger.image.recipe import Manager
from banger.image.rootfs import Addition

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from banger.disk.background import Job
    from banger.image.recipe import LoadedRecipe
    from banger.rpc.trees import GuestFiles

# On a tmpfs, which is not captured; and executable nowhere else in every guest.
_PLACE = "/run/banger-build"
_MOST_LINE = 2000
_TAIL_LINES = 5


def find_manager(guest: GuestFiles) -> Manager | None:
    """The guest's package manager; None where it has none that is known."""
    found = guest.system().manager
    return cast("Manager", found) if found in get_args(Manager) else None


def furnish(
    guest: GuestFiles,
    recipe: LoadedRecipe,
    *,
    downloads: Path,
    show: Callable[[str], None],
    job: Job,
) -> tuple[str, ...]:
    """Put everything of the recipe into the guest; the names of optional downloads that are
    missing. `downloads` is an empty directory of the caller's.

    Raises:
        BangerError: a program of the guest failed, its last words are in the message; not_found: no
            known package manager; connection_lost.
    """
    what = recipe.recipe.name
    if recipe.recipe.packages:
        job.stage("packages", f"installing packages for {what}", ", ".join(recipe.recipe.packages))
        lines = Lines(show)
        status = guest.install(list(recipe.recipe.packages), lines.feed)
        _check(f"installing packages for {what}", status, lines)
    additions, missing = collect_additions(recipe, downloads, job)
    if additions:
        job.stage("files", f"putting files into the machine for {what}")
        guest.put("/", lambda out: write_additions(out, additions), mode="merge")
    for number, name in enumerate(recipe.recipe.scripts):
        shown = name.split("/", 1)[-1]
        job.stage("scripts", f"running {shown} for {what}")
        path = f"{number}.sh"
        script = {path: Addition(mode=0o700, content=recipe.sources[name])}

        def write(out: BinaryIO, script: dict[str, Addition] = script) -> None:
            write_additions(out, script)

        guest.put(_PLACE, write, mode="merge")
        lines = Lines(show)
        status, _ = guest.run(
            ["sh", "-eu", f"{_PLACE}/{path}"], cwd="/", stdin=b"", out=lines.feed, err=lines.feed
        )
        _check(f"running the script {shown} for {what}", status, lines)
    return missing


def _check(doing: str, status: int, lines: Lines) -> None:
    lines.end()
    if status != 0:
        words = " | ".join(lines.tail) or "it said nothing"
        raise BangerError("operation_failed", f"{doing}: it ended with status {status}: {words}")


def write_additions(out: BinaryIO, additions: dict[str, Addition]) -> None:
    """Files of root's as a tar, with the directories that are on their way."""
    with tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT) as tar:
        for name, addition in sorted(additions.items()):
            info = tarfile.TarInfo(name)
            info.mode, info.mtime = addition.mode, int(time.time())
            if isinstance(addition.content, bytes):
                info.size = len(addition.content)
                tar.addfile(info, io.BytesIO(addition.content))
                continue
            info.size = addition.content.stat().st_size
            with addition.content.open("rb") as f:
                tar.addfile(info, f)


class Lines:
    """Bytes of a program's output, shown as lines of text; remembers the last ones."""

    def __init__(self, show: Callable[[str], None]) -> None:
        self._show = show
        self._rest = b""
        self.tail: list[str] = []

    def feed(self, piece: bytes) -> None:
        # A carriage return is how progress bars draw over themselves.
        *whole, self._rest = (self._rest + piece).replace(b"\r", b"\n").split(b"\n")
        for line in whole:
            self._say(line)
        if len(self._rest) > _MOST_LINE:
            self._say(self._rest)
            self._rest = b""

    def end(self) -> None:
        """What came without an end of its line."""
        self._say(self._rest)
        self._rest = b""

    def _say(self, line: bytes) -> None:
        text = line[:_MOST_LINE].decode(errors="replace").replace("\t", "    ")
        text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
        if not text.strip():
            return
        self.tail = [*self.tail, text][-_TAIL_LINES:]
        self._show(text)
