"""What goes on in a guest without anybody being there, and what coding agents need: sessions, the
Agent Client Protocol, files of the home, pinned tools."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

from tests.smoke import guests
from tests.smoke.calls import CALL_S, banger, expect, host, units_active, wait_until
from tests.smoke.registry import scenario

_DAEMON = "bangerd.service"
# JSON lines in, the same out; it talks to stderr, too.
_AGENT = 'echo "agent starts" >&2; while IFS= read -r line; do printf "%s\\n" "$line"; done; exit 5'


@scenario(
    "pure", "a session outlives its command line and the daemon; one attaches, many read",
    shared_vm=True,
)  # fmt: skip
def session() -> None:
    vm = guests.shared()
    script = "echo started; read -r word; echo got $word; read -r word; exit 6"
    start = ("vm", "session", "start", vm, "--name", "job", "--stdin-mode", "pipe")
    banger.refused(*start, "--require-command", "no-such-1", "--", "no-such-2", because="no-such-1")
    banger(*start, "--", "sh", "-c", script)
    host("systemctl", "restart", _DAEMON)
    wait_until(lambda: units_active(_DAEMON), "the daemon to be back")
    (listed,) = banger.json("vm", "session", "list", vm, "--json")
    expect((listed["name"], listed["state"]) == ("job", "running"), f"listed: {listed}")
    attach = ("vm", "session", "attach", vm, "job")
    first = banger.banger_started(
        *attach, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )  # fmt: skip
    assert first.stdout is not None and first.stdin is not None
    expect(first.stdout.readline() == "started\n", "an attach does not show what was before")
    banger.refused(*attach, because="attached")
    first.stdin.write("word\n")
    first.stdin.flush()
    expect(first.stdout.readline() == "got word\n", "the input did not arrive")
    cursor = banger.done("vm", "session", "logs", vm, "job", "--cursor").err.split()[-1]
    banger("vm", "session", "send", vm, "job", "end")
    rest = first.communicate(timeout=CALL_S)[0]
    expect((rest, first.returncode) == ("", 6), f"the attach ended with {first.returncode} {rest}")
    expect(banger("vm", "session", "logs", vm, "job") == "started\ngot word\n", "the log")
    expect(banger("vm", "session", "logs", vm, "job", "--since", cursor) == "", "the cursor")
    banger("vm", "session", "remove", vm, "job")
    banger("vm", "session", "start", vm, "--name", "long", "--", "sleep", "1000")
    banger("vm", "session", "stop", vm, "long", "--timeout", "5s")
    state = banger.json("vm", "session", "show", vm, "long")["state"]
    expect(state == "exited", f"after stop it is {state}")
    banger("vm", "session", "remove", vm, "long")


@scenario("pure", "`vm acp` carries JSON lines unchanged, and nothing else", shared_vm=True)
def acp() -> None:
    vm = guests.shared()
    banger.refused("vm", "acp", vm, "--", "no-such-agent", because="no-such-agent")
    lines = [json.dumps({"jsonrpc": "2.0", "id": n, "text": "zwölf\n\x07" * n}) for n in range(50)]
    sent = "".join(f"{line}\n" for line in lines)
    done = banger.done("vm", "acp", vm, "--", "sh", "-c", _AGENT, stdin=sent)
    expect(done.out == sent, f"{len(sent)} characters went in and others came out")
    expect("agent starts" in done.err, f"stderr is {done.err!r}")
    expect(done.status == 5, f"status {done.status}")


@scenario("global", "files of the home in a new VM: modes, directory; a missing path warns")
def file_sync() -> None:
    config = banger.home / ".config/banger/config.toml"
    before = config.read_text() if config.exists() else None
    tree = banger.home / "tree"
    try:
        _write(tree / "sub/tool", "#!/bin/sh\n", 0o750)
        _write(banger.home / "token", "secret\n", 0o644)
        (tree / "link").symlink_to("/etc/passwd")
        _write(config, _SYNC + (before or ""), 0o600)
        host("systemctl", "restart", _DAEMON)
        wait_until(lambda: units_active(_DAEMON), "the daemon to be back")
        guests.used_names.add("synced")
        done = banger.done("vm", "create", "--name", "synced")
        expect(done.status == 0, f"status {done.status}")
        expect("~/none" in done.err, "the missing path was not named")
        expect("link" in done.err, "the skipped link was not named")
        script = "stat -c '%a %U %n' /root/.token /root/tree/sub/tool; cat .token; ls tree"
        out = banger("vm", "exec", "synced", "--", "sh", "-c", script)
        expected = "600 root /root/.token\n750 root /root/tree/sub/tool\nsecret\nsub\n"
        expect(out == expected, f"the guest has {out!r}")
        banger("vm", "delete", "synced")
    finally:
        config.unlink()
        if before is not None:
            _write(config, before, 0o600)
        host("systemctl", "restart", _DAEMON)
        wait_until(lambda: units_active(_DAEMON), "the daemon to be back")


_SYNC = """\
[[file_sync]]
host = "~/token"
guest = "~/.token"

[[file_sync]]
host = "~/tree"
guest = "/root/tree"

[[file_sync]]
host = "~/none"
guest = "~/none"

"""


def _write(path: Path, text: str, mode: int) -> None:
    """A file of the owner's, with the directories on the way to it."""
    done = banger.run("mkdir", "-p", str(path.parent))
    expect(done.status == 0, done.err)
    path.write_text(text)
    path.chmod(mode)
    shutil.chown(path, banger.user, banger.user)


@scenario("repodir", "a mise file without `--nat` is refused, with `--no-bootstrap` it is not")
def bootstrap_precondition() -> None:
    path = banger.home / "pinned"
    shutil.rmtree(path, ignore_errors=True)
    script = (
        "git init -q -b main pinned && cd pinned && echo '[tools]' > mise.toml && git add . &&"
        " git -c user.name=smoke -c user.email=smoke@host commit -qm first"
    )
    expect(banger.run("sh", "-c", script).status == 0, "making the repository")
    before = banger.vm_names()
    run = ("vm", "run", "-d", "--name", "pinned", str(path))
    words = banger.refused(*run, because="--nat")
    expect("--no-bootstrap" in words, f"the way around is not named: {words!r}")
    expect(banger.vm_names() == before, "a refused call left a VM")
    guests.used_names.add("pinned")
    banger(*run, "--no-bootstrap")
    # The guest has no mise: the command runs as it is.
    expect(banger("vm", "exec", "pinned", "--", "ls") == "mise.toml\n", "the checkout")
    banger("vm", "delete", "pinned")
