"""The command tree. A group imports the module of the one command that was asked for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Mapping


class LazyGroup(click.Group):
    """A group whose commands are imported when they are looked up: `name → (module:attr, help)`."""

    def __init__(self, *args: Any, lazy: Mapping[str, tuple[str, str]], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._lazy = lazy

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self._lazy)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        row = self._lazy.get(name)
        if row is None:
            return None
        module, attribute = row[0].split(":")
        command: click.Command = getattr(importlib.import_module(f"banger.cli.{module}"), attribute)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in self._lazy and not args[0].startswith("-"):
            import difflib

            near = difflib.get_close_matches(args[0], list(self._lazy), n=1)
            extra = f" Did you mean {near[0]!r}?" if near else ""
            raise click.UsageError(f"There is no command {args[0]!r}.{extra}", ctx)
        return super().resolve_command(ctx, args)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[Any]:
        # From the table, so that a tab key imports no command.
        from click.shell_completion import CompletionItem

        named = [
            CompletionItem(name, help=text)
            for name, (_, text) in self._lazy.items()
            if text and name.startswith(incomplete)
        ]
        return [*named, *click.Command.shell_complete(self, ctx, incomplete)]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        # From the table, so that help imports no command.
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in self._lazy.items() if text])


_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}

vm = LazyGroup(
    name="vm",
    context_settings=_SETTINGS,
    no_args_is_help=True,
    help="Run and look after microVMs.\n\n\b\n"
    "banger vm run ./repo -- make test    run a command in a sandbox of its own\n"
    "banger vm run --rm                   a shell in a VM that is deleted afterwards\n"
    "banger vm exec web -- uname -a       one more command in a running VM\n"
    "banger vm list                       what there is",
    lazy={
        "run": ("vm_run:run", "Create a VM, put a repository in it, run a command or a shell."),
        "create": ("vm_create:create", "Create a VM, for scripts."),
        "start": ("vm_power:start", "Start VMs."),
        "stop": ("vm_power:stop", "Stop VMs in order; their disks are kept."),
        "restart": ("vm_power:restart", "Stop and start VMs."),
        "kill": ("vm_power:kill", "End VMs at once."),
        "delete": ("vm_power:delete", "Stop VMs and remove everything they had."),
        "prune": ("vm_power:prune", "Delete every VM that does not run."),
        "list": ("vm_look:list_vms", "List VMs."),
        "show": ("vm_look:show", "Show one VM's record as JSON."),
        "logs": ("vm_look:logs", "Show a guest's console."),
        "stats": ("vm_look:stats", "Show figures of VMs as JSON."),
        "ports": ("vm_look:ports", "Show what listens inside VMs."),
        "health": ("vm_look:health", "Ask the guest's agent how it is."),
        "ping": ("vm_look:ping", "Measure the round trip to the guest's agent."),
        "exec": ("vm_exec:exec_command", "Run a command in a running VM."),
        "ssh": ("vm_ssh:ssh", "Log in to a running VM."),
        "cp": ("vm_cp:cp", "Copy files into a VM, or out of it."),
        "workspace": ("app:vm_workspace", "A repository in a VM: put it there, bring work back."),
        "session": ("app:vm_session", "Commands that go on without you."),
        "acp": ("vm_acp:acp", "Speak with a coding agent in a VM (Agent Client Protocol)."),
        "set": ("vm_set:set_sizes", "Change the sizes of VMs."),
    },
)

vm_workspace = LazyGroup(
    name="workspace",
    context_settings=_SETTINGS,
    no_args_is_help=True,
    help="A repository in a VM: put it there, see what was done, bring it back.\n\n\b\n"
    "banger vm workspace prepare web ./repo    put it there, or bring it up to date\n"
    "banger vm workspace diff web              what was done there\n"
    "banger vm workspace apply web             do the same to the files here",
    lazy={
        "prepare": ("vm_workspace:prepare", "Put a repository into a running VM."),
        "diff": ("vm_workspace:diff", "Show what was done in the guest."),
        "apply": ("vm_workspace_apply:apply", "Do to the files here what was done in the guest."),
        "export": ("vm_workspace:export", "Write a patch, the commits or the files."),
    },
)

vm_session = LazyGroup(
    name="session",
    context_settings=_SETTINGS,
    no_args_is_help=True,
    help="Commands in a VM that go on without you: start, look, come back.\n\n\b\n"
    "banger vm session start web --name dev -- npm run dev\n"
    "banger vm session logs web dev -f\n"
    "banger vm session attach web dev",
    lazy={
        "start": ("vm_session:start", "Start a long-lived command."),
        "list": ("vm_session:list_sessions", "List the sessions of a VM."),
        "show": ("vm_session:show", "Show one session as JSON."),
        "logs": ("vm_session_stream:logs", "Show what a session printed."),
        "attach": ("vm_session_stream:attach", "Join a session."),
        "send": ("vm_session_stream:send", "Send input to a session."),
        "stop": ("vm_session:stop", "End a session in order."),
        "kill": ("vm_session:kill", "Send a signal to a session."),
        "remove": ("vm_session:remove", "Forget a session that has ended."),
    },
)

image = LazyGroup(
    name="image",
    context_settings=_SETTINGS,
    no_args_is_help=True,
    help="Root filesystems that VMs boot from.\n\n\b\n"
    "banger image list\n"
    "banger image build --name debian-bookworm --recipe debian-bookworm",
    lazy={
        "list": ("image:list_images", "List images."),
        "show": ("image:show", "Show one image's record as JSON."),
        "pull": ("image_pull:pull", "Fetch an image of the catalog, or a container image."),
        "build": ("image_build:build", "Build an image from a recipe or another image."),
        "register": ("image_files:register", "Make an image of a root filesystem of yours."),
        "promote": ("image_files:promote", "Copy a registered image into banger's storage."),
        "export": ("export:export_image", "Write an image as a bundle that others can pull."),
        "verify": ("image:verify", "Compare stored images with their recorded hashes."),
        "delete": ("image:delete", "Delete images that no VM uses."),
        "cache": ("app:image_cache", "What pulls keep for the next pull."),
    },
)

image_cache = LazyGroup(
    name="cache",
    context_settings=_SETTINGS,
    no_args_is_help=True,
    help="Layers and documents of container images, kept for the next pull.",
    lazy={"prune": ("image_pull:prune", "Free them; stored images need none.")},
)

kernel = LazyGroup(
    name="kernel",
    context_settings=_SETTINGS,
    no_args_is_help=True,
    help="Kernels that VMs boot with.\n\n\b\n"
    "banger kernel list --available\n"
    "banger kernel pull debian-6.12-cloud",
    lazy={
        "list": ("kernel:list_kernels", "List kernels."),
        "show": ("kernel:show", "Show one kernel's record as JSON."),
        "pull": ("kernel:pull", "Fetch a kernel: a published one, or from its source."),
        "build": ("kernel_build:build", "Compile a kernel with everything built in."),
        "import": ("kernel:import_kernel", "Make an entry of a kernel of yours."),
        "export": ("export:export_kernel", "Write a kernel as a bundle that others can pull."),
        "rm": ("kernel:remove", "Remove kernels that nothing refers to."),
    },
)

daemon = LazyGroup(
    name="daemon",
    context_settings=_SETTINGS,
    no_args_is_help=True,
    help="The background process. Commands start it when they need it.",
    lazy={
        "status": ("daemon_commands:status", "Show the daemon, its network and its VMM."),
        "operations": ("app:operations", "What the daemon does, and how what it did ended."),
        "stop": ("daemon_commands:stop", "End the daemon; VMs run on."),
    },
)


@click.pass_context
def _list_operations(context: click.Context, as_json: bool) -> Any:
    if context.invoked_subcommand is None:
        command = operations.get_command(context, "list")
        assert command is not None
        return context.invoke(command, as_json=as_json)
    return None


operations = LazyGroup(
    name="operations",
    context_settings=_SETTINGS,
    invoke_without_command=True,
    callback=_list_operations,
    params=[click.Option(["--json", "as_json"], is_flag=True, help="Print the list as JSON.")],
    help="What the daemon does, and how what it did in the last ten minutes ended: done, failed "
    "(safe to retry), or unknown (it may have happened).\n\n\b\n"
    "banger daemon operations                  list them\n"
    "banger daemon operations show OPERATION   watch one to its end",
    lazy={
        "list": ("daemon_operations:list_operations", "List operations."),
        "show": ("daemon_operations:show", "Watch one to its end, and tell how it ended."),
        "cancel": ("daemon_operations:cancel", "Cancel one; what it had made is given back."),
    },
)

system = LazyGroup(
    name="system",
    context_settings=_SETTINGS,
    no_args_is_help=True,
    help="banger as services of this host: for daily use, without sudo afterwards.\n\n\b\n"
    "sudo banger system install --owner $USER",
    lazy={
        "install": ("system:install", "Install the services, or bring them up to date."),
        "status": ("system:status", "Show both services."),
        "restart": ("system:restart", "Restart both services; VMs run on."),
        "uninstall": ("system:uninstall", "Remove the services and the programs."),
    },
)

internal = LazyGroup(
    name="internal",
    hidden=True,
    context_settings=_SETTINGS,
    help="Pieces that banger itself calls.",
    lazy={
        "agent-proxy": ("internal:agent_proxy", "Join stdin and stdout to a TCP port in a guest."),
        "index-sign": ("index:index_sign", "Renew the signed index of published bundles."),
        "index-verify": ("index:index_verify", "Check an index and the bundles beside it."),
        "rpc-schema": ("internal:rpc_schema", "Print the JSON schema of the daemon's methods."),
    },
)

_GROUPS = {
    "vm": vm,
    "image": image,
    "kernel": kernel,
    "daemon": daemon,
    "system": system,
    "internal": internal,
}


class Root(LazyGroup):
    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        return _GROUPS.get(name) or super().get_command(ctx, name)


app = Root(
    name="banger",
    context_settings=_SETTINGS,
    no_args_is_help=True,
    help="Run work in a sandbox of its own: a real microVM.\n\n\b\n"
    "banger vm run ./repo -- make test",
    lazy={
        "vm": ("app:vm", "Run and look after microVMs."),
        "ps": ("vm_look:list_vms", "List VMs (the same as vm list)."),
        "image": ("app:image", "Root filesystems that VMs boot from."),
        "kernel": ("app:kernel", "Kernels that VMs boot with."),
        "daemon": ("app:daemon", "The background process."),
        "ssh-config": ("ssh_config:ssh_config", "Make plain ssh NAME.vm work."),
        "system": ("app:system", "banger as services of this host."),
        "doctor": ("doctor:doctor", "Look for what keeps banger from working here."),
        "version": ("version_command:version", "Show what this banger is."),
        "completion": ("completion:completion", "Print a shell completion script."),
        "internal": ("app:internal", ""),
    },
    params=[
        click.Option(
            ["--version"], is_flag=True, is_eager=True, expose_value=False, help="Show the version."
        )
    ],
)
