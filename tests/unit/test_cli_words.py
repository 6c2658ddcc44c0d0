"""Words of the command line: ours and the guest's, environments, sizes, wrong usage."""

from __future__ import annotations

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from banger.cli.guest_command import GuestCommand, split
from banger.cli.sizing import resolve, spec_line
from banger.cli.vm_run import parse_env
from banger.config.settings import Sizing, VmDefaults, default_sizing
from banger.units import GIB
from fakes.command_line import CommandLine

words = st.lists(st.one_of(st.just("--"), st.just("--rm"), st.text(max_size=5)), max_size=6)
ours = st.lists(st.one_of(st.sampled_from(["vm", "run", ".", "--rm", "-x", "-"]), st.text()).filter(
    lambda word: word != "--"
), max_size=5)  # fmt: skip


@given(ours)
def test_without_a_separator_all_words_are_ours(argv: list[str]) -> None:
    assert split(argv) == (argv, None)


@given(ours, words)
def test_everything_after_the_first_separator_is_the_guests(
    before: list[str], after: list[str]
) -> None:
    assert split([*before, "--", *after]) == (before, tuple(after))


@given(st.lists(st.text(), max_size=8))
def test_no_word_is_lost_or_added(argv: list[str]) -> None:
    mine, guest = split(argv)
    assert (mine if guest is None else [*mine, "--", *guest]) == argv


@pytest.mark.parametrize(
    ("argv", "mine", "guest"),
    [
        (["vm", "run", "--"], ["vm", "run"], ()),
        (["vm", "run", ".", "--"], ["vm", "run", "."], ()),
        (["vm", "run", "--rm", "--", "cmd", "--", "x"], ["vm", "run", "--rm"], ("cmd", "--", "x")),
        (["vm", "run", "--", "--rm"], ["vm", "run"], ("--rm",)),
    ],
)
def test_separator_examples(argv: list[str], mine: list[str], guest: tuple[str, ...]) -> None:
    assert split(argv) == (mine, guest)


@pytest.mark.parametrize("argv", [None, ()])
def test_command_that_is_required_and_missing_is_wrong_usage(argv: tuple[str, ...] | None) -> None:
    with pytest.raises(click.UsageError):
        GuestCommand(argv).required()


@given(
    st.dictionaries(st.text(min_size=1).filter(lambda key: "=" not in key), st.text(), max_size=4)
)
def test_environment_words_come_back_as_they_were(env: dict[str, str]) -> None:
    assert parse_env(tuple(f"{key}={value}" for key, value in env.items())) == env


@pytest.mark.parametrize("word", ["X", "=value", ""])
def test_environment_word_without_name_or_sign_is_wrong_usage(word: str) -> None:
    with pytest.raises(click.UsageError, match="--env takes K=V"):
        parse_env((word,))


def test_last_of_two_values_wins() -> None:
    assert parse_env(("A=1", "A=2")) == {"A": "2"}


# --- sizes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cpus", "memory_mib", "vcpu", "vm_memory_mib"),
    [
        (1, 1024, 1, 512),  # the floor is limited to half of a small host
        (2, 4096, 2, 2048),
        (8, 16384, 2, 2048),
        (16, 32768, 4, 4096),
        (64, 262144, 4, 8192),
    ],
)
def test_default_sizes_follow_the_host(
    cpus: int, memory_mib: int, vcpu: int, vm_memory_mib: int
) -> None:
    size = default_sizing(VmDefaults(), host_cpus=cpus, host_memory_mib=memory_mib)
    assert (size.vcpu, size.memory_mib) == (vcpu, vm_memory_mib)
    assert (size.disk_bytes, size.overlay_bytes) == (8 * GIB, 8 * GIB)


def test_configured_sizes_win_over_the_host() -> None:
    defaults = VmDefaults(vcpu=3, memory_mib=700, disk_size="1G", system_overlay_size="2G")
    size = default_sizing(defaults, host_cpus=64, host_memory_mib=1 << 20)
    assert size == Sizing(vcpu=3, memory_mib=700, disk_bytes=GIB, overlay_bytes=2 * GIB)


