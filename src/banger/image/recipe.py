"""Image recipes: TOML documents that say what goes into a root filesystem.

Recipes are data, strict and read once per build. Paths in a recipe are relative to its directory.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from banger.config.resources import recipes_directory
from banger.decoding import decode_toml
from banger.errors import BangerError
from banger.names import check_entry_name
from banger.oci.reference import FileReference, parse_reference

if TYPE_CHECKING:
    from collections.abc import Iterable

_MODE = re.compile(r"0[0-7]{3,4}")
# Of any distribution; none is an option or holds what a shell or a list would take for its own.
_PACKAGE = re.compile(r"[A-Za-z0-9@][A-Za-z0-9@._+:/=~<>-]{0,199}")
_DISTRO = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_NPM_PACKAGE = re.compile(r"(@[a-z0-9][a-z0-9._-]*/)?[a-z0-9][a-z0-9._-]*")
_VERSION = re.compile(r"[0-9][A-Za-z0-9.+-]*")


Manager = Literal["apt-get", "apk", "dnf", "pacman", "zypper", "xbps-install"]
"""A package manager, as the guest agent names it."""


class RecipeFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[[files]]`: a file put into the image after all scripts; either `source` or `content`."""

    path: str
    source: str | None = None
    content: str | None = None
    mode: str = "0644"
    managers: tuple[Manager, ...] = ()
    """Only for guests with one of these; for all when there is none."""

    def __post_init__(self) -> None:
        _check_target(self.path)
        _check_mode(self.mode)
        if (self.source is None) == (self.content is None):
            raise ValueError(f"{self.path}: exactly one of source and content")


