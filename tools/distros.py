"""`python3 -m tools.distros rootfs|kernel|register …`: the distribution targets of the Makefile.

Thin wrappers over `banger image` and `banger kernel`; what they make lies in `build/manual/`. What
cannot be had from here is taken from a file that the caller names, and the message says so.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tools.setup import VENV
from tools.steps import BUILD, ROOT, StepFailed, say

if TYPE_CHECKING:
    from collections.abc import Sequence

MANUAL = BUILD / "manual"
RECIPES = ROOT / "recipes"
# The name of each distribution's kernel entry, and the package that it comes in.
KERNELS = {"alpine": ("alpine-virt", "linux-virt"), "void": ("void-linux", "linux")}
# What the recipe is pinned to; ALPINE_RELEASE= overrides it.
_ALPINE = "oci:alpine:"


def banger(*words: str | Path, **options: object) -> subprocess.CompletedProcess[bytes]:
    """Run this checkout's banger, with its own progress and errors."""
    return subprocess.run([VENV / "bin" / "banger", *words], check=False, **options)  # type: ignore[call-overload,no-any-return]


def build_rootfs(recipe: str, *, release: str | None, arguments: Sequence[str]) -> Path:
    """Build a recipe's root filesystem into `build/manual/`, without storing an image.

    Raises:
        StepFailed: banger has said why.
    """
    MANUAL.mkdir(parents=True, exist_ok=True)
    target = MANUAL / f"rootfs-{Path(recipe).stem}.sqfs"
    named = recipe if release is None else str(pinned_recipe(release))
    done = banger("image", "build", "--recipe", named, "--output", target, "--force", *arguments)
    if done.returncode != 0:
        raise StepFailed(f"banger image build ended with status {done.returncode}")
    return target


def pinned_recipe(release: str) -> Path:
    """Alpine's recipe for another release, as a copy with all that it refers to."""
    copy = MANUAL / "recipes"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(RECIPES, copy)
    path = copy / "alpine.toml"
    lines = path.read_text().splitlines()
    path.write_text(
        "".join(
            f'from = "{_ALPINE}{release}"\n' if line.startswith("from = ") else f"{line}\n"
            for line in lines
        )
    )
    return path


def alpine_release() -> str:
    """The release that the recipe is pinned to."""
    for line in (RECIPES / "alpine.toml").read_text().splitlines():
        if line.startswith("from = "):
            return line.partition(_ALPINE)[2].rstrip('"')
    raise StepFailed("recipes/alpine.toml names no release")


def import_kernel(distro: str, *, given: Path | None, release: str | None) -> Path:
    """Stage a distribution's kernel and make the entry of it; return the staging directory.

    `given` is its package, or a directory that one was unpacked to.

    Raises:
        StepFailed: there is none, or it cannot be used; the text names the alternative.
    """
    name, package = KERNELS[distro]
    target = MANUAL / f"{distro}-kernel"
    staging = target.with_name(f".{target.name}.staging")
    shutil.rmtree(staging, ignore_errors=True)
    (staging / "unpacked").mkdir(parents=True)
    try:
        if given is None:
            given = _fetch_package(distro, package, staging, release)
        stage_kernel(given, staging)
        shutil.rmtree(staging / "unpacked")
        shutil.rmtree(target, ignore_errors=True)
        staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    done = banger("kernel", "import", name, "--from", target, "--distro", distro, "--force")
    if done.returncode != 0:
        raise StepFailed(f"banger kernel import ended with status {done.returncode}")
    return target


