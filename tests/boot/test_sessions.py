"""Sessions and coding agents in a real VM, through the command line."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import acp
import pexpect
import pytest

from boot.installation import PATIENCE_S, Installation

# A coding agent small enough for any guest: JSON lines in, JSON lines out. It talks to stderr too,
# and its directory is in its answer.
AGENT = r"""#!/bin/sh
echo "agent starts" >&2
while IFS= read -r line; do
    id=$(printf '%s' "$line" | sed -n 's/.*"id": *\([0-9]*\).*/\1/p')
    answer() { printf '{"jsonrpc":"2.0","id":%s,"result":%s}\n' "$id" "$1"; }
    case "$line" in
        *'"initialize"'*) answer '{"protocolVersion":1,"agentCapabilities":{}}' ;;
        *'"session/new"'*) answer '{"sessionId":"s-1"}' ;;
        *'"session/prompt"'*)
            text='{"type":"text","text":"'"in $PWD"'"}'
            update='{"sessionUpdate":"agent_message_chunk","content":'$text'}'
            params='{"sessionId":"s-1","update":'$update'}'
            printf '{"jsonrpc":"2.0","method":"session/update","params":%s}\n' "$params"
            answer '{"stopReason":"end_turn"}' ;;
    esac
done
exit 9
"""


class Editor:
    """The client's side of the protocol: it remembers what the agent says."""

    def __init__(self) -> None:
        self.said: list[str] = []

    async def session_update(self, session_id: str, update: Any, **_: Any) -> None:
        self.said.append(update.content.text)

    def on_connect(self, conn: Any) -> None:
        """Nothing to keep."""


@pytest.fixture
def agent_in(banger: Installation, web: str) -> Iterator[str]:
    """The agent's program in the guest, where a login shell's PATH has it."""
    place = "/usr/local/bin/small-agent"
    profile = "echo 'echo a profile that talks' > /etc/profile.d/talk.sh"
    script = f"cat > {place} && chmod 755 {place} && {profile}"
    banger.ok("vm", "exec", web, "--", "sh", "-c", script, stdin=AGENT.encode())
    yield "small-agent"
    banger.ok("vm", "exec", web, "--", "rm", "/etc/profile.d/talk.sh")


def test_a_client_library_speaks_with_an_agent_in_the_guest(
    banger: Installation, web: str, agent_in: str
) -> None:
    async def talk() -> tuple[list[str], int | None]:
        editor = Editor()
        command, *words = banger.argv("vm", "acp", web, "--cwd", "/tmp", "--", agent_in)
        async with acp.spawn_agent_process(
            editor,  # type: ignore[arg-type]  # the methods that this agent calls
            command,
            *words,
            env=banger.env,
        ) as (connection, process):
            hello = await connection.initialize(protocol_version=1)
            assert hello.protocol_version == 1
            session = await connection.new_session(cwd="/tmp", mcp_servers=[])
            done = await connection.prompt(
                session_id=session.session_id, prompt=[acp.text_block("where?")]
            )
            assert done.stop_reason == "end_turn"
        return editor.said, await process.wait()

    said, status = asyncio.run(asyncio.wait_for(talk(), PATIENCE_S))
    assert said == ["in /tmp"]
    assert status is not None


def test_bytes_pass_unchanged_and_the_status_is_the_agents(
    banger: Installation, web: str, agent_in: str
) -> None:
    line = b'{"jsonrpc":"2.0","id":7,"method":"initialize"}\n'
    done = banger("vm", "acp", web, "--", agent_in, stdin=line)
    result = b'{"jsonrpc":"2.0","id":7,"result":{"protocolVersion":1,"agentCapabilities":{}}}\n'
    assert (done.out, done.status) == (result, 9)
    assert "agent starts" in done.err


def test_a_missing_agent_is_an_error_before_the_first_byte(banger: Installation, web: str) -> None:
    done = banger("vm", "acp", web, "--", "no-such-agent", stdin=b"{}\n")
    assert (done.out, done.status) == (b"", 1)
    assert "no-such-agent" in done.err


def test_a_session_goes_on_without_us_and_over_a_new_daemon(banger: Installation, web: str) -> None:
    script = "echo started; read x; echo got $x; exit 6"
    banger.ok("vm", "session", "start", web, "--name", "job", "--stdin-mode", "pipe",
              "--tag", "t", "--", "sh", "-c", script)  # fmt: skip
    banger.kill_daemon()
    (session,) = banger.json("vm", "session", "list", web, "--tag", "t", "--json")
    assert (session["name"], session["state"]) == ("job", "running")
    banger.ok("vm", "session", "send", web, "job", "a word")
    done = banger.ok("vm", "session", "logs", web, "job", "-f")
    assert done.text == "started\ngot a word\n"
    record = banger.json("vm", "session", "show", web, "job")
    assert (record["state"], record["code"], record["logs"]["stdout"]["end"]) == ("exited", 6, 19)
    banger.ok("vm", "session", "remove", web, "job")
    assert banger.json("vm", "session", "list", web, "--json") == []


def test_a_terminal_session_is_joined_left_and_joined_again(banger: Installation, web: str) -> None:
    shell = pexpect.spawn(
        sys.executable, banger.argv("vm", "session", "start", web, "--name", "sh", "-t", "--",
                                    "sh")[1:],
        env={**os.environ, **banger.env}, timeout=PATIENCE_S, dimensions=(30, 90),
    )  # fmt: skip
    shell.expect(pexpect.EOF)
    attach = banger.argv("vm", "session", "attach", web, "sh")[1:]
    env = {**os.environ, **banger.env}
    first = pexpect.spawn(sys.executable, attach, env=env, timeout=PATIENCE_S, dimensions=(33, 77))
    first.expect("# ")
    first.sendline("stty size; x=kept")
    first.expect("33 77")
    first.send("\x1d")
    first.expect("goes on")
    first.expect(pexpect.EOF)
    first.close()
    assert first.exitstatus == 0
    second = pexpect.spawn(sys.executable, attach, env=env, timeout=PATIENCE_S)
    second.sendline("echo value=$x")
    second.expect("value=kept")
    second.sendline("exit 4")
    second.expect(pexpect.EOF)
    second.close()
    assert second.exitstatus == 4
    banger.ok("vm", "session", "remove", web, "sh")


def test_sessions_of_a_stopped_vm_are_lost_and_their_output_is_kept(
    banger: Installation, tmp_path: Path
) -> None:
    banger.ok("vm", "create", "--name", "lost", "--vcpu", "1", "--memory", "512M",
              "--disk-size", "512M", "--system-overlay-size", "512M")  # fmt: skip
    for name, script in (("long", "echo on; sleep 1000"), ("short", "echo off")):
        banger.ok("vm", "session", "start", "lost", "--name", name, "--", "sh", "-c", script)
    banger.ok("vm", "session", "logs", "lost", "short", "-f")
    banger.ok("vm", "restart", "lost")
    states = {s["name"]: s["state"] for s in banger.json("vm", "session", "list", "lost", "--json")}
    assert states == {"long": "lost", "short": "exited"}
    assert banger.ok("vm", "session", "logs", "lost", "long").text == "on\n"
    banger.ok("vm", "delete", "lost")