def test_named_sizes_win_over_everything(cli: CommandLine) -> None:
    size = resolve(5, 3 * GIB, 20 * GIB, 10 * GIB)
    expected = Sizing(vcpu=5, memory_mib=3072, disk_bytes=20 * GIB, overlay_bytes=10 * GIB)
    assert size == expected
    assert spec_line(size, "debian", nat=False) == (
        "spec: 5 vCPU | 3072 MiB | disk 20G | image debian | nat off"
    )


# --- wrong usage ----------------------------------------------------------------------------------

WRONG: dict[str, tuple[list[str], str]] = {
    "no such command": (["vmm"], "Did you mean 'vm'?"),
    "no such subcommand": (["vm", "lst"], "Did you mean 'list'?"),
    "no such option": (["vm", "list", "--nmaes"], "--names"),
    "no VM": (["vm", "start"], "Missing argument 'VM...'"),
    "a command where none belongs": (["vm", "list", "--", "ls"], "takes nothing after --"),
    "a command that is missing": (["vm", "exec", "web"], "a command is missing"),
    "an empty command": (["vm", "run", "--"], "a command is missing after --"),
    "branch without path": (["vm", "run", "--branch", "b"], "--branch needs the PATH"),
    "mode without path": (["vm", "run", "--mode", "full_copy"], "--mode needs the PATH"),
    "dry run without path": (["vm", "run", "--dry-run"], "--dry-run needs the PATH"),
    "from without branch": (["vm", "run", ".", "--from", "main"], "--from needs --branch"),
    "detached and removed": (["vm", "run", "-d", "--rm"], "-d and --rm exclude each other"),
    "detached with a command": (["vm", "run", "-d", "--", "ls"], "-d takes no command"),
    "two paths": (["vm", "run", "a", "b"], "unexpected extra argument"),
    "no size": (["vm", "create", "--memory", "lots"], "is no size"),
    "no duration": (["vm", "stop", "web", "--timeout", "soon"], "soon"),
    "no number": (["vm", "create", "--vcpu", "two"], "not a valid integer"),
    "no mode": (["vm", "run", ".", "--mode", "half"], "shallow_overlay"),
    "no port": (["internal", "agent-proxy", "web", "0"], "1<=x<=65535"),
    "no environment": (["vm", "exec", "web", "--env"], "--env"),
    "no shell": (["completion", "csh"], "powershell"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_usage_is_status_2_and_starts_no_daemon(cli: CommandLine, case: str) -> None:
    words, expected = WRONG[case]
    done = cli(*words)
    assert done.status == 2
    assert expected in done.err
    assert done.out == ""
    assert cli.starts == 0


@pytest.mark.parametrize("word", ["=x", "novalue"])
def test_wrong_environment_is_wrong_usage_before_a_vm_exists(cli: CommandLine, word: str) -> None:
    assert cli("vm", "run", "--env", word, "--", "true").status == 2
    assert cli.starts == 0


@pytest.mark.parametrize("words", [(), ("vm",), ("image",), ("daemon",)])
def test_group_alone_shows_its_help(cli: CommandLine, words: tuple[str, ...]) -> None:
    done = cli(*words)
    assert done.status == 2
    assert "Usage: " in done.err


@pytest.mark.parametrize(
    "words", [("--help",), ("vm", "--help"), ("vm", "run", "-h"), ("kernel", "pull", "--help")]
)
def test_help_is_status_0_on_stdout(cli: CommandLine, words: tuple[str, ...]) -> None:
    done = cli(*words)
    assert (done.status, done.err) == (0, "")
    assert done.out.startswith("Usage: banger")


def test_every_command_has_a_help_text_with_one_line_for_its_group(cli: CommandLine) -> None:
    from banger.cli.app import app

    def walk(group: click.Group, path: list[str]) -> None:
        for name in group.list_commands(click.Context(group)):
            command = group.get_command(click.Context(group), name)
            assert command is not None, [*path, name]
            if isinstance(command, click.Group):
                walk(command, [*path, name])
            else:
                assert command.help, [*path, name]

    walk(app, ["banger"])
