"""One release as a directory that is complete in itself: `versions/<version>+<hash>/`.

It holds the programs, the packages that they need, the root helper's archive, the guest agents and
recipes, and the pinned firecracker and jailer where they were found. It appears whole by one rename
and is never changed, so what runs from it keeps its files. Everything in it is root's.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import shutil
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import banger
from banger import __version__
from banger.config.resources import agent_binary, recipes_directory
from banger.errors import BangerError
from banger.files import publish_directory, remove_tree, staging_directory
from banger.process import ProcessFailed, run
from banger.system.requirements import PROJECT, find_distributions, list_files, own_requirements
from banger.system.zipapp import helper_archive
from banger.vmm.fetch import read_pins

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

PROGRAMS = {"banger": "banger.cli.entry", "bangerd": "banger.daemon.main"}
_PACKAGE = Path(banger.__file__).resolve().parent
_LARGEST_PROGRAM = 64 << 20
_DEADLINE_S = 300.0
# Compiled from other languages, or by the program at hand: a Python of another version or build
# cannot load them, and says so here instead of in a service.
_PROOF = """
import sys
sys.path += sys.argv[1:]
import cryptography.hazmat.bindings._rust, msgspec
import banger.cli.app, banger.daemon.handlers
"""
# Big, and loaded rarely or in part: not worth the time that compiling them takes.
_NOT_COMPILED = r"/(pygments|pycparser|cffi)/"


def stage_release(
    versions: Path, *, interpreters: Sequence[Path] | None = None, programs: Iterable[Path] = ()
) -> Path:
    """Make the release of the banger that runs, unless it is there; return its directory.

    `programs` are places where firecracker and jailer may lie; only the pinned ones are taken.

    Raises:
        BangerError: something that belongs to banger is not here; or no interpreter of root's can
            run it.
    """
    with staging_directory(versions, "release") as staging:
        staging.chmod(0o755)
        library = staging / "lib"
        for place, source in sorted(_library_files().items()):
            _copy(source, library / place)
        _write(
            library / f"{PROJECT.replace('-', '_')}-{__version__}.dist-info/METADATA", _metadata()
        )
        _write(staging / "banger-root.pyz", helper_archive(_helper_package()), mode=0o755)
        for name, content in find_pinned(programs).items():
            _write(staging / "libexec" / name, content, mode=0o755)
        python = choose_interpreter(interpreters or find_interpreters(), library)
        target = versions / f"{__version__}+{_digest(staging, str(python))[:12]}"
        if target.is_dir():
            return target
        for name, module in PROGRAMS.items():
            text = _program(python, target / "lib", module)
            _write(staging / "bin" / name, text.encode(), mode=0o755)
        _compile(python, library, target / "lib")
        _make_public(staging)
        publish_directory(staging, target)
        return target


def find_interpreters() -> tuple[Path, ...]:
    """Interpreters that could run a service, the distribution's own first."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    base = Path(getattr(sys, "_base_executable", sys.executable) or sys.executable)
    places = (Path("/usr/bin/python3"), Path("/usr/bin") / version, base.resolve())
    return tuple(dict.fromkeys(places))


def choose_interpreter(interpreters: Sequence[Path], library: Path) -> Path:
    """The first interpreter that nobody but root can change and that runs these packages.

    Raises:
        BangerError: there is none; the message says what is wrong with each.
    """
    problems = []
    for python in interpreters:
        if not os.access(python, os.X_OK):
            problems.append(f"{python} is not there")
        elif (writable := find_writable(python)) is not None:
            problems.append(f"{python}: others than root can change {writable}")
        else:
            try:
                run([str(python), "-I", "-S", "-B", "-c", _PROOF, str(library)],
                    timeout_s=_DEADLINE_S)  # fmt: skip
            except ProcessFailed as e:
                last = e.stderr.splitlines()[-1] if e.stderr else str(e)
                problems.append(f"{python} cannot run it: {last}")
            else:
                return python
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    raise BangerError(
        "operation_failed",
        f"installing: this banger runs on Python {version}, and the services need one that is "
        f"root's own and loads the same compiled packages: {'; '.join(problems)}",
        hint="/usr/bin/python3 -m venv ~/.local/lib/banger",
        reason="unsupported",
    )


def find_writable(path: Path) -> Path | None:
    """The first component on the way to a file that others than root can change; links followed."""
    for part in (path.resolve(), *path.resolve().parents):
        found = part.stat()
        if found.st_uid != 0 or found.st_mode & 0o022:
            return part
    return None


