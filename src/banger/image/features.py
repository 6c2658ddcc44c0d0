"""Features: named parts that any recipe or build can add, as data in `recipes/features/`.

A feature knows the packages of each package manager. Which manager counts is known when the root
is: for a bootstrapped one it is apt, a machine of another image is asked. `assemble` then makes one
plain recipe of recipe, features and what was asked for beside them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from banger.config.resources import recipes_directory
from banger.decoding import MALFORMED, decode_toml
from banger.errors import BangerError
from banger.image.recipe import (
    LoadedRecipe,
    Manager,
    NpmDownload,
    Recipe,
    RecipeFile,
    check_package,
    read_sources,
)

if TYPE_CHECKING:
    from pathlib import Path

_MOST_SCRIPT = 1 << 20


class Feature(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A feature as its TOML says it. Without `packages` it works on every system."""

    description: str
    packages: dict[Manager, tuple[str, ...]] = {}
    scripts: tuple[str, ...] = ()
    files: tuple[RecipeFile, ...] = ()
    downloads: tuple[NpmDownload, ...] = ()


class Extras(msgspec.Struct, frozen=True, kw_only=True):
    """What a build adds to its recipe. Scripts are names, for messages, with their text."""

    packages: tuple[str, ...] = ()
    features: tuple[str, ...] = ()
    scripts: tuple[tuple[str, bytes], ...] = ()


def list_features() -> tuple[str, ...]:
    """The names of the shipped features."""
    return tuple(sorted(path.stem for path in _directory().glob("*.toml")))


def read_extras(
    packages: tuple[str, ...], features: tuple[str, ...], scripts: tuple[Path, ...]
) -> Extras:
    """What was asked for, checked; scripts are read.

    Raises:
        BangerError: bad_request: no package name, or a script that cannot be read; not_found: no
            such feature.
    """
    texts = []
    for path in scripts:
        try:
            with path.open("rb") as f:
                text = f.read(_MOST_SCRIPT + 1)
        except OSError as e:
            raise BangerError(
                "bad_request", f"reading the script {path}: {e.strerror}", hint=f"ls -l {path}"
            ) from e
        if len(text) > _MOST_SCRIPT:
            raise BangerError("bad_request", f"the script {path} is larger than 1 MiB")
        texts.append((path.name, text))
    for name in features:
        _load(name)
    return Extras(
        packages=tuple(check_package(name) for name in packages),
        features=tuple(dict.fromkeys(features)),
        scripts=tuple(texts),
    )


def needs_packages(loaded: LoadedRecipe, extras: Extras) -> bool:
    """Whether building this installs packages, whatever the system is."""
    names = (*loaded.recipe.features, *extras.features)
    return bool(
        loaded.recipe.packages or extras.packages or any(_load(n)[0].packages for n in names)
    )


def assemble(loaded: LoadedRecipe, extras: Extras, manager: Manager | None) -> LoadedRecipe:
    """One recipe with everything in it, for a system with this package manager.

    Features come before what was asked for beside them, so that a script finds what they brought.
    The text, which stands for the whole in caches, has all of it.

    Raises:
        BangerError: bad_request: a feature that does not know this manager, or adds what is there.
    """
    names = tuple(dict.fromkeys((*loaded.recipe.features, *extras.features)))
    packages = list(loaded.recipe.packages)
    scripts = list(loaded.recipe.scripts)
    files = list(loaded.recipe.files)
    downloads = list(loaded.recipe.downloads)
    sources = dict(loaded.sources)
    texts = [loaded.text]
    for name in names:
        feature, text = _load(name)
        texts.append(text)
        if feature.packages:
            packages += _packages_of(name, feature, manager)
        try:
            read = read_sources(_directory(), (*feature.scripts, *feature.files))
        except ValueError as e:
            raise BangerError("bad_request", f"reading the feature {name}: {e}") from e
        sources |= {f"features/{key}": value for key, value in read.items()}
        scripts += (f"features/{script}" for script in feature.scripts)
        files += (
            msgspec.structs.replace(f, source=f"features/{f.source}" if f.source else None)
            for f in feature.files
            if not f.managers or manager in f.managers
        )
        downloads += (d for d in feature.downloads if not d.managers or manager in d.managers)
    packages += extras.packages
    for number, (name, text) in enumerate(extras.scripts):
        key = f"{number}/{name}"
        sources[key] = text
        scripts.append(key)
    if extras.packages:
        texts.append(msgspec.json.encode(extras.packages))
    try:
        recipe = msgspec.structs.replace(
            loaded.recipe,
            packages=tuple(dict.fromkeys(packages)),
            scripts=tuple(scripts),
            files=tuple(files),
            downloads=tuple(downloads),
            features=names,
        )
    except ValueError as e:
        raise BangerError(
            "bad_request", f"building {loaded.recipe.name} with {', '.join(names)}: {e}"
        ) from e
    return LoadedRecipe(
        recipe=recipe, origin=loaded.origin, text=b"\0".join(texts), sources=sources
    )


def bare_recipe(name: str, base: str, distro: str) -> LoadedRecipe:
    """The recipe of a build that names only the image it begins with."""
    recipe = Recipe(name=name, distro=distro, arch=("amd64",), source=f"image:{base}")
    return LoadedRecipe(recipe=recipe, origin=recipes_directory(), text=b"", sources={})


def _packages_of(name: str, feature: Feature, manager: Manager | None) -> tuple[str, ...]:
    known = feature.packages
    if manager is None or manager not in known:
        raise BangerError(
            "bad_request",
            f"the feature {name} knows no packages for {manager or 'this system'}; it does for "
            + ", ".join(sorted(known)),
            hint="banger image build --help",
            reason="unsupported",
        )
    return known[manager]


def _load(name: str) -> tuple[Feature, bytes]:
    if name not in list_features():
        raise BangerError(
            "not_found",
            f"there is no feature {name!r}; there are {', '.join(list_features())}",
            hint="banger image build --help",
        )
    text = (_directory() / f"{name}.toml").read_bytes()
    try:
        return decode_toml(text, type=Feature), text
    except MALFORMED as e:
        raise BangerError("bad_request", f"reading the feature {name}: {e}") from e


def _directory() -> Path:
    return recipes_directory() / "features"
