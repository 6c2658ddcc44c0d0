"""What is told when a connection is lost: whether it may have happened, and where to look.

Pure, and cheap to import: commands use it too.
"""

from __future__ import annotations

import re
from typing import Any

from banger.api.operations import REPEATABLE
from banger.errors import BangerError

_DONE = {
    "run": "created",
    "create": "created",
    "start": "started",
    "restart": "restarted",
    "stop": "stopped",
    "kill": "killed",
    "delete": "deleted",
    "set": "changed",
    "prepare": "prepared",
    "applied": "recorded",
    "remove": "removed",
    "build": "built",
    "pull": "pulled",
    "register": "registered",
    "promote": "promoted",
    "import": "imported",
    "prune": "pruned",
}
_NOUNS = {"vm": "VM", "vm.session": "session", "vm.workspace": "workspace of VM"}


def target_of(params: Any) -> str:
    """What a call is about, in the words of its caller; a session is `VM/NAME`."""
    params = getattr(params, "create", params)
    words = [getattr(params, field, None) for field in ("vm", "name", "session", "reference")]
    return "/".join(word for word in words if isinstance(word, str))


def fill_in(error: BangerError, vm: str) -> BangerError:
    """The error, with its VM's name in the next command: who asks a guest for something does not
    know what the machine is called, and writes `VM`."""
    if error.hint and re.fullmatch(r"[a-z0-9-]+", vm):
        error.hint = re.sub(r"\bVM\b", vm, error.hint)
    return error


def may_have_happened(method: str, target: str) -> str:
    """`the VM web may or may not have been created`."""
    group, _, verb = method.rpartition(".")
    noun = _NOUNS.get(group, group.replace(".", " "))
    about = f"{noun} {target}" if target else noun
    return f"the {about} may or may not have been {_DONE.get(verb, 'done')}"


def where_to_look(method: str, target: str) -> str:
    """The command that shows whether it happened."""
    group = method.rpartition(".")[0]
    if group in ("image", "kernel"):
        return f"banger {group} list"
    vm = target.partition("/")[0]
    if group == "vm.session" and vm:
        return f"banger vm session list {vm}"
    return "banger vm list"


def lost_before(method: str) -> BangerError:
    """The request did not get to the daemon, which acts on whole lines only."""
    return BangerError(
        "operation_failed",
        f"{method}: the connection to the daemon was lost before it was asked; nothing was done, "
        "it is safe to try again",
        hint="banger daemon status",
        reason="connection_lost",
    )


def lost_after(method: str, target: str, op_id: str) -> BangerError:
    """The request got there, perhaps, and its answer did not come."""
    if method in REPEATABLE:
        return BangerError(
            "operation_failed",
            f"{method}: the connection to the daemon was lost before it answered; nothing was "
            "changed, it is safe to try again",
            hint="banger daemon status",
            reason="connection_lost",
        )
    e = BangerError(
        "operation_failed",
        "the connection to the daemon was lost before it answered: "
        f"{may_have_happened(method, target)}; see: banger daemon operations show {op_id}",
        hint=where_to_look(method, target),
        reason="connection_lost",
        outcome="unknown",
    )
    e.op_id = op_id
    return e


def daemon_ended(method: str, target: str) -> BangerError:
    """What the daemon after a crash knows of what was under way."""
    return BangerError(
        "operation_failed",
        f"the daemon ended while this was under way: {may_have_happened(method, target)}; what was "
        "half done has been given back",
        hint=where_to_look(method, target),
        reason="connection_lost",
        outcome="unknown",
    )
