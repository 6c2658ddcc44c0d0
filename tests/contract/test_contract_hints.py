"""Hints name commands that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_hint_that_names_a_command_names_one_that_exists() -> None:
    """A hint is the next command to type: it has to be one."""
    import click

    from banger.cli.app import app

    wrong = []
    for path in sorted((ROOT / "src" / "banger").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.keyword) and node.arg == "hint"):
                continue
            for words in _commands(node.value):
                command: click.Command | None = app
                for word in words:
                    if isinstance(command, click.Group) and not word.startswith("-"):
                        command = command.get_command(click.Context(command), word)
                        if command is None:
                            wrong.append(f"{path.name}:{node.value.lineno}: {' '.join(words)}")
                            break
    assert not wrong, "\n".join(wrong)


def _commands(hint: ast.expr) -> list[list[str]]:
    """The banger commands in a hint; what is filled in at run time is X."""
    found = []
    for node in ast.walk(hint):
        if isinstance(node, ast.JoinedStr):
            text = "".join(
                str(part.value) if isinstance(part, ast.Constant) else "X" for part in node.values
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = node.value
        else:
            continue
        if m := re.match(r"(?:BANGER_MODE=user |sudo )?banger ([a-zX].*)", text):
            words = m[1].split()
            # `banger {kind} list`: a group that is filled in is looked at in its callers' tests.
            if words[0] != "X":
                found.append(words)
    return found
