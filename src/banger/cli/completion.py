"""`banger completion SHELL`: the script that a shell loads to complete banger's words."""

from __future__ import annotations

import os
import sys

import click
from click.shell_completion import (
    CompletionItem,
    ShellComplete,
    add_completion_class,
    get_completion_class,
    split_arg_string,
)

_VARIABLE = "_BANGER_COMPLETE"

_POWERSHELL = """\
Register-ArgumentCompleter -Native -CommandName %(prog_name)s -ScriptBlock {
    param($wordToComplete, $commandAst, $cursorPosition)
    $env:%(complete_var)s = 'powershell_complete'
    $env:COMP_WORDS = $commandAst.ToString()
    $env:COMP_INCOMPLETE = $wordToComplete
    %(prog_name)s | ForEach-Object {
        [System.Management.Automation.CompletionResult]::new($_, $_, 'ParameterValue', $_)
    }
    Remove-Item Env:%(complete_var)s, Env:COMP_WORDS, Env:COMP_INCOMPLETE
}
"""


class PowerShellComplete(ShellComplete):
    """click knows bash, zsh and fish; this is its protocol for PowerShell."""

    name = "powershell"
    source_template = _POWERSHELL

    def get_completion_args(self) -> tuple[list[str], str]:
        words = split_arg_string(os.environ.get("COMP_WORDS", ""))
        incomplete = os.environ.get("COMP_INCOMPLETE", "")
        args = words[1:]
        if incomplete and args and args[-1] == incomplete:
            args.pop()
        return args, incomplete

    def format_completion(self, item: CompletionItem) -> str:
        return str(item.value)


add_completion_class(PowerShellComplete)


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish", "powershell"]))
def completion(shell: str) -> None:
    """Print a completion script.

    \b
    bash        eval "$(banger completion bash)"                  in ~/.bashrc
    zsh         eval "$(banger completion zsh)"                   in ~/.zshrc
    fish        banger completion fish > ~/.config/fish/completions/banger.fish
    powershell  banger completion powershell | Out-String | Invoke-Expression   in $PROFILE
    """
    from banger.cli.app import app as command_tree

    kind: type[ShellComplete] | None = get_completion_class(shell)
    assert kind is not None
    script = kind(command_tree, {}, "banger", _VARIABLE)
    sys.stdout.write(script.source() + "\n")