class NpmDownload(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[[downloads]]`: one program out of an npm package, which the host's npm client fetches.

    `sha512` is the hex digest of the package archive; `member` the file's path inside it. A missing
    optional download is recorded with the image instead of failing the build.
    """

    name: str
    npm: str
    version: str
    sha512: str
    member: str
    path: str
    mode: str = "0755"
    optional: bool = False
    managers: tuple[Manager, ...] = ()

    def __post_init__(self) -> None:
        _check_target(self.path)
        _check_mode(self.mode)
        if not re.fullmatch(r"[0-9a-f]{128}", self.sha512):
            raise ValueError(f"{self.name}: sha512 must be 128 hex digits")
        # They become arguments of a program: nothing that looks like an option or a place.
        if not _NPM_PACKAGE.fullmatch(self.npm) or not _VERSION.fullmatch(self.version):
            raise ValueError(f"{self.name}: npm must be a package name and version a version")


class Recipe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A recipe as its TOML says it. Unknown keys are refused.

    `from` is where its root comes from: `debootstrap`; `image:NAME`, an image that is here or in
    the catalog; `oci:REF`, a container image; `archive`, a file that whoever builds it names. From
    all but the first a machine is booted, which installs and runs the rest.
    """

    name: str
    distro: str
    arch: tuple[Literal["amd64"], ...]
    source: str = msgspec.field(name="from")
    suite: str | None = None
    kernel_ref: str | None = None
    packages: tuple[str, ...] = ()
    variant: Literal["essential", "apt", "minbase"] = "minbase"
    description: str = ""
    features: tuple[str, ...] = ()
    exclude_paths: tuple[str, ...] = ()
    include_paths: tuple[str, ...] = ()
    scripts: tuple[str, ...] = ()
    files: tuple[RecipeFile, ...] = ()
    downloads: tuple[NpmDownload, ...] = ()

    @property
    def bootstrapped(self) -> bool:
        """Made on the host out of packages, not from the system of another image."""
        return self.source == "debootstrap"

    def __post_init__(self) -> None:
        if not _DISTRO.fullmatch(self.distro):
            raise ValueError(f"distro {self.distro!r} is no distribution's name")
        if self.bootstrapped:
            self._check_bootstrapped()
        else:
            self._check_base()
        if bad := [p for p in self.packages if not _PACKAGE.fullmatch(p)]:
            raise ValueError(f"packages: {bad[0]!r} is no package name")
        if bad := [p for p in (*self.exclude_paths, *self.include_paths) if not p.startswith("/")]:
            raise ValueError(f"exclude_paths and include_paths must be absolute: {bad[0]!r}")
        paths = [f.path for f in self.files] + [d.path for d in self.downloads]
        if len(set(paths)) != len(paths):
            raise ValueError("two files or downloads have the same path")

    def _check_bootstrapped(self) -> None:
        if self.distro != "debian" or self.suite is None or self.kernel_ref is None:
            raise ValueError("from debootstrap needs distro debian, a suite and a kernel_ref")
        if not re.fullmatch(r"[a-z][a-z0-9-]*", self.suite):
            raise ValueError(f"suite {self.suite!r} is no suite's name")

    def _check_base(self) -> None:
        if self.suite is not None or self.exclude_paths or self.include_paths:
            raise ValueError("suite, exclude_paths and include_paths belong to from debootstrap")
        kind, _, name = self.source.partition(":")
        if kind == "image":
            check_entry_name(name, "image")
        elif kind == "oci":
            if isinstance(parse_reference(name), FileReference):
                raise ValueError(f"from {self.source!r}: a registry's image is meant")
        elif self.source != "archive":
            raise ValueError(
                f"from {self.source!r} is none of debootstrap, image:NAME, oci:REF, archive"
            )


class LoadedRecipe(msgspec.Struct, frozen=True, kw_only=True):
    """A recipe with all the files of its directory that it names, by the names it uses."""

    recipe: Recipe
    origin: Path
    text: bytes
    sources: dict[str, bytes]


def load_recipe(name_or_path: str) -> LoadedRecipe:
    """Read the shipped recipe of this name, or the recipe file at this path (with `/` or `.toml`).

    Raises:
        BangerError: not_found: no such recipe. bad_request: it is no valid recipe; the message
            names the file and the key.
    """
    if "/" in name_or_path or name_or_path.endswith(".toml"):
        origin = Path(name_or_path)
    else:
        origin = recipes_directory() / f"{check_entry_name(name_or_path, 'image')}.toml"
    doing = f"reading the recipe {name_or_path}"
    try:
        text = origin.read_bytes()
    except FileNotFoundError as e:
        raise BangerError(
            "not_found",
            f"there is no recipe {name_or_path!r}; shipped are {', '.join(list_recipes())}",
            hint="banger image build --help",
        ) from e
    except OSError as e:
        raise BangerError("bad_request", f"{doing}: {e.strerror}", hint=f"ls -l {origin}") from e
    try:
        recipe = decode_toml(text, type=Recipe)
        check_entry_name(recipe.name, "image")
        sources = read_sources(origin.parent, (*recipe.scripts, *recipe.files))
    except (msgspec.DecodeError, ValueError, BangerError) as e:
        raise BangerError("bad_request", f"{doing}: {e}", hint=f"$EDITOR {origin}") from e
    return LoadedRecipe(recipe=recipe, origin=origin, text=text, sources=sources)


def list_recipes() -> tuple[str, ...]:
    """The names of the shipped recipes."""
    return tuple(sorted(path.stem for path in recipes_directory().glob("*.toml")))


def read_sources(directory: Path, named: Iterable[str | RecipeFile]) -> dict[str, bytes]:
    """The contents of scripts and files below `directory`, by the names they are called.

    Raises:
        ValueError: one cannot be read, or is outside the directory.
    """
    names = (x if isinstance(x, str) else x.source for x in named)
    return {name: _read_source(directory, name) for name in names if name is not None}


def check_package(name: str) -> str:
    """Raises BangerError, bad_request, for what no package manager takes for a package."""
    if not _PACKAGE.fullmatch(name):
        raise BangerError(
            "bad_request", f"{name[:80]!r} is no package name", hint="banger image build --help"
        )
    return name


def _read_source(directory: Path, name: str) -> bytes:
    path = directory / name
    if Path(name).is_absolute() or not path.resolve().is_relative_to(directory.resolve()):
        raise ValueError(f"{name!r} is outside the recipe's directory")
    try:
        return path.read_bytes()
    except OSError as e:
        raise ValueError(f"{name}: {e.strerror}") from e


def _check_target(path: str) -> None:
    parts = path.split("/")
    if parts[0] or len(parts) < 2 or any(part in ("", ".", "..") for part in parts[1:]):
        raise ValueError(f"path {path!r} must be absolute and plain")


def _check_mode(mode: str) -> None:
    if not _MODE.fullmatch(mode):
        raise ValueError(f"mode {mode!r} must be octal digits like 0644")
