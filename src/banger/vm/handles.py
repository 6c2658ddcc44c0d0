"""Handles: what a VM that was launched holds on the host. A file first, then memory.

`handles.json` lies in the VM's directory from before its lease until after its release. It is the
only place that knows the pid; the database never does.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import msgspec

from banger.api.base import Wire
from banger.api.records import VmmName
from banger.decoding import MALFORMED, decode_json
from banger.errors import BangerError
from banger.files import write_atomic
from banger.guest.endpoint import Endpoint
from banger.host.lease import LeaseId, LeasePlan
from banger.host.vmm_process import ProcessRef

if TYPE_CHECKING:
    from banger.config.paths import VmPaths


class Handles(Wire, frozen=True, kw_only=True):
    vmm: VmmName
    endpoint: Endpoint
    lease_id: LeaseId | None = None
    lease: LeasePlan | None = None
    """What was asked for, to be asked for again with another `nat`."""
    tap: str | None = None
    cgroup: str | None = None
    process: ProcessRef | None = None


class Secrets(Wire, frozen=True, kw_only=True):
    """Token and ssh host key of one VM, made at create."""

    token: str
    host_key: str
    host_key_pub: str


def write_handles(paths: VmPaths, handles: Handles) -> None:
    write_atomic(paths.handles, msgspec.json.encode(handles))


def find_handles(paths: VmPaths) -> Handles | None:
    """The handles on disk; None when there are none.

    Raises:
        BangerError: the file is damaged; the ledger decides then.
    """
    try:
        return decode_json(paths.handles.read_bytes(), type=Handles)
    except FileNotFoundError:
        return None
    except (OSError, *MALFORMED) as e:
        raise BangerError("operation_failed", f"reading {paths.handles}: {e}") from e


def clear_handles(paths: VmPaths) -> None:
    with contextlib.suppress(FileNotFoundError):
        paths.handles.unlink()


def read_secrets(paths: VmPaths) -> Secrets:
    """Raises BangerError when the file is gone or damaged."""
    try:
        return decode_json(paths.secrets.read_bytes(), type=Secrets)
    except (OSError, *MALFORMED) as e:
        raise BangerError("operation_failed", f"reading {paths.secrets}: {e}") from e
