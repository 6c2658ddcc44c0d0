"""The program `banger`: the one place that sets an exit status.

A guest command's own status passes through; everything else that fails is 1, wrong usage is 2.
`--version` is answered before anything is imported.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Run one command line and exit."""
    if sys.argv[1:] == ["--version"]:
        from banger.cli.version import version_line

        sys.stdout.write(version_line() + "\n")
        sys.exit(0)
    sys.exit(_run(sys.argv[1:]))


def _run(argv: list[str]) -> int:
    import click

    from banger.cli.app import app
    from banger.cli.guest_command import GuestCommand, split
    from banger.errors import BangerError

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
    except (click.Abort, KeyboardInterrupt):
        sys.stderr.write("banger: interrupted\n")
        return 130
    except BrokenPipeError:
        # The reader of our output has gone; Python would complain again while it exits.
        import os

        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except BangerError as e:
        from banger.cli.errors import show_error

        show_error(e, as_json="--json" in ours)
        return 2 if e.reason == "usage" else 1


if __name__ == "__main__":
    main()
