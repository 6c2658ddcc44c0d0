"""The program `banger`: the one place that sets an exit status.

A guest command's own status passes through; everything else that fails is 1, wrong usage is 2.
`--version` is answered before anything is imported.
"""

from __future__ import annotations

import gc
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from banger.errors import BangerError

# Imports make many objects and no garbage; collecting among them costs a fifth of a short command.
_GC_THRESHOLD = 100_000


def main() -> None:
    """Run one command line and exit."""
    _open_standard_streams()
    if sys.argv[1:] == ["--version"]:
        from banger.cli.version import version_line

        sys.stdout.write(version_line() + "\n")
        sys.exit(0)
    gc.set_threshold(_GC_THRESHOLD)
    status = _run(sys.argv[1:])
    gc.freeze()  # the process ends: nothing is worth a last collection
    sys.exit(status)


def _open_standard_streams() -> None:
    """What our caller closed of descriptors 0 to 2 becomes /dev/null.

    Else the next socket would get the number of stdin, and a guest's output would go to it.
    """
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)
    # Python has none for a descriptor that was closed when it started.
    sys.stdin = sys.stdin or os.fdopen(0, "r", closefd=False)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)


def _run(argv: list[str]) -> int:
    import click

    from banger.cli.app import app
    from banger.cli.guest_command import GuestCommand, split
    from banger.errors import BangerError, find_disk_full

    if os.environ.get("_BANGER_COMPLETE", "").startswith("powershell"):
        import banger.cli.completion  # noqa: F401 - a shell that click does not know by itself
    ours, guest = split(argv)
    try:
        status = app.main(
            args=ours, prog_name="banger", standalone_mode=False, obj=GuestCommand(guest)
        )
        sys.stdout.flush()
        return status if isinstance(status, int) else 0
    except click.exceptions.Exit as e:
        return e.exit_code
    except click.UsageError as e:
        e.show()
        return 2
    except click.ClickException as e:
        e.show()
        return 1
    except (click.Abort, KeyboardInterrupt) as e:
        # click raises its own of a KeyboardInterrupt, which may say what became of the call.
        notes = getattr(e.__cause__ or e, "__notes__", [])
        sys.stderr.write("\n".join(["banger: interrupted", *notes]) + "\n")
        return 130
    except BrokenPipeError:
        # The reader of our output has gone; Python would complain again while it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except BangerError as e:
        _show(find_disk_full(e) or e, ours)
        return 2 if e.reason == "usage" else 1
    except OSError as e:
        if full := find_disk_full(e, doing="banger"):
            _show(full, ours)
            return 1
        raise


def _show(error: BangerError, ours: list[str]) -> None:
    from banger.cli.errors import show_error

    show_error(error, as_json="--json" in ours)


if __name__ == "__main__":
    main()
