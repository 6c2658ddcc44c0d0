"""Which tools a repository pins, decided from the text of its version files; pure.

What a mise file names is left to `mise install`. Of the rest each tool gets one exact version from
the first file that has one, and whatever is not taken has a reason. The text is hostile: a version
that is taken is a plain word, and no text makes planning fail.
"""

from __future__ import annotations

import json
import re
import tomllib
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

MISE_CONFIGURATIONS = (".mise.toml", "mise.toml")
TOOL_VERSIONS = ".tool-versions"
MISE_FILES = (*MISE_CONFIGURATIONS, TOOL_VERSIONS)

# Names that mise takes for one tool.
_ALIASES = {"golang": "go", "nodejs": "node"}
_NUMBER = re.compile(r"[0-9]{1,6}(?:\.[0-9]{1,8}){0,3}")
_GO = re.compile(r"1(?:\.[0-9]{1,4}){1,2}(?:(?:rc|beta)[0-9]{1,3})?")
_PYTHON = re.compile(
    r"[23](?:\.[0-9]{1,4}){0,2}(?:(?:a|b|rc)[0-9]{1,3})?"
    r"|(?:pypy|graalpy|miniconda|miniforge|anaconda)[0-9][0-9A-Za-z.+_-]{0,40}"
)
_RUST = re.compile(r"[0-9]{1,3}(?:\.[0-9]{1,4}){1,2}|(?:nightly|beta)-[0-9]{4}-[0-9]{2}-[0-9]{2}")
_MOST_SHOWN = 80


class ToolStep(msgspec.Struct, frozen=True, kw_only=True, order=True):
    """One `mise use`. Sorted by tool, then version."""

    tool: str
    version: str
    source: str

    @property
    def word(self) -> str:
        return f"{self.tool}@{self.version}"


class ToolSkip(msgspec.Struct, frozen=True, kw_only=True, order=True):
    """A version file that leads to no step, and why."""

    tool: str
    source: str
    reason: str


class ToolPlan(msgspec.Struct, frozen=True, kw_only=True):
    """`mise_files` are there for `mise install`."""

    mise_files: tuple[str, ...] = ()
    steps: tuple[ToolStep, ...] = ()
    skips: tuple[ToolSkip, ...] = ()

    @property
    def empty(self) -> bool:
        return not self.mise_files and not self.steps


class _Pin(NamedTuple):
    """What a file says: a version, or why it gives none."""

    version: str | None
    reason: str = ""


def plan_tools(files: Mapping[str, bytes]) -> ToolPlan:
    """The plan for the version files at the root of a repository, by name."""
    texts = {name: content.decode("utf-8", "replace") for name, content in files.items()}
    mise_files = tuple(name for name in MISE_FILES if name in texts)
    managed, unreadable = _find_managed(texts)
    steps: dict[str, ToolStep] = {}
    skips: list[ToolSkip] = []
    for tool, source, read in READERS:
        if source not in texts:
            continue
        try:
            pin = read(texts[source])
        except (ValueError, RecursionError) as e:
            pin = _Pin(None, f"it cannot be read: {_shown(str(e))}")
        if pin is None:
            continue  # the file is about something else
        if tool in managed:
            reason = f"{managed[tool]} manages {tool}"
        elif unreadable is not None:
            reason = f"{unreadable} may manage {tool}, and cannot be read"
        elif pin.version is None:
            reason = pin.reason
        elif tool in steps:
            reason = f"{steps[tool].source} says {steps[tool].version}"
        else:
            steps[tool] = ToolStep(tool=tool, version=pin.version, source=source)
            continue
        skips.append(ToolSkip(tool=tool, source=source, reason=reason))
    return ToolPlan(
        mise_files=mise_files, steps=tuple(sorted(steps.values())), skips=tuple(sorted(skips))
    )


def _find_managed(texts: Mapping[str, str]) -> tuple[dict[str, str], str | None]:
    """Tool → the mise file that manages it; and a mise file that nobody can read."""
    managed: dict[str, str] = {}
    unreadable = None
    for name in MISE_CONFIGURATIONS:
        if name not in texts:
            continue
        try:
            tools = tomllib.loads(texts[name]).get("tools", {})
        except (ValueError, RecursionError):
            tools = None
        if not isinstance(tools, dict):
            unreadable = name
            continue
        for tool in tools:
            managed.setdefault(_plain_tool(tool), name)
    for line in texts.get(TOOL_VERSIONS, "").splitlines():
        if words := line.partition("#")[0].split():
            managed.setdefault(_plain_tool(words[0]), TOOL_VERSIONS)
    return managed, unreadable


