"""A repository in which everything that git may start on its own is a trap."""

from __future__ import annotations

import io
import os
import subprocess
import time
from pathlib import Path

import pytest

from banger.errors import BangerError
from banger.workspace.files import list_shipped
from banger.workspace.inspect import inspect_repository, precheck
from banger.workspace.options import ShipOptions
from banger.workspace.pack import pack
from patience import PATIENCE_S
from workspace_kit import ENVIRONMENT, commit, git, make_repository, write

HOOKS = (
    "applypatch-msg", "commit-msg", "fsmonitor-watchman", "post-applypatch", "post-checkout",
    "post-commit", "post-index-change", "post-merge", "post-rewrite", "post-update",
    "pre-applypatch", "pre-auto-gc", "pre-commit", "pre-merge-commit", "pre-push", "pre-rebase",
    "pre-receive", "prepare-commit-msg", "push-to-checkout", "reference-transaction",
    "sendemail-validate", "update",
)  # fmt: skip
PROGRAMS = (
    "core.fsmonitor", "core.sshCommand", "core.editor", "core.pager", "core.askPass",
    "core.gitProxy", "core.alternateRefsCommand", "sequence.editor", "gpg.program",
    "gpg.ssh.program", "gpg.x509.program", "diff.external", "diff.trap.command",
    "diff.trap.textconv", "merge.trap.driver", "filter.trap.clean", "filter.trap.smudge",
    "filter.trap.process", "credential.helper", "uploadpack.packObjectsHook",
    "remote.origin.uploadpack", "remote.origin.receivepack", "interactive.diffFilter",
    "man.viewer", "web.browser", "browser.trap.cmd", "difftool.trap.cmd", "pager.ls-files",
    "pager.rev-parse", "pager.config", "pager.for-each-ref", "submodule.sub.update",
    "trailer.x.command", "tar.trap.command", "log.showSignature",
)  # fmt: skip
ALIASES = ("ls-files", "rev-parse", "cat-file", "symbolic-ref", "for-each-ref", "config")
EVERY_WAY = [
    ShipOptions(),
    ShipOptions(include_untracked=True),
    ShipOptions(mode="metadata_only"),
    ShipOptions(mode="full_copy"),
    ShipOptions(branch="new"),
    ShipOptions(branch="new", from_ref="old", include_untracked=True),
    ShipOptions(branch="new", from_ref="old", mode="metadata_only"),
]


class Trap:
    def __init__(self, work: Path) -> None:
        self.canaries = work / "canaries"
        self.canaries.mkdir()
        self.repository = make_repository(work / "repo")
        write(self.repository, ".gitattributes", "* filter=trap diff=trap merge=trap ident\n")
        for number in range(3):
            write(self.repository, f"file{number}", f"{number}\n")
        commit(self.repository, "old")
        git(self.repository, "branch", "old")
        write(self.repository, "later", "x\n")
        commit(self.repository, "new")
        write(self.repository, "file0", "changed\n")
        write(self.repository, "untracked", "x\n")
        self.set()

    def program(self, name: str, then: str = "cat") -> str:
        path = self.canaries.parent / f"trap-{name}"
        path.write_text(f"#!/bin/sh\ntouch '{self.canaries}/{name}'\n{then}\n")
        path.chmod(0o755)
        return str(path)

    def set(self) -> None:
        for key in PROGRAMS:
            git(self.repository, "config", key, self.program(key))
        for name in ALIASES:
            git(self.repository, "config", f"alias.{name}", "!" + self.program(f"alias-{name}"))
        included = self.canaries.parent / "included"
        included.write_text(f"[core]\n\tfsmonitor = {self.program('included')}\n")
        git(self.repository, "config", f"includeIf.gitdir:{self.repository}/.path", str(included))
        git(self.repository, "config", "include.path", str(included))
        git(self.repository, "config", "filter.trap.required", "true")
        hooks = self.repository / ".git/hooks"
        for name in HOOKS:
            (hooks / name).write_text(f"#!/bin/sh\ntouch '{self.canaries}/hook-{name}'\n")
            (hooks / name).chmod(0o755)
        git(self.repository, "config", "core.hooksPath", str(hooks))
        # Entries that look racily clean make git read the files again, through the filters.
        soon = time.time() + 5
        for path in self.repository.glob("file*"):
            os.utime(path, (soon, soon))
        os.utime(self.repository / ".git/index", (1, 1))

    def sprung(self) -> list[str]:
        return sorted(p.name for p in self.canaries.iterdir())


