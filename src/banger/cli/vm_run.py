"""`banger vm run`: a VM of its own for one command or one shell."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from banger.api import params as p
from banger.api import results as r
from banger.api.records import VmRecord
from banger.cli import image_command, sizing
from banger.cli.complete import IMAGE
from banger.cli.draw import progress, quiet_option, verbose_option
from banger.cli.errors import warn
from banger.cli.server import Server
from banger.errors import BangerError

if TYPE_CHECKING:
    from banger.cli.guest_command import GuestCommand

_WORKSPACE_ONLY = ("branch", "from_ref", "include_untracked", "mode", "dry_run")


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.argument("path", required=False, type=click.Path())
@click.option("--name", help="Name of the VM [generated].")
@click.option(
    "--image", type=IMAGE, help="Image to boot [default_image_name of the configuration]."
)
@sizing.sizing_options
@click.option("--nat", is_flag=True, help="Let the VM reach the outside through this host.")
@click.option("--rm", is_flag=True, help="Delete the VM when the shell or command ends.")
@click.option("--branch", metavar="NAME", help="Check out a new branch in the guest.")
@click.option("--from", "from_ref", metavar="REF", help="Base of the new branch [HEAD].")
@click.option("--include-untracked", is_flag=True, help="Ship untracked, non-ignored files too.")
@click.option(
    "--mode",
    type=click.Choice(["shallow_overlay", "metadata_only", "full_copy"]),
    help="What of the repository goes along [shallow_overlay].",
)
@click.option("--dry-run", is_flag=True, help="Print the files that would be shipped, and stop.")
@click.option("-d", "--detach", is_flag=True, help="Leave the VM running and return.")
@click.option("--no-bootstrap", is_flag=True, help="Do not install the tools that PATH pins.")
@image_command.command_options
@click.option("-t", "--tty", is_flag=True, help="Give the command a terminal.")
@click.option("--user", help="User in the guest [root].")
@click.option(
    "--env", "env", metavar="K=V", multiple=True, help="Environment in the guest; repeatable."
)
@click.option("--allow-overcommit", is_flag=True, help="Start although the memory budget says no.")
@quiet_option
@verbose_option
@click.pass_obj
def run(guest: GuestCommand, /, path: str | None, **o: Any) -> int:
    """Create a VM, put the repository at PATH in it, and run a command or a shell.

    \b
    banger vm run ./repo -- make test      run the tests, give back their exit status
    banger vm run --rm -- script.sh        delete the VM afterwards
    banger vm run ./repo                   a shell in the checkout
    """
    _check(guest, path, o)
    workspace = _workspace(path, o)
    server = Server()
    if o["dry_run"]:
        assert workspace is not None
        from banger.cli.vm_workspace import print_shipped

        print_shipped(server, workspace)
        return 0
    size = sizing.resolve(o["vcpu"], o["memory"], o["disk_size"], o["system_overlay_size"])
    image = image_command.absolute_image(o["image"] or sizing.settings().default_image_name)
    params = p.RunVm(
        create=p.CreateVm(
            name=o["name"],
            image=image,
            vcpu=size.vcpu,
            memory_mib=size.memory_mib,
            disk_bytes=size.disk_bytes,
            overlay_bytes=size.overlay_bytes,
            nat=o["nat"],
            allow_overcommit=o["allow_overcommit"],
        ),
        workspace=workspace,
        rm=o["rm"],
        bootstrap=_bootstraps(guest, path, o),
    )
    env = parse_env(o["env"])
    if not o["quiet"]:
        sys.stderr.write(sizing.spec_line(size, image, nat=o["nat"]) + "\n")
        sys.stderr.flush()
    with (
        progress(quiet=o["quiet"], verbose=o["verbose"]) as painter,
        server.stream("vm.run", params, painter) as call,
    ):
        result = call.result(r.RunResult)
        sock = call.fd()
    if o["detach"]:
        with sock:
            _show_bootstrap(server, result, sock)
        _print_next(result)
        return 0
    return _guest_part(server, guest, result, sock, env, o)


def _check(guest: GuestCommand, path: str | None, o: dict[str, Any]) -> None:
    if path is None:
        for name in _WORKSPACE_ONLY:
            if o[name]:
                flag = "--from" if name == "from_ref" else "--" + name.replace("_", "-")
                raise click.UsageError(f"{flag} needs the PATH of a repository")
    if o["from_ref"] and not o["branch"]:
        raise click.UsageError("--from needs --branch")
    if o["detach"] and o["rm"]:
        raise click.UsageError("-d and --rm exclude each other")
    if o["detach"] and guest.argv is not None:
        raise click.UsageError("-d takes no command; run it with: banger vm exec VM -- CMD")
    image_command.check_options(
        guest.argv, default_command=o["default_command"], detach=o["detach"]
    )
    if guest.argv == ():
        raise click.UsageError("a command is missing after --")


def _bootstraps(guest: GuestCommand, path: str | None, o: dict[str, Any]) -> bool:
    """A shell, or whoever comes after -d, wants the repository's tools; a command has its own."""
    command = guest.argv is not None or o["default_command"] or o["entrypoint"]
    return path is not None and not command and not o["no_bootstrap"]


