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
        "ssh": ("vm_exec:ssh", "Log in to a running VM."),
        "set": ("vm_set:set_sizes", "Change the sizes of VMs."),
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
        "build": ("image:build", "Build an image from a recipe."),
        "verify": ("image:verify", "Compare stored images with their recorded hashes."),
        "delete": ("image:delete", "Delete images that no VM uses."),
    },
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
        "pull": ("kernel:pull", "Fetch a kernel from its source."),
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
        "stop": ("daemon_commands:stop", "End the daemon; VMs run on."),
    },
)

internal = LazyGroup(
    name="internal",
    hidden=True,
    context_settings=_SETTINGS,
    help="Pieces that banger itself calls.",
    lazy={
        "agent-proxy": ("internal:agent_proxy", "Join stdin and stdout to a TCP port in a guest."),
        "rpc-schema": ("internal:rpc_schema", "Print the JSON schema of the daemon's methods."),
    },
)

_GROUPS = {"vm": vm, "image": image, "kernel": kernel, "daemon": daemon, "internal": internal}


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