def _plain_tool(name: str) -> str:
    # `core:node` is `node` of mise's own backend.
    name = name.removeprefix("core:")
    return _ALIASES.get(name, name)


def _first_line(text: str) -> str | None:
    for line in text.splitlines():
        if word := line.partition("#")[0].strip():
            return word
    return None


def _exact(text: str | None, allowed: re.Pattern[str], what: str) -> _Pin:
    if text is None:
        return _Pin(None, "it names no version")
    if allowed.fullmatch(text):
        return _Pin(text)
    return _Pin(None, f"{_shown(text)} is {what}")


def _go_mod(text: str) -> _Pin | None:
    """The `toolchain` line, else the `go` line (go.dev/ref/mod#go-mod-file-go)."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        words = line.partition("//")[0].split()
        if len(words) == 2 and words[0] in ("go", "toolchain"):
            found.setdefault(words[0], words[1])
    toolchain = found.get("toolchain", "").removeprefix("go")
    if _GO.fullmatch(toolchain):
        return _Pin(toolchain)
    return _exact(found.get("go"), _GO, "no Go version")


def _go_version(text: str) -> _Pin:
    line = _first_line(text)
    return _exact(line.removeprefix("go") if line else None, _GO, "no Go version")


def _node_version(text: str) -> _Pin:
    line = _first_line(text)
    return _exact(_node_number(line) if line else None, _NUMBER, "an alias, not a version")


def _node_number(text: str) -> str:
    return re.sub(r"(?:\.[xX*])+\Z", "", re.sub(r"\A=?v?(?=[0-9])", "", text.strip()))


def _package_json(text: str) -> _Pin | None:
    """`volta.node`, which is always exact, else `engines.node` when it is no range."""
    document = json.loads(text)
    for table in ("volta", "engines"):
        values = document.get(table) if isinstance(document, dict) else None
        version = values.get("node") if isinstance(values, dict) else None
        if isinstance(version, str):
            return _exact(_node_number(version), _NUMBER, f"a range ({table}.node), not a version")
    return None


def _python_version(text: str) -> _Pin:
    return _exact(_first_line(text), _PYTHON, "no version that can be installed")


def _pyproject(text: str) -> _Pin | None:
    """`project.requires-python`, else Poetry's dependency, when it allows one version only."""
    document = tomllib.loads(text)
    for where, *keys in (
        ("requires-python", "project", "requires-python"),
        ("tool.poetry.dependencies.python", "tool", "poetry", "dependencies", "python"),
    ):
        value: Any = document
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        if isinstance(value, str):
            number = re.sub(r"\.\*\Z", "", value.strip().removeprefix("==").strip())
            exact = value.strip().startswith("==") or keys[0] == "tool"
            if exact and _NUMBER.fullmatch(number) and _PYTHON.fullmatch(number):
                return _Pin(number)
            return _Pin(None, f"{_shown(value)} is a range ({where}), not a version")
    return None


def _rust_toolchain(text: str) -> _Pin:
    """TOML, or in the older form of rust-toolchain one word (rustup book, "Overrides")."""
    try:
        document = tomllib.loads(text)
    except ValueError:
        document = None
    if document is None:
        channel = _first_line(text)
    else:
        table = document.get("toolchain")
        channel = table.get("channel") if isinstance(table, dict) else None
        channel = channel if isinstance(channel, str) else None
    return _exact(channel, _RUST, "a channel, not a version")


def _shown(text: str) -> str:
    short = text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}…"
    return repr(short)


# Tool, file, reader; the first file of a tool that has a version wins.
READERS: tuple[tuple[str, str, Callable[[str], _Pin | None]], ...] = (
    ("go", ".go-version", _go_version),
    ("go", "go.mod", _go_mod),
    ("node", ".nvmrc", _node_version),
    ("node", ".node-version", _node_version),
    ("node", "package.json", _package_json),
    ("python", ".python-version", _python_version),
    ("python", "pyproject.toml", _pyproject),
    ("rust", "rust-toolchain.toml", _rust_toolchain),
    ("rust", "rust-toolchain", _rust_toolchain),
)
TOOL_FILES = (*MISE_FILES, *(source for _, source, _ in READERS))


def describe(plan: ToolPlan) -> Iterator[str]:
    """The plan in lines, for the log."""
    if plan.mise_files:
        yield f"mise install: {', '.join(plan.mise_files)}"
    for step in plan.steps:
        yield f"{step.word}: {step.source}"
    for skip in plan.skips:
        yield f"{skip.tool} of {skip.source} left out: {skip.reason}"