def stage_kernel(given: Path, staging: Path) -> None:
    """Put `vmlinuz`, `modules` and `config` of a package into `staging`.

    Raises:
        StepFailed: it holds no kernel, or is no package.
    """
    tree = given
    if not given.is_dir():
        tree = staging / "unpacked"
        # tar tells the compression itself: gzip in Alpine's packages, zstd in Void's.
        done = subprocess.run(
            ["tar", "-xf", given, "-C", tree, "--no-same-owner", "--warning=no-unknown-keyword"],
            check=False,
        )
        if done.returncode != 0:
            raise StepFailed(f"{given} is no package that tar can unpack")
    kernel = _find(tree, ("boot/vmlinuz-*", "vmlinuz*", "boot/vmlinux-*", "vmlinux"))
    if kernel is None:
        raise StepFailed(f"{given} holds no kernel (boot/vmlinuz-…)")
    plain = "vmlinux" if kernel.name.startswith("vmlinux") else "vmlinuz"
    shutil.copy(kernel, staging / plain)
    modules = _find(tree, ("lib/modules", "usr/lib/modules", "modules"))
    if modules is not None:
        shutil.copytree(modules, staging / "modules", symlinks=True)
    config = _find(tree, ("boot/config-*", "config", ".config"))
    if config is not None:
        shutil.copy(config, staging / "config")


def _find(tree: Path, patterns: Sequence[str]) -> Path | None:
    return next((path for p in patterns for path in sorted(tree.glob(p))), None)


def _fetch_package(distro: str, package: str, staging: Path, release: str | None) -> Path:
    """Alpine's own package manager fetches it, which checks its signature, in a machine."""
    alternative = (
        f"name the package {package} or a directory that it was unpacked to: "
        f"make {distro}-kernel KERNEL=FILE; without it, `make rootfs-{distro}` and "
        f"`make {distro}-register` work with the kernel of the configuration (default_kernel_ref)"
    )
    if distro != "alpine":
        raise StepFailed(f"the kernel of {distro} cannot be fetched from here; {alternative}")
    script = f"cd /tmp && apk fetch --quiet {package} >&2 && cat {package}-*.apk"
    image = f"alpine:{release or alpine_release()}"
    path = staging / f"{package}.apk"
    with path.open("wb") as f:
        done = banger(
            "vm", "run", "--rm", "--nat", "--image", image, "--", "sh", "-c", script, stdout=f
        )
    if done.returncode != 0:
        raise StepFailed(f"Alpine's kernel could not be fetched; {alternative}")
    return path


def register(distro: str) -> None:
    """Make an image of what `build_rootfs` has built, with the distribution's kernel if it is here.

    Raises:
        StepFailed: it was not built, or banger has said why.
    """
    rootfs = MANUAL / f"rootfs-{distro}.sqfs"
    if not rootfs.is_file():
        raise StepFailed(f"{rootfs} is not there: make rootfs-{distro}")
    name = KERNELS[distro][0]
    asked = banger("kernel", "show", name, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    kernel = name if asked.returncode == 0 else _default_kernel()
    done = banger(
        "image", "register", "--name", distro, "--rootfs", rootfs, "--kernel-ref", kernel,
        "--distro", distro,
    )  # fmt: skip
    if done.returncode != 0:
        raise StepFailed(f"banger image register ended with status {done.returncode}")


def _default_kernel() -> str:
    from banger.cli.sizing import settings

    return settings().default_kernel_ref


def main(arguments: list[str]) -> int:
    """Do one target; 0, or 1 with the reason on stderr."""
    parser = argparse.ArgumentParser(prog="tools.distros", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    rootfs = commands.add_parser("rootfs")
    rootfs.add_argument("recipe")
    rootfs.add_argument("arguments", nargs="?", default="", help="more words for image build")
    for command in ("kernel", "register"):
        commands.add_parser(command).add_argument("distro", choices=sorted(KERNELS))
    options = parser.parse_args(arguments)
    release = os.environ.get("ALPINE_RELEASE") or None
    try:
        if options.command == "rootfs":
            ours = release if options.recipe == "alpine" else None
            words = shlex.split(options.arguments)
            say(f"rootfs: {build_rootfs(options.recipe, release=ours, arguments=words)}")
        elif options.command == "kernel":
            given = os.environ.get("KERNEL")
            place = import_kernel(
                options.distro,
                given=Path(given).absolute() if given else None,
                release=release,
            )
            say(f"kernel: {place}")
        else:
            register(options.distro)
    except StepFailed as e:
        print(f"{options.command}: failed: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