def find_pinned(places: Iterable[Path]) -> dict[str, bytes]:
    """firecracker and jailer out of these directories, exactly as pinned; what is not is not taken.

    The directories may be anybody's: a file is read whole, judged by its content, and written anew.
    """
    found: dict[str, bytes] = {}
    for name, digest in read_pins().items():
        for place in places:
            content = _read_program(place / name)
            if content is not None and hashlib.sha256(content).hexdigest() == digest:
                found[name] = content
                break
    return found


def remove_other_releases(versions: Path, kept: Iterable[Path]) -> tuple[Path, ...]:
    """Remove all releases but these; what was removed."""
    names = {path.name for path in kept}
    gone = [p for p in versions.iterdir() if not p.name.startswith(".") and p.name not in names]
    for path in gone:
        remove_tree(path)
    return tuple(gone)


def _read_program(path: Path) -> bytes | None:
    # Not blocking: in somebody's directory a FIFO may have the name.
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(fd, "rb") as f:
            kind = os.fstat(fd)
            if stat.S_ISREG(kind.st_mode) and kind.st_size <= _LARGEST_PROGRAM:
                return f.read(_LARGEST_PROGRAM)
    return None


def _library_files() -> dict[str, Path]:
    """Everything on the path of the programs: place below `lib/` → the file as it is here."""
    files: dict[str, Path] = {}
    for distribution in find_distributions(own_requirements()):
        files.update(list_files(distribution))
    for package, beside in ((_PACKAGE, ("agent", "recipes")), (_helper_package(), ())):
        files.update(_tree(package, package.name, leave_out=beside))
    files.update(_tree(recipes_directory(), "banger/recipes"))
    for arch in ("amd64", "arm64"):
        # Guests of another architecture than the host's are none of today's.
        with contextlib.suppress(BangerError) if arch != "amd64" else contextlib.nullcontext():
            agent = agent_binary(arch)
            files[f"banger/agent/{agent.name}"] = agent
    return files


def _tree(top: Path, place: str, leave_out: Iterable[str] = ()) -> dict[str, Path]:
    return {
        f"{place}/{path.relative_to(top).as_posix()}": path
        for path in top.rglob("*")
        if path.is_file()
        and "__pycache__" not in path.parts
        and path.relative_to(top).parts[0] not in leave_out
    }


def _helper_package() -> Path:
    # Found, not imported: the helper's code runs in its own process only.
    spec = importlib.util.find_spec("banger_root")
    if spec is None or not spec.submodule_search_locations:
        raise BangerError(
            "not_found",
            "installing: banger's root helper is not here",
            hint="pip install --force-reinstall banger-vm",
        )
    return Path(next(iter(spec.submodule_search_locations)))


def _metadata() -> bytes:
    """So that the installed program can install itself again: PEP 566, the fields that count."""
    lines = ["Metadata-Version: 2.1", f"Name: {PROJECT}", f"Version: {__version__}"]
    lines += [f"Requires-Dist: {requirement}" for requirement in own_requirements()]
    return ("\n".join(lines) + "\n").encode()


def _program(python: Path, library: Path, module: str) -> str:
    """A program that takes nothing from its caller's environment and knows where its files are."""
    return (
        f"#!{python} -IS\n"
        "import sys\n"
        f"sys.path += [{str(library)!r}]\n"
        f"from {module} import main\n"
        "sys.exit(main())\n"
    )


def _compile(python: Path, library: Path, final: Path) -> None:
    """Compiled files, which whoever runs the programs could not write."""
    run(
        [
            str(python), "-I", "-S", "-m", "compileall", "-q", "-s", str(library), "-p", str(final),
            "-x", _NOT_COMPILED, "--invalidation-mode", "unchecked-hash", str(library),
        ],
        timeout_s=_DEADLINE_S,
    )  # fmt: skip


def _digest(top: Path, *words: str) -> str:
    digest = hashlib.sha256("\0".join(words).encode())
    for path in sorted(p for p in top.rglob("*") if p.is_file()):
        mode = path.stat().st_mode & 0o111
        digest.update(f"\0{path.relative_to(top)}\0{mode:o}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    target.chmod(0o755 if source.stat().st_mode & 0o100 else 0o644)


def _write(target: Path, content: bytes, *, mode: int = 0o644) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(content)
    target.chmod(mode)


def _make_public(top: Path) -> None:
    """Everybody may read and run it, whatever the umask of whoever installs."""
    for path in top.rglob("*"):
        if path.is_dir():
            path.chmod(0o755)
        elif path.suffix == ".pyc":
            path.chmod(0o644)
