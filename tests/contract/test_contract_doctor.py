"""The table of checks: what was promised, documented, and mended by commands that exist."""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from banger.cli.app import app
from banger.config.settings import Settings
from banger.doctor.table import CHECKS

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "doctor.md"
NAMES = [check.name for check in CHECKS]

# What doctor is promised to look at → the checks that do.
PROMISED = {
    "architecture, version": ("architecture", "version"),
    "vmm": ("vmm",),
    "firecracker": ("firecracker",),
    "jailer": ("jailer",),
    "kvm access": ("kvm access",),
    "qemu": ("qemu",),
    "host tools": ("host tools",),
    "helper": ("helper", "units"),
    "installed files": ("installed files",),
    "daemon, store": ("daemon", "store"),
    "directories": ("directories",),
    "disk space, memory": ("disk space", "memory"),
    "network": ("network", "bridge", "packet filter", "forwarding"),
    "leases": ("leases", "leftovers"),
    "vm dns": ("vm dns",),
    "resolver": ("resolver",),
    "agent": ("agent",),
    "default image, default kernel": ("default image", "default kernel"),
    "ssh key, ssh_config": ("ssh key", "ssh_config"),
    "config, vm defaults": ("config", "vm defaults"),
    "file_sync, clock": ("file_sync", "clock"),
    "cgroup2, user namespaces, caches": ("cgroup", "user namespaces", "cache"),
}


def test_every_promised_row_has_its_checks() -> None:
    assert sorted(NAMES) == sorted(name for names in PROMISED.values() for name in names)
    assert len(set(NAMES)) == len(NAMES)


def test_file_sync_is_looked_at_as_soon_as_it_can_be_configured() -> None:
    assert ("file_sync" in Settings.__struct_fields__) == ("file_sync" in NAMES)


def reference() -> str:
    """The table of docs/doctor.md."""
    lines = ["| Row | Looks at | Mended by |", "|---|---|---|"]
    for check in CHECKS:
        fix = " (`--fix`)" if check.fix is not None and "--fix" not in check.mends else ""
        where = "".join(f" *({need})*" for need in check.needs)
        lines.append(f"| {check.name}{where} | {check.meaning} | {check.mends}{fix} |")
    return "\n".join(lines) + "\n"


def test_the_reference_is_the_table() -> None:
    text = DOCUMENT.read_text()
    start = text.index("| Row |")
    end = text.index("\n\n", start) + 1
    if os.environ.get("BANGER_RENEW"):
        text = text[:start] + reference() + text[end:]
        DOCUMENT.write_text(text)
        end = text.index("\n\n", start) + 1
    assert text[start:end] == reference(), "BANGER_RENEW=1 writes the table anew"


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_a_check_says_what_it_looks_at_and_what_mends_it(check: object) -> None:
    meaning, mends = getattr(check, "meaning"), getattr(check, "mends")  # noqa: B009
    for text in (meaning, mends):
        assert text and not text.endswith(".") and "|" not in text


def commands() -> Iterator[tuple[str, str]]:
    """Every command of a row, with its place; what is filled in at run time is X."""
    for path in sorted((ROOT / "src" / "banger" / "doctor").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                text = "".join(
                    str(part.value) if isinstance(part, ast.Constant) else "X"
                    for part in node.values
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                text = node.value
            else:
                continue
            for found in re.findall(r"(?:^|`|&& )(?:sudo )?banger ([a-z][^`&]*)", text):
                yield f"{path.name}:{node.lineno}", found


def test_every_banger_command_of_a_row_exists() -> None:
    wrong = []
    for place, text in commands():
        command: click.Command | None = app
        for word in text.split():
            if not isinstance(command, click.Group) or word.startswith("-"):
                break
            command = command.get_command(click.Context(command), word)
            if command is None:
                wrong.append(f"{place}: banger {text}")
                break
    assert not wrong, "\n".join(wrong)
