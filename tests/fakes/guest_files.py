"""Workspaces in a guest that is a directory of this host, behind the real agent.

A `GuestHost` lives as long as its agent. Repositories, packing, agent and git are real; only the
machine is missing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from banger.api.envelope import PROTOCOL_VERSION, Request
from banger.rpc.trees import GuestFiles
from banger.workspace.export import (
    Change,
    Exported,
    Source,
    export_commits,
    export_patch,
    export_tar,
    find_changes,
    open_source_ground,
)
from banger.workspace.inspect import precheck
from banger.workspace.manifest import Manifest
from banger.workspace.options import ShipOptions
from banger.workspace.prepare import Preparation, Prepared
from banger.workspace.service import prepare
from fakes.agent import TOKEN, Agent


class Heard:
    """A reporter that remembers warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def stage(self, stage: str, label: str, detail: str = "") -> None: ...

    def advance(self, done: int, total: int | None = None, detail: str = "") -> None: ...

    def warn(self, message: str) -> None:
        self.warnings.append(message)


def make_request(method: str, params: dict[str, Any]) -> Request:
    raw = msgspec.Raw(msgspec.json.encode(params))
    return Request(version=PROTOCOL_VERSION, method=method, params=raw, token=TOKEN)


class NoGit(GuestFiles):
    """A guest in which there is no git: looking for it fails as it would there."""

    def run(
        self, argv: list[str], *, cwd: str | None, stdin: bytes, out: Callable[[bytes], object]
    ) -> tuple[int, str]:
        assert argv[0] == "git"
        return 127, "git: not found"


@dataclass
class GuestHost:
    """Prepares and exports below `root`, as the daemon does for a VM."""

    agent: Agent
    root: Path
    git: bool = True
    manifests: dict[str, Manifest] = field(default_factory=dict)
    heard: Heard = field(default_factory=Heard)

    @property
    def files(self) -> GuestFiles:
        return (GuestFiles if self.git else NoGit)(self.agent.connect, make_request)

    @property
    def scratch(self) -> Path:
        path = self.root / "scratch"
        path.mkdir(mode=0o700, exist_ok=True)
        return path

    def path(self, name: str = "repo") -> Path:
        return self.root / "guest" / name

    def prepare(
        self, source: Path, options: ShipOptions | None = None, *, force: bool = False,
        name: str = "repo",
    ) -> Prepared:  # fmt: skip
        path = str(self.path(name))
        options = options or ShipOptions()
        what = Preparation(
            guest=self.files, repository=precheck(source, options, scratch_parent=self.scratch),
            options=options, guest_path=path, manifest=self.manifests.get(path), force=force,
            scratch=self.scratch, report=self.heard,
        )  # fmt: skip
        done = prepare(what)
        self.manifests[path] = done.manifest
        return done

    def source(self, source: Path | None, base: str | None, name: str = "repo") -> Source:
        repository = None
        if source is not None:
            repository = precheck(source, ShipOptions(mode="full_copy"))
        return Source(
            guest=self.files, path=str(self.path(name)), repository=repository,
            manifest=self.manifests.get(str(self.path(name))), base_commit=base,
            scratch=self.scratch, report=self.heard,
        )  # fmt: skip

    def patch(
        self, source: Path | None, base: str | None = None, name: str = "repo"
    ) -> tuple[bytes, Exported]:
        parts: list[bytes] = []
        done = export_patch(self.source(source, base, name), parts.append)
        return b"".join(parts), done

    def bundle(self, source: Path | None, base: str | None = None) -> tuple[bytes, Exported]:
        parts: list[bytes] = []
        done = export_commits(self.source(source, base), parts.append)
        return b"".join(parts), done

    def tar(self, source: Path | None, out: BinaryIO) -> Exported:
        return export_tar(self.source(source, None), out)

    def changes(self, source: Path) -> list[Change]:
        where = self.source(source, None)
        with open_source_ground(where) as ground:
            return find_changes(where, ground)[0]
