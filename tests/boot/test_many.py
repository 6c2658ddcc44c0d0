"""Several real machines at once: created, used, stopped and deleted side by side."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from boot.installation import PATIENCE_S, SMALL, Done, Installation

pytestmark = [pytest.mark.usefixtures("nothing_left")]

_VMS = 4
_COMMANDS = 24


def test_vms_are_made_used_and_deleted_at_once(banger: Installation) -> None:
    names = [f"m{number}" for number in range(_VMS)]
    with ThreadPoolExecutor(max_workers=_COMMANDS) as pool:
        try:
            list(pool.map(lambda name: banger.ok("vm", "create", "--name", name, *SMALL), names))
            records = [banger.show(name) for name in names]
            assert {r["state"] for r in records} == {"running"}
            assert len({r["address"] for r in records}) == _VMS

            def command(number: int) -> Done:
                name = names[number % _VMS]
                script = f"echo $BANGER_VM {number}; echo {number} > /root/{number}; exit {number}"
                return banger("vm", "exec", name, "--", "sh", "-c", script)

            for number, done in enumerate(pool.map(command, range(_COMMANDS))):
                assert done.status == number, done.err
                assert done.text == f"{names[number % _VMS]} {number}\n"
            # Each in its own machine, and all of them there.
            for index, name in enumerate(names):
                files = banger.ok("vm", "exec", name, "--", "sh", "-c", "cd /root; ls").text.split()
                own = [n for n in range(_COMMANDS) if n % _VMS == index]
                assert sorted(int(f) for f in files if f.isdigit()) == own
            # While two stop, the others still answer.
            stopping = [pool.submit(banger.ok, "vm", "stop", name) for name in names[:2]]
            for name in names[2:]:
                assert banger.ok("vm", "exec", name, "--", "echo", "here").text == "here\n"
            for future in stopping:
                future.result()
            assert [banger.show(name)["state"] for name in names] == ["stopped"] * 2 + [
                "running"
            ] * 2
        finally:
            done = banger("vm", "delete", *names)
    assert done.status == 0, done.err


def test_daemon_that_is_killed_in_a_create_leaves_its_client_honest(banger: Installation) -> None:
    daemon = banger.daemon_pid()
    creating = banger.popen("vm", "create", "--name", "torn", *SMALL, "--json")
    assert creating.stderr is not None
    for line in creating.stderr:
        if line.startswith(b"ready:"):
            break
    banger.kill_daemon(daemon)
    out, err = creating.communicate(timeout=PATIENCE_S)
    import json

    error = json.loads(out)["error"]
    assert (creating.returncode, error["outcome"]) == (1, "unknown"), err
    # The next daemon gives back what was half made, and says of the operation what is known.
    assert "torn" not in banger.ok("vm", "list", "--names").text.split()
    shown = banger("daemon", "operations", "show", error["op_id"])
    assert (shown.status, shown.text) == (1, "vm.create torn: unknown\n")
