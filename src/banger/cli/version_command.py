"""`banger version`: everything a bug report needs to say about this banger."""

from __future__ import annotations

import platform
import sys

import click

from banger import __version__
from banger.cli.draw import print_json
from banger.cli.version import version_line
from banger.config.target import choose_paths
from banger.errors import BangerError


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def version(as_json: bool) -> None:
    """Show what this banger is."""
    facts = {
        "version": __version__,
        "build": version_line(),
        "python": platform.python_version(),
        "mode": _mode(),
    }
    if as_json:
        print_json(facts)
    else:
        sys.stdout.writelines(f"{name.ljust(8)} {value}\n" for name, value in facts.items())


def _mode() -> str:
    try:
        return choose_paths().mode
    except BangerError:
        return "system"  # somebody else's, or one that cannot be read