def _workspace(path: str | None, o: dict[str, Any]) -> p.ShipWorkspace | None:
    if path is None:
        return None
    return p.ShipWorkspace(
        path=str(Path(path).absolute()),
        mode=o["mode"] or "shallow_overlay",
        branch=o["branch"],
        from_ref=o["from_ref"],
        include_untracked=o["include_untracked"],
    )


def parse_env(pairs: tuple[str, ...]) -> dict[str, str]:
    """`K=V` words as a mapping. Raises click.UsageError for a word without `=` or name."""
    env = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise click.UsageError(f"--env takes K=V, not {pair!r}")
        pair.encode()  # raises what the entry explains
        env[key] = value
    return env


def _guest_part(
    server: Server,
    guest: GuestCommand,
    result: r.RunResult,
    sock: Any,
    env: dict[str, str],
    o: dict[str, Any],
) -> int:
    from banger.cli import guest_run

    name = result.vm.name
    try:
        argv = image_command.compose(
            result.image_config,
            guest.argv,
            entrypoint=o["entrypoint"],
            default_command=o["default_command"],
        )
        return guest_run.run(
            sock,
            result.access,
            argv=guest_run.through_mise(result.access, argv),
            env=env,
            user=o["user"],
            want_tty=o["tty"] or not argv,
        )
    finally:
        sock.close()
        if o["rm"]:
            _delete(server, name)
        elif not o["quiet"]:
            warn(f"VM {name} still runs; stop it with: banger vm stop {name}")


def _delete(server: Server, name: str) -> None:
    """Delete the VM of `--rm`; a second Ctrl-C does not leave half of it."""
    import signal

    old = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with contextlib.suppress(BrokenPipeError):
            server.call("vm.delete", p.VmRef(vm=name), r.Deleted)
    except BangerError as e:
        if e.code != "not_found":
            warn(f"deleting VM {name}: {e} — try: banger vm delete {name}")
    finally:
        signal.signal(signal.SIGINT, old)


def _show_bootstrap(server: Server, result: r.RunResult, sock: Any) -> None:
    """Watch the tooling bootstrap to its end; that it failed is no failure of ours."""
    from banger.cli.vm_session_stream import follow_on_stderr

    name, begun = result.vm.name, result.vm.bootstrap
    if begun is None:
        return
    look = f"banger vm session logs {name} {begun.session}"
    try:
        follow_on_stderr(sock, result.access, begun.session)
        ended = server.call("vm.show", p.VmRef(vm=result.vm.id), VmRecord).bootstrap
        if ended is not None and ended.state == "failed":
            warn(f"warning: not all tools are installed ({ended.problem}); see: {look}")
    except BangerError as e:
        warn(f"warning: what became of the tools is not known: {e}; see: {look}")
    except KeyboardInterrupt:
        warn(f"VM {name} runs, and goes on installing tools; see: {look} -f")
        raise


def _print_next(result: r.RunResult) -> None:
    name = result.vm.name
    commands = (
        f"banger vm ssh {name}",
        f"banger vm exec {name} -- CMD",
        f"banger vm acp {name}",
        f"banger vm stop {name}",
    )
    sys.stdout.write(f"{name}\n" + "".join(f"  {command}\n" for command in commands))
