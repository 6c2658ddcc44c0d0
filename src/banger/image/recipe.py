"""Image recipes: TOML documents that say what goes into a root filesystem.

Recipes are data, strict and read once per build. Paths in a recipe are relative to its directory.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

import msgspec

from banger.config.resources import recipes_directory
from banger.errors import BangerError
from banger.names import check_entry_name

_MODE = re.compile(r"0[0-7]{3,4}")
_PACKAGE = re.compile(r"[a-z0-9][a-z0-9+.-]+(=[A-Za-z0-9.+:~-]+)?")
_NPM_PACKAGE = re.compile(r"(@[a-z0-9][a-z0-9._-]*/)?[a-z0-9][a-z0-9._-]*")
_VERSION = re.compile(r"[0-9][A-Za-z0-9.+-]*")


class RecipeFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[[files]]`: a file put into the image after all scripts; either `source` or `content`."""

    path: str
    source: str | None = None
    content: str | None = None
    mode: str = "0644"

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

    def __post_init__(self) -> None:
        _check_target(self.path)
        _check_mode(self.mode)
        if not re.fullmatch(r"[0-9a-f]{128}", self.sha512):
            raise ValueError(f"{self.name}: sha512 must be 128 hex digits")
        # They become arguments of a program: nothing that looks like an option or a place.
        if not _NPM_PACKAGE.fullmatch(self.npm) or not _VERSION.fullmatch(self.version):
            raise ValueError(f"{self.name}: npm must be a package name and version a version")


class Recipe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A recipe as its TOML says it. Unknown keys are refused."""

    name: str
    distro: Literal["debian"]
    suite: str
    arch: tuple[Literal["amd64"], ...]
    source: Literal["debootstrap"] = msgspec.field(name="from")
    kernel_ref: str
    packages: tuple[str, ...]
    variant: Literal["essential", "apt", "minbase"] = "minbase"
    description: str = ""
    features: tuple[str, ...] = ()
    exclude_paths: tuple[str, ...] = ()
    include_paths: tuple[str, ...] = ()
    scripts: tuple[str, ...] = ()
    files: tuple[RecipeFile, ...] = ()
    downloads: tuple[NpmDownload, ...] = ()

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9-]*", self.suite):
            raise ValueError(f"suite {self.suite!r} is no suite's name")
        if bad := [p for p in self.packages if not _PACKAGE.fullmatch(p)]:
            raise ValueError(f"packages: {bad[0]!r} is no package name")
        if bad := [p for p in (*self.exclude_paths, *self.include_paths) if not p.startswith("/")]:
            raise ValueError(f"exclude_paths and include_paths must be absolute: {bad[0]!r}")
        paths = [f.path for f in self.files] + [d.path for d in self.downloads]
        if len(set(paths)) != len(paths):
            raise ValueError("two files or downloads have the same path")


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
        recipe = msgspec.toml.decode(text, type=Recipe)
        check_entry_name(recipe.name, "image")
        sources = {name: _read_source(origin.parent, name) for name in _named_sources(recipe)}
    except (msgspec.DecodeError, ValueError) as e:
        raise BangerError("bad_request", f"{doing}: {e}", hint=f"$EDITOR {origin}") from e
    return LoadedRecipe(recipe=recipe, origin=origin, text=text, sources=sources)


def list_recipes() -> tuple[str, ...]:
    """The names of the shipped recipes."""
    return tuple(sorted(path.stem for path in recipes_directory().glob("*.toml")))


def _named_sources(recipe: Recipe) -> tuple[str, ...]:
    return (*recipe.scripts, *(f.source for f in recipe.files if f.source is not None))


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
