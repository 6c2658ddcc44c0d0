"""The tooling bootstrap: what version files say, which of them count, and how it runs and ends."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from banger.api.records import Bootstrap
from banger.daemon import bootstrap
from banger.errors import BangerError
from banger.workspace.inspect import inspect_repository
from banger.workspace.options import Mode, ShipOptions
from banger.workspace.tool_files import read_tool_files
from banger.workspace.tooling import ToolPlan, describe, plan_tools
from fakes.world import World
from patience import PATIENCE_S
from workspace_kit import git, make_repository, write


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        (".go-version", "1.22.3\n", "go@1.22.3"),
        ("go.mod", "module m\n\ngo 1.21 // minimum\n", "go@1.21"),
        ("go.mod", "module m\ngo 1.21\ntoolchain go1.22.3\n", "go@1.22.3"),
        ("go.mod", "module m\ngo 1.23rc1\ntoolchain default\n", "go@1.23rc1"),
        (".nvmrc", "v20.11.1\n", "node@20.11.1"),
        (".nvmrc", "20\n", "node@20"),
        (".node-version", "18.19.0", "node@18.19.0"),
        ("package.json", '{"engines":{"node":"18.x"}}', "node@18"),
        ("package.json", '{"engines":{"node":">=18"},"volta":{"node":"20.1.0"}}', "node@20.1.0"),
        (".python-version", "# comment\n3.12.1\n3.11\n", "python@3.12.1"),
        (".python-version", "pypy3.10-7.3.15\n", "python@pypy3.10-7.3.15"),
        ("pyproject.toml", '[project]\nrequires-python = "==3.11.*"\n', "python@3.11"),
        ("pyproject.toml", '[tool.poetry.dependencies]\npython = "3.11.4"\n', "python@3.11.4"),
        ("rust-toolchain", "1.75.0\n", "rust@1.75.0"),
        ("rust-toolchain.toml", '[toolchain]\nchannel = "nightly-2024-01-02"\n',
         "rust@nightly-2024-01-02"),
        # What names no version of its own is left out, with the reason.
        (".nvmrc", "lts/*\n", "'lts/*' is an alias, not a version"),
        (".nvmrc", "\n", "it names no version"),
        ("package.json", '{"engines":{"node":"^18 || >=20"}}', "is a range (engines.node)"),
        ("package.json", "{", "it cannot be read"),
        ("pyproject.toml", '[project]\nrequires-python = ">=3.9"\n', "is a range"),
        (".python-version", "system\n", "no version that can be installed"),
        ("rust-toolchain", "stable\n", "'stable' is a channel, not a version"),
        ("rust-toolchain.toml", '[toolchain]\npath = "/x"\n', "it names no version"),
        ("go.mod", "module m\n", "it names no version"),
    ],
)  # fmt: skip
def test_version_file_says(name: str, text: str, expected: str) -> None:
    plan = plan_tools({name: text.encode()})
    if "@" in expected:
        assert ([s.word for s in plan.steps], plan.skips) == ([expected], ())
    else:
        assert plan.steps == ()
        assert expected in plan.skips[0].reason


def test_package_without_a_node_version_is_about_something_else() -> None:
    assert plan_tools({"package.json": b'{"name":"x"}', "pyproject.toml": b"[tool.ruff]\n"}).empty


def test_plan_is_sorted_and_says_why_the_rest_is_left_out() -> None:
    plan = plan_tools(
        {
            "rust-toolchain": b"1.75.0",
            ".nvmrc": b"20",
            ".node-version": b"18",
            "go.mod": b"go 1.22\n",
            ".tool-versions": b"golang 1.21.0\n# python 3\n",
        }
    )
    assert list(describe(plan)) == [
        "mise install: .tool-versions",
        "node@20: .nvmrc",
        "rust@1.75.0: rust-toolchain",
        "go of go.mod left out: .tool-versions manages go",
        "node of .node-version left out: .nvmrc says 20",
    ]


def test_mise_file_that_nobody_can_read_leaves_everything_to_mise() -> None:
    plan = plan_tools({"mise.toml": b"[tools", ".nvmrc": b"20"})
    assert plan.steps == ()
    assert "cannot be read" in plan.skips[0].reason
    assert not plan.empty


# --- which files count ----------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path: Path) -> Path:
    root = make_repository(tmp_path / "project")
    write(root, ".nvmrc", "18")
    write(root, "go.mod", "go 1.21\n")
    git(root, "add", "-A")
    git(root, "commit", "-qm", "first")
    git(root, "tag", "old")
    write(root, ".nvmrc", "20")
    git(root, "commit", "-qam", "second")
    write(root, ".nvmrc", "22")
    write(root, "mise.toml", "[tools]\n")
    write(root, ".gitignore", ".python-version\n")
    write(root, ".python-version", "3.12")
    return root


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {".nvmrc": b"22", "go.mod": b"go 1.21\n"}),
        ({"include_untracked": True},
         {".nvmrc": b"22", "go.mod": b"go 1.21\n", "mise.toml": b"[tools]\n"}),
        ({"mode": "full_copy"},
         {".nvmrc": b"22", "go.mod": b"go 1.21\n", "mise.toml": b"[tools]\n",
          ".python-version": b"3.12"}),
        ({"mode": "metadata_only"}, {".nvmrc": b"20", "go.mod": b"go 1.21\n"}),
        ({"mode": "metadata_only", "branch": "b", "from_ref": "old"},
         {".nvmrc": b"18", "go.mod": b"go 1.21\n"}),
    ],
)  # fmt: skip
def test_files_that_are_shipped_count(
    project: Path, options: dict[str, Any], expected: dict[str, bytes]
) -> None:
    assert read_tool_files(inspect_repository(project), ShipOptions(**options)) == expected


@pytest.mark.parametrize("mode", ["shallow_overlay", "full_copy"])
def test_version_file_that_is_a_link_is_not_followed(project: Path, mode: Mode) -> None:
    (project / ".nvmrc").unlink()
    (project / ".nvmrc").symlink_to("/etc/passwd")
    assert ".nvmrc" not in read_tool_files(inspect_repository(project), ShipOptions(mode=mode))


# --- the script -----------------------------------------------------------------------------------


class Mise:
    """A program of that name that writes down what it is asked for."""

    def __init__(self, directory: Path) -> None:
        self.repository = directory / "repo"
        self.repository.mkdir()
        self.log = directory / "cache" / "tooling.log"
        self.asked = directory / "asked"
        program = directory / "bin" / "mise"
        program.parent.mkdir()
        program.write_text(
            f'#!/bin/sh\necho "$PWD: $*" >> {self.asked}\necho "said $1" >&2\n'
            "case $* in *bad*) exit 5;; esac\ncat\n"
        )
        program.chmod(0o755)
        self.path = f"{program.parent}:/usr/bin:/bin"

    def run(self, plan: str, configured: int, *tools: str) -> subprocess.CompletedProcess[str]:
        argv = ["sh", "-c", bootstrap._SCRIPT, "tooling", self.log, self.repository,
                str(configured), plan, *tools]  # fmt: skip
        return subprocess.run(
            argv,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            env={"PATH": self.path},
            check=False,
        )

    def calls(self) -> list[str]:
        prefix = f"{self.repository}: "
        return [line.removeprefix(prefix) for line in self.asked.read_text().splitlines()]


@pytest.fixture
def mise(tmp_path: Path) -> Mise:
    return Mise(tmp_path)


def test_steps_run_in_the_repository_in_their_order_and_are_logged(mise: Mise) -> None:
    done = mise.run("the plan\n", 1, "go@1.22", "node@20")
    assert mise.calls() == [
        f"trust --quiet --all {mise.repository}", "install",
        "use -g --pin go@1.22", "use -g --pin node@20",
    ]  # fmt: skip
    assert done.returncode == 0
    assert done.stdout == mise.log.read_text()
    assert done.stdout.startswith("the plan\n+ mise trust")
    assert "said install" in done.stdout


def test_step_that_fails_is_told_and_does_not_keep_the_others_from_running(mise: Mise) -> None:
    done = mise.run("", 0, "bad@1", "node@20")
    assert mise.calls() == ["use -g --pin bad@1", "use -g --pin node@20"]
    assert done.returncode == 1
    assert "failed with status 5: mise use -g --pin bad@1" in mise.log.read_text()


# --- in the daemon --------------------------------------------------------------------------------


class Heard:
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def stage(self, stage: str, label: str, detail: str = "") -> None: ...

    def advance(self, done: int, total: int | None = None, detail: str = "") -> None: ...

    def warn(self, message: str) -> None:
        self.warnings.append(message)


def daemon_of(world: World) -> Any:
    return SimpleNamespace(vms=world.ctx, store=world.store, paths=world.paths)


def shipment(path: Path) -> Any:
    repository = inspect_repository(path)
    return SimpleNamespace(repository=repository, options=ShipOptions(), guest_path="/root/repo")


PLAN = plan_tools({".nvmrc": b"20"})
_SESSION = {
    "id": "1", "name": "tooling", "argv": ["sh"], "cwd": "/root/repo", "user": "root",
    "stdin_mode": "detached", "tty": False, "tags": [], "pid": 7, "signal": "", "reason": "",
    "created_unix_ns": 1, "started_unix_ns": 1, "ended_unix_ns": 0, "attached": False,
}  # fmt: skip


def session(state: str, code: int | None = None, **changes: Any) -> dict[str, Any]:
    return {"result": {**_SESSION, "state": state, "code": code, **changes}}


@pytest.mark.asyncio
async def test_mise_file_without_a_network_is_refused_before_a_vm_exists(
    world: World, project: Path
) -> None:
    git(project, "add", "mise.toml")
    with pytest.raises(BangerError, match="mise.toml") as caught:
        await bootstrap.plan(daemon_of(world), shipment(project), nat=False)
    assert caught.value.code == "bad_request"
    assert "--nat" in (caught.value.hint or "") and "--no-bootstrap" in (caught.value.hint or "")
    made = await bootstrap.plan(daemon_of(world), shipment(project), nat=True)
    assert made.mise_files == ("mise.toml",)


@pytest.mark.asyncio
async def test_pinned_tools_without_a_network_are_left_out_with_a_message(
    world: World, project: Path
) -> None:
    heard = Heard()
    vm = await world.create()
    made = await bootstrap.plan(daemon_of(world), shipment(project), nat=False)
    vm = await bootstrap.begin(daemon_of(world), vm, shipment(project), made, heard)
    assert vm.bootstrap is None
    assert "go@1.21, node@22" in heard.warnings[0]
    assert "--nat" in heard.warnings[0]


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ({"missing": {"result": {"missing": ["mise", "/root/.local/bin/mise"]}}}, "has no mise"),
        (
            {
                "missing": {"result": {"missing": []}},
                "session.start": {"error": {"code": "operation_failed", "message": "too many run"}},
            },
            "too many run",
        ),
        ({}, "missing"),
    ],
)
async def test_bootstrap_that_cannot_begin_is_a_warning(
    world: World, project: Path, answers: dict[str, Any], expected: str
) -> None:
    heard = Heard()
    vm = await world.create(nat=True)
    world.driver.guests[vm.id].answers = answers
    vm = await bootstrap.begin(daemon_of(world), vm, shipment(project), PLAN, heard)
    assert vm.bootstrap is None
    assert expected in heard.warnings[0]


@pytest.mark.asyncio
async def test_empty_plan_asks_the_guest_for_nothing(world: World, project: Path) -> None:
    vm = await world.create(nat=True)
    assert await bootstrap.begin(
        daemon_of(world), vm, shipment(project), ToolPlan(), Heard()
    ) == vm  # fmt: skip
    assert world.driver.guests[vm.id].asked == []


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("answer", "state", "problem"),
    [
        (session("running"), "running", None),
        (session("exited", 0), "done", None),
        (session("exited", 1), "failed", "status 1"),
        (session("exited", signal="KILL"), "failed", "KILL"),
        (session("lost", reason="its guest was stopped"), "failed", "its guest was stopped"),
        ({"error": {"code": "not_found", "message": "no"}}, "failed", "its session is gone"),
        ({"error": {"code": "operation_failed", "message": "busy"}}, "running", None),
    ],
)
async def test_record_says_how_the_session_ended(
    world: World, project: Path, answer: dict[str, Any], state: str, problem: str | None
) -> None:
    vm = await world.create(nat=True)
    world.driver.guests[vm.id].answers = {
        "missing": {"result": {"missing": ["mise"]}},
        "session.start": session("running"),
        "session.show": answer,
    }
    vm = await bootstrap.begin(daemon_of(world), vm, shipment(project), PLAN, Heard())
    log = "/root/.cache/banger/vm-run-tooling-project.log"
    assert vm.bootstrap == Bootstrap(state="running", log=log, session="tooling")
    vm = await bootstrap.settle(daemon_of(world), vm)
    ended = cast("Bootstrap", vm.bootstrap)
    assert (ended.state, ended.problem) == (state, problem)
    assert world.store.resolve("web").bootstrap == ended


@pytest.mark.asyncio
async def test_bootstrap_of_a_vm_that_was_stopped_has_failed(world: World) -> None:
    vm = await world.create(start=False)
    vm = world.store.update(vm.id, bootstrap=Bootstrap(state="running", log="x", session="tooling"))
    ended = (await bootstrap.settle(daemon_of(world), vm)).bootstrap
    assert ended is not None
    assert ended.state == "failed"
