"""Kernels that are built here: `recipes/kernels/NAME.toml` with its configuration fragment.

Recipes are data, strict and read once per build. The keys that may have signed a tarball lie in
`recipes/keys`, each in the file that is named after its fingerprint.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Literal

import msgspec

from banger.config.resources import recipes_directory
from banger.decoding import MALFORMED, decode_toml
from banger.errors import BangerError
from banger.kernel.fragment import parse_fragment
from banger.names import check_entry_name

if TYPE_CHECKING:
    from pathlib import Path

_FINGERPRINT = re.compile(r"[0-9A-F]{40}")
_HINT = "banger kernel list --available"


class Signer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[[signers]]`: a primary key that may have signed a tarball."""

    name: str
    fingerprint: str

    def __post_init__(self) -> None:
        if not _FINGERPRINT.fullmatch(self.fingerprint):
            raise ValueError(f"the fingerprint of {self.name} must be 40 upper-case hex digits")


class KernelRecipe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A recipe as its TOML says it. `series` is `6.12` for releases 6.12.*."""

    name: str
    distro: str
    arch: Literal["amd64"]
    series: str
    package: str
    suite: str
    fragment: str
    description: str = ""
    signers: tuple[Signer, ...] = ()

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[0-9]+\.[0-9]+", self.series):
            raise ValueError(f"series {self.series!r} must be like 6.12")
        if not re.fullmatch(r"[a-z0-9][a-z0-9+.-]+", self.package):
            raise ValueError(f"package {self.package!r} is no package name")
        if not re.fullmatch(r"[A-Za-z0-9._-]+\.config", self.fragment):
            raise ValueError(f"fragment {self.fragment!r} must be the name of a .config beside it")


def list_build_recipes() -> tuple[KernelRecipe, ...]:
    """All shipped recipes of kernels, by name."""
    return tuple(get_build_recipe(path.stem) for path in sorted(_directory().glob("*.toml")))


def find_build_recipe(name: str) -> KernelRecipe | None:
    """The recipe of this name, or None."""
    path = _directory() / f"{check_entry_name(name, 'kernel')}.toml"
    try:
        recipe = decode_toml(path.read_bytes(), type=KernelRecipe)
    except FileNotFoundError:
        return None
    except (OSError, *MALFORMED) as e:
        raise BangerError("bad_request", f"reading the recipe {path}: {e}", hint=_HINT) from e
    if recipe.name != name:
        raise BangerError(
            "bad_request", f"reading the recipe {path}: its name is {recipe.name}", hint=_HINT
        )
    return recipe


def get_build_recipe(name: str) -> KernelRecipe:
    """As `find_build_recipe`, but a missing one is not_found."""
    recipe = find_build_recipe(name)
    if recipe is None:
        raise BangerError("not_found", f"there is no recipe of a kernel {name!r}", hint=_HINT)
    return recipe


def read_options(recipe: KernelRecipe) -> dict[str, str | None]:
    """The recipe's own fragment.

    Raises:
        BangerError: as `parse_fragment`; not_found.
    """
    path = _directory() / recipe.fragment
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as e:
        raise BangerError("not_found", f"reading {path}: {e.strerror}", hint=_HINT) from e
    return parse_fragment(text, what=str(path))


def read_signing_keys(recipe: KernelRecipe) -> tuple[bytes, ...]:
    """The shipped keys of the recipe's signers, as OpenPGP exported them (armoured)."""
    directory = recipes_directory() / "keys"
    return tuple((directory / f"{s.fingerprint}.asc").read_bytes() for s in recipe.signers)


def _directory() -> Path:
    return recipes_directory() / "kernels"