@pytest.fixture
def trap(tmp_path: Path) -> Trap:
    return Trap(tmp_path)


@pytest.mark.parametrize("command", [("status",), ("diff",), ("ls-files", "-m")])
def test_trap_is_armed(trap: Trap, command: tuple[str, ...]) -> None:
    """The control: commands that a careless program would use do spring it."""
    subprocess.run(
        ["git", "-C", trap.repository, *command],
        env=ENVIRONMENT,
        capture_output=True,
        check=False,
        timeout=PATIENCE_S,
    )
    assert trap.sprung()


@pytest.mark.parametrize("options", EVERY_WAY, ids=lambda o: f"{o.mode}-{o.branch}-{o.from_ref}")
def test_shipping_springs_nothing(trap: Trap, options: ShipOptions) -> None:
    repository = precheck(trap.repository, options)
    list_shipped(repository, options)
    result = pack(repository, options, io.BytesIO())
    assert result.file_count >= 4
    assert trap.sprung() == []


def test_worktree_springs_nothing(trap: Trap, tmp_path: Path) -> None:
    (trap.repository / ".git/worktrees/side").mkdir(parents=True)
    side = trap.repository / ".git/worktrees/side"
    (side / "HEAD").write_text("ref: refs/heads/old\n")
    (side / "commondir").write_text("../..\n")
    (side / "gitdir").write_text(f"{tmp_path}/side/.git\n")
    (tmp_path / "side").mkdir()
    (tmp_path / "side/.git").write_text(f"gitdir: {side}\n")
    for options in EVERY_WAY:
        pack(precheck(tmp_path / "side", options), options, io.BytesIO())
    assert trap.sprung() == []


@pytest.mark.parametrize("transport", ["ext", "ssh", "vcs", "file", "helper"])
def test_missing_objects_are_not_fetched(trap: Trap, transport: str) -> None:
    """A partial clone whose promisor is a program."""
    set_promisor(trap, transport)
    for options in EVERY_WAY:
        try:
            found = inspect_repository(trap.repository)
            list_shipped(found, options)
            pack(found, options, io.BytesIO())
        except BangerError:
            continue
    assert trap.sprung() == []


def test_promisor_trap_is_armed(trap: Trap) -> None:
    """The control: git fetches a missing object when it is read."""
    blob = set_promisor(trap, "ext")
    subprocess.run(
        ["git", "-C", trap.repository, "cat-file", "-p", blob],
        env=ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
        timeout=PATIENCE_S,
    )
    assert "promisor" in trap.sprung()


def set_promisor(trap: Trap, transport: str) -> str:
    """Make it a partial clone, take a tree and a blob away, and return the blob."""
    repository = trap.repository
    program = trap.program("promisor", then="exit 1")
    url = {
        "ext": f"ext::{program}",
        "ssh": "ssh://example.invalid/x",
        "vcs": "x",
        "file": f"file://{repository}",
        "helper": "trap::x",
    }[transport]
    for key, value in (
        ("core.repositoryformatversion", "1"),
        ("extensions.partialClone", "origin"),
        ("remote.origin.promisor", "true"),
        ("remote.origin.url", url),
        ("protocol.allow", "always"),
        ("protocol.ext.allow", "always"),
        ("protocol.trap.allow", "always"),
    ):
        git(repository, "config", key, value)
    if transport == "vcs":
        git(repository, "config", "remote.origin.vcs", "trap")
    blob = git(repository, "rev-parse", "HEAD:file1").decode().strip()
    (repository / f".git/objects/{blob[:2]}/{blob[2:]}").unlink()
    tree = git(repository, "rev-parse", "old^{tree}").decode().strip()
    (repository / f".git/objects/{tree[:2]}/{tree[2:]}").unlink()
    return blob
