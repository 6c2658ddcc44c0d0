"""Run a command line and draw what a terminal shows of it as an SVG picture for the README.

    python -m tools.terminal_picture docs/terminal.svg -- banger vm run --rm . -- make test

The words after `--` are typed at the prompt of the picture and really run; their output is drawn
as it came, then the exit status.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

_WIDTH = 96


def main() -> None:
    """Write the picture; the exit status is the command's."""
    at = sys.argv.index("--")
    target, words = Path(sys.argv[1]), sys.argv[at + 1 :]
    program = Path(".venv/bin") / words[0]
    done = subprocess.run(
        [program if program.exists() else words[0], *words[1:]],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
        text=True,
    )
    with Path("/dev/null").open("w") as nowhere:
        console = Console(record=True, width=_WIDTH, force_terminal=True, file=nowhere)
        console.print(Text.assemble(("$ ", "bold green"), (" ".join(words), "bold")))
        console.print(Text(done.stdout.rstrip("\n")))
        console.print(Text.assemble(("$ ", "bold green"), ("echo $?", "bold")))
        console.print(Text(str(done.returncode)))
        target.write_text(_without_foreign_parts(console.export_svg(title="banger")))
    raise SystemExit(done.returncode)


def _without_foreign_parts(svg: str) -> str:
    """The picture without fonts from elsewhere: whoever looks at it asks nobody else."""
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)
    return re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)


if __name__ == "__main__":
    main()
