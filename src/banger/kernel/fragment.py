"""Kernel configuration fragments: what a build asks for, and whether the sources gave it.

A fragment is a piece of a `.config`: `CONFIG_X=y`, `CONFIG_X="text"`, `# CONFIG_X is not set`, and
comments. Functions over texts; only `find_defined` reads files.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from banger.errors import BangerError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

LIMIT_BYTES = 256 << 10

_SET = re.compile(r'CONFIG_([A-Za-z0-9_]+)=(y|n|m|-?[0-9]+|0x[0-9A-Fa-f]+|"(?:[^"\\\n]|\\.)*")')
_UNSET = re.compile(r"# CONFIG_([A-Za-z0-9_]+) is not set")
_DEFINITION = re.compile(r"^[ \t]*(?:menu)?config[ \t]+([A-Za-z0-9_]+)[ \t]*$", re.MULTILINE)


def parse_fragment(text: str, *, what: str) -> dict[str, str | None]:
    """Option → value as it is written; None for one that must be off.

    Raises:
        BangerError: bad_request, naming `what` and the line: it is none of the forms above, an
            option comes twice, or asks for a module, which these kernels do not have.
    """
    if len(text.encode()) > LIMIT_BYTES:
        raise _bad(what, f"it is larger than {LIMIT_BYTES >> 10} KiB")
    options: dict[str, str | None] = {}
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.strip()
        found = _UNSET.fullmatch(line) or _SET.fullmatch(line)
        if found is None:
            if line and not line.startswith("#"):
                raise _bad(what, f"line {number} is no configuration: {line[:80]}")
            continue
        name = found[1]
        value = found[2] if found.re is _SET else None
        if value == "m":
            raise _bad(what, f"line {number}: CONFIG_{name} can be y or n, there are no modules")
        if name in options:
            raise _bad(what, f"line {number}: CONFIG_{name} comes a second time")
        options[name] = None if value == "n" else value
    return options


def format_options(options: Mapping[str, str | None]) -> str:
    """The options as a fragment, in their order."""
    return "".join(f"{_line(name, value)}\n" for name, value in options.items())


def find_lost(options: Mapping[str, str | None], config: str) -> tuple[str, ...]:
    """The names of options that a finished `.config` has otherwise than they were asked for."""
    values = dict(re.findall(r"^CONFIG_(\w+)=(.*)$", config, re.MULTILINE))
    return tuple(name for name, value in options.items() if values.get(name) != value)


def explain_lost(
    lost: Iterable[str], options: Mapping[str, str | None], defined: frozenset[str]
) -> str:
    """Why each of these did not survive, in words; `defined` is what the sources know."""
    unknown = [f"CONFIG_{name}" for name in lost if name not in defined]
    undone = [_line(name, options[name]) for name in lost if name in defined]
    parts = []
    if unknown:
        parts.append(f"the sources have no option {', '.join(unknown)}")
    if undone:
        parts.append(
            f"{', '.join(undone)} did not survive: what it needs is off, or another option that "
            "is on decides it"
        )
    return "; ".join(parts)


def find_defined(tree: Path, names: Iterable[str]) -> frozenset[str]:
    """Those of these options that some Kconfig file of a source tree defines."""
    wanted = set(names)
    found: set[str] = set()
    for path in tree.rglob("Kconfig*"):
        if path.is_file():
            found |= wanted & set(_DEFINITION.findall(path.read_text("utf-8", "replace")))
    return frozenset(found)


def _line(name: str, value: str | None) -> str:
    return f"# CONFIG_{name} is not set" if value is None else f"CONFIG_{name}={value}"


def _bad(what: str, problem: str) -> BangerError:
    return BangerError(
        "bad_request", f"reading {what}: {problem}", hint="banger kernel build --help"
    )
