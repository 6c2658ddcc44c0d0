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
_MOST_WORD = 200


def main() -> None:
    """Run one command line and exit."""
    _open_standard_streams()
    gc.set_threshold(_GC_THRESHOLD)
    try:
        status = _run(sys.argv[1:])
        sys.stdout.flush()
    except OSError as e:
        status = _explain(e)
    gc.freeze()  # the process ends: nothing is worth a last collection
    sys.exit(status)


def _explain(e: OSError) -> int:
    from banger.cli.guest_command import split
    from banger.errors import find_disk_full

    lost = _find_lost_output()
    if isinstance(lost or e, BrokenPipeError):
        return 1  # the reader of our output has gone, and knows it
    if lost is not None:
        # Where it was stderr this goes nowhere.
        sys.stderr.write(f"banger: writing the output: {lost.strerror}\n")
        return 1
    full = find_disk_full(e)
    if full is None:
        raise e
    _show(full, split(sys.argv[1:])[0])
    return 1


def _find_lost_output() -> OSError | None:
    """Why stdout or stderr takes no more. What waits for it is given up: Python would try again
    while it exits, and complain."""
    lost = None
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as e:
            lost = lost or e
            null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
            os.dup2(null, stream.fileno())
            os.close(null)
    return lost


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
    if argv == ["--version"]:
        from banger.cli.version import version_line

        sys.stdout.write(version_line() + "\n")
        return 0
    import click

    from banger.cli.app import app
    from banger.cli.guest_command import GuestCommand, split
    from banger.errors import BangerError, find_disk_full

    if os.environ.get("_BANGER_COMPLETE", "").startswith("powershell"):
        import banger.cli.completion  # noqa: F401 - a shell that click does not know by itself
    ours, guest = split(argv)
    try:
        for text in guest or ():
            text.encode()  # before a VM is made for it
        status = app.main(
            args=ours, prog_name="banger", standalone_mode=False, obj=GuestCommand(guest)
        )
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
        from banger.cli.errors import harmless

        notes = map(harmless, getattr(e.__cause__ or e, "__notes__", []))
        sys.stderr.write("\n".join(["banger: interrupted", *notes]) + "\n")
        return 130
    except BangerError as e:
        _show(find_disk_full(e) or e, ours)
        return 2 if e.reason == "usage" else 1
    except UnicodeEncodeError as e:
        # Words that are no text come as surrogates (PEP 383), and no message can hold them.
        word = os.fsencode(str(e.object)[max(0, e.end - _MOST_WORD) : e.end])
        _show(BangerError("bad_request", f"{word!r} is not UTF-8", reason="usage"), ours)
        return 2


def _show(error: BangerError, ours: list[str]) -> None:
    from banger.cli.errors import show_error

    show_error(error, as_json="--json" in ours)


if __name__ == "__main__":
    main()
