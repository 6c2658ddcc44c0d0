"""One cycle: the life of a VM with everything that users do, each verb checked and timed."""

from __future__ import annotations

import subprocess
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tests.boot.installation import SMALL
from tests.soak.ground import KEEPER, Ground

if TYPE_CHECKING:
    from collections.abc import Iterator

_VM = "cycle"
_GUEST_PATH = "/root/project"


class Cycle:
    """Runs cycles on one ground with one repository; `latencies` are those of the last one."""

    def __init__(self, ground: Ground, repository: Path) -> None:
        self._ground = ground
        self._repository = repository
        self.latencies: dict[str, float] = {}

    def run(self, number: int) -> None:
        """Everything once.

        Raises:
            AssertionError: a command failed, or its result is wrong; the VM may still be there.
        """
        banger, marker = self._ground, f"cycle {number}"
        self.latencies = {}
        with self._timed("create"):
            banger.ok("vm", "create", "--name", _VM, *SMALL)
        with self._timed("exec"):
            _same(banger.ok("vm", "exec", _VM, "--", "echo", marker).text, f"{marker}\n")
        with self._timed("prepare"):
            banger.ok(
                "vm", "workspace", "prepare", _VM, str(self._repository),
                "--guest-path", _GUEST_PATH,
            )  # fmt: skip
        banger.ok("vm", "exec", _VM, "--", "sh", "-c", f"echo '{marker}' > {_GUEST_PATH}/message")
        with self._timed("export"):
            patch = banger.ok("vm", "workspace", "export", _VM, "--guest-path", _GUEST_PATH).out
        self._applies(patch, marker)
        with self._timed("session"):
            for vm in (_VM, KEEPER):
                self._session(vm)
        with self._timed("stop"):
            banger.ok("vm", "stop", _VM)
        with self._timed("start"):
            banger.ok("vm", "start", _VM)
        kept = banger.ok("vm", "exec", _VM, "--", "cat", f"{_GUEST_PATH}/message").text
        _same(kept, f"{marker}\n")
        with self._timed("delete"):
            banger.ok("vm", "delete", _VM)
        banger.json("vm", "stats", KEEPER)
        with self._timed("list"):
            names = [vm["name"] for vm in banger.json("vm", "list", "--json")]
        _same(names, [KEEPER])

    def clear(self) -> None:
        """Remove the VM of a cycle that failed."""
        self._ground("vm", "delete", _VM)

    def _session(self, vm: str) -> None:
        banger = self._ground
        banger.ok("vm", "session", "start", "--name", "soak", vm, "--", "sh", "-c", "echo in; cat")
        banger.ok("vm", "session", "stop", vm, "soak")
        banger.ok("vm", "session", "remove", vm, "soak")

    def _applies(self, patch: bytes, marker: str) -> None:
        git = ["git", "-C", str(self._repository)]
        subprocess.run([*git, "apply", "--check", "-"], input=patch, check=True)
        if f"+{marker}".encode() not in patch:
            raise AssertionError(f"the patch lacks the change: {patch!r}")

    @contextmanager
    def _timed(self, verb: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.latencies[f"{verb}_ms"] = round((time.monotonic() - began) * 1000, 1)


def make_repository(path: Path) -> Path:
    """A repository of a few hundred small files."""
    for number in range(200):
        file = path / f"directory-{number % 10}" / f"file-{number}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{number}\n" * 100)
    (path / "message").write_text("nothing yet\n")
    git = ["git", "-C", str(path), "-c", "user.name=Soak", "-c", "user.email=soak@example.invalid"]
    for words in (("init", "-q", "-b", "main"), ("add", "-A"), ("commit", "-qm", "first")):
        subprocess.run([*git, *words], check=True, capture_output=True)
    return path


def _same(found: object, wanted: object) -> None:
    if found != wanted:
        raise AssertionError(f"found {found!r}, expected {wanted!r}")
