"""`python3 -m tools.install install|uninstall PREFIX`: a user-mode installation from the wheel.

PREFIX/lib/banger/user is a virtual environment of its own with the locked dependencies, made beside
its place and then put there; PREFIX/bin gets links. (`banger system install` has its releases in
/usr/local/lib/banger/versions, and takes over the links of that prefix.) Uninstalling stops the
caller's daemon, removes both and leaves images, kernels, VMs and keys where they are.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tools.setup import SCRIPTS
from tools.steps import ROOT, StepFailed, cache_dir, run, say, state_dir


def install(prefix: Path) -> None:
    """Install the wheel of `dist/` under `prefix`, over an older installation if there is one."""
    wheels = list((ROOT / "dist").glob("*.whl"))
    if len(wheels) != 1:
        raise StepFailed("dist/ holds no wheel: make build")
    home = prefix / "lib" / "banger" / "user"
    # An environment knows its own path, so it is made in its final place under a changing name.
    current = home / "current"
    place = home / ("a" if _target(current) != "a" else "b")
    shutil.rmtree(place, ignore_errors=True)
    home.mkdir(parents=True, exist_ok=True)
    pip: list[str | Path] = [
        place / "bin" / "python",
        "-m",
        "pip",
        "--disable-pip-version-check",
        "--no-input",
    ]
    quiet = {"PIP_ROOT_USER_ACTION": "ignore"}
    say(f"install: {place}")
    run([sys.executable, "-m", "venv", place], log="install")
    lock = ROOT / "requirements.lock"
    run([*pip, "install", "--require-hashes", "-r", lock], log="install", env=quiet)
    run([*pip, "install", "--no-deps", "--no-index", wheels[0]], log="install", env=quiet)
    old = home / (_target(current) or "none")
    _link(current, Path(place.name))
    (prefix / "bin").mkdir(exist_ok=True)
    for name in SCRIPTS:
        _link(prefix / "bin" / name, current / "bin" / name)
        say(f"install: {prefix / 'bin' / name}")
    shutil.rmtree(old, ignore_errors=True)


def uninstall(prefix: Path) -> None:
    """Stop the daemon, remove programs and links, and name what stays."""
    home = prefix / "lib" / "banger" / "user"
    program = home / "current" / "bin" / "banger"
    if program.exists():
        user_mode = {**os.environ, "BANGER_MODE": "user"}
        done = subprocess.run([program, "daemon", "stop"], env=user_mode, check=False)
        if done.returncode != 0:
            say("uninstall: the daemon could not be stopped; see above")
    for name in SCRIPTS:
        link = prefix / "bin" / name
        if link.is_symlink() and home in link.readlink().parents:
            link.unlink()
            say(f"uninstall: removed {link}")
    if home.is_dir():
        shutil.rmtree(home)
        if not any(home.parent.iterdir()):
            home.parent.rmdir()
        say(f"uninstall: removed {home}")
    for directory in (state_dir(), cache_dir()):
        if directory.is_dir():
            say(f"uninstall: kept {directory}")


def _target(link: Path) -> str:
    return str(link.readlink()) if link.is_symlink() else ""


def _link(link: Path, target: Path) -> None:
    staging = link.with_name(f".{link.name}.staging")
    staging.unlink(missing_ok=True)
    staging.symlink_to(target)
    staging.replace(link)


if __name__ == "__main__":
    try:
        verb, where = sys.argv[1:]
        {"install": install, "uninstall": uninstall}[verb](Path(where).absolute())
    except (ValueError, KeyError):
        sys.exit("usage: python3 -m tools.install install|uninstall PREFIX")
    except (StepFailed, OSError) as e:
        sys.exit(f"install: failed: {e}")
