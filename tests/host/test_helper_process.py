"""The helper as a process of its own: its protocol, its log, and its sudden death at each step."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from banger_root import cgroup
from host.conftest import build_params
from host.namespace import census, elements
from patience import PATIENCE_S

pytestmark = pytest.mark.host

HELPER = Path(__file__).resolve().parents[2] / "src/banger_root"
DYING = Path(__file__).with_name("dying_helper.py")
SWEPT_NOTHING = {"removed": [], "strays": [], "pooled": 0}
ISOLATED = ["/usr/bin/python3", "-I", "-S", "-B"]


class Line:
    """Our end of a helper's socket."""

    def __init__(self, connection: socket.socket, process: subprocess.Popen[bytes]) -> None:
        self.connection = connection
        self.process = process
        self._file = connection.makefile("rb")

    def send(self, data: bytes) -> None:
        self.connection.sendall(data)

    def answer(self) -> Any:
        line = self._file.readline()
        return json.loads(line) if line else None

    def call(self, method: str, **params: Any) -> Any:
        """The answer, None when the helper died instead."""
        request = {"version": 1, "method": method, "params": params, "op_id": "op-00beef"}
        self.send(json.dumps(request).encode() + b"\n")
        return self.answer()

    def close(self) -> None:
        self._file.close()
        self.connection.close()


@contextmanager
def running(ledger: Path, *program: str, uid: int = 0) -> Iterator[Line]:
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [*(program or (*ISOLATED, str(HELPER))),
             "--owner-uid", str(uid), "--ledger", str(ledger), "--fd", "0"],
            stdin=theirs.fileno(),
            stderr=subprocess.PIPE,
        )  # fmt: skip
    line = Line(ours, process)
    try:
        yield line
    finally:
        line.close()
        process.communicate(timeout=PATIENCE_S)


def cgroup_of(vm_id: str) -> Path | None:
    path = cgroup.find_directory(vm_id)
    return Path(path) if path is not None and Path(path).exists() else None


MOMENTS = [
    *(f"save:{n}" for n in range(1, 7)),
    *(f"made:{step}" for step in ("bridge", "elements", "tap", "port", "cgroup")),
]


@pytest.mark.parametrize("cleaner", ["sweep", "release", "prepare"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_helper_killed_in_prepare_leaves_nothing_that_the_next_one_cannot_give_back(
    namespace: None, tmp_path: Path, moment: str, cleaner: str
) -> None:
    before = census()
    ledger = tmp_path / "leases"
    params = build_params(2)
    with running(ledger, sys.executable, str(DYING), moment) as line:
        assert line.call("prepare", **params) is None
        assert line.process.wait() == -signal.SIGKILL
    with running(ledger) as line:
        if cleaner == "prepare":
            assert "result" in line.call("prepare", **params)
            assert len(elements()["vm_ports"]) == 1
        if cleaner == "sweep" and moment != "save:6":
            # After the sixth write the lease is whole, only the answer was lost.
            assert line.call("sweep") == {"result": {**SWEPT_NOTHING, "removed": [params["vm_id"]]}}
        else:
            assert line.call("release", id=params["vm_id"]) == {"result": {}}
    assert census() == before
    assert [f.name for f in ledger.iterdir()] == []
    assert cgroup_of(params["vm_id"]) is None


@pytest.mark.parametrize("cleaner", ["sweep", "release"])
@pytest.mark.parametrize("step", ["cgroup", "tap", "elements", "bridge"])
def test_helper_killed_in_release_leaves_nothing_that_the_next_one_cannot_give_back(
    namespace: None, tmp_path: Path, step: str, cleaner: str
) -> None:
    before = census()
    ledger = tmp_path / "leases"
    params = build_params(2)
    with running(ledger, sys.executable, str(DYING), f"undone:{step}") as line:
        answer = line.call("prepare", **params)
        if step == "cgroup" and answer["result"]["cgroup"] is None:
            pytest.skip("needs a writable cgroup v2")
        assert line.call("release", id=params["vm_id"]) is None
        assert line.process.wait() == -signal.SIGKILL
    with running(ledger) as line:
        if cleaner == "sweep":
            assert line.call("sweep") == {"result": {**SWEPT_NOTHING, "removed": [params["vm_id"]]}}
        else:
            assert line.call("release", id=params["vm_id"]) == {"result": {}}
    assert census() == before
    assert [f.name for f in ledger.iterdir()] == []


def test_leases_survive_the_helper(namespace: None, tmp_path: Path) -> None:
    params = build_params(2)
    with running(tmp_path / "leases") as line:
        line.call("prepare", **params)
        line.process.kill()
    with running(tmp_path / "leases") as line:
        (lease,) = line.call("status")["result"]["leases"]
        assert lease["vm_id"] == params["vm_id"]
        assert lease["state"] == "ready"
        line.call("release", id=params["vm_id"])


def test_helper_ends_when_its_peer_closes(namespace: None, tmp_path: Path) -> None:
    with running(tmp_path / "leases") as line:
        line.call("status")
        line.close()
        assert line.process.wait(timeout=PATIENCE_S) == 0


def test_each_call_writes_one_log_line(namespace: None, tmp_path: Path) -> None:
    params = build_params(2)
    with running(tmp_path / "leases") as line:
        line.call("prepare", **params)
        line.call("release", id=params["vm_id"])
        line.call("release", id="nonsense")
        line.close()
        _, log = line.process.communicate(timeout=PATIENCE_S)
    lines = [json.loads(text) for text in log.splitlines()]
    assert [(r["op_id"], r["method"], r["lease"], r["result"]) for r in lines] == [
        ("op-00beef", "prepare", params["vm_id"], "ok"),
        ("op-00beef", "release", params["vm_id"], "ok"),
        ("op-00beef", "release", "", "bad_request"),
    ]
    assert all(r["duration_ms"] >= 0 for r in lines)


def test_refusal_has_code_message_and_operation(namespace: None, tmp_path: Path) -> None:
    with running(tmp_path / "leases") as line:
        error = line.call("prepare", **{**build_params(2), "nut": True})["error"]
    assert error["code"] == "bad_request"
    assert error["message"] == 'params has the unknown field "nut"'
    assert error["op_id"] == "op-00beef"


def test_request_in_pieces_and_requests_in_one_piece_are_answered(
    namespace: None, tmp_path: Path
) -> None:
    request = b'{"version":1,"method":"sweep","params":{}}\n'
    with running(tmp_path / "leases") as line:
        line.send(request[:10])
        line.send(request[10:] + request)
        assert [line.answer(), line.answer()] == [{"result": SWEPT_NOTHING}] * 2


def test_too_long_line_is_refused_and_ends_the_connection(namespace: None, tmp_path: Path) -> None:
    with running(tmp_path / "leases") as line:
        line.send(b" " * (1 << 20) + b" ")
        assert line.answer()["error"]["code"] == "bad_request"
        assert line.answer() is None


@pytest.mark.parametrize("kind", ["symlink", "open to others", "somebody else's"])
def test_ledger_that_others_could_write_is_refused(
    namespace: None, tmp_path: Path, kind: str
) -> None:
    ledger = tmp_path / "leases"
    if kind == "symlink":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        ledger.symlink_to(tmp_path / "elsewhere")
    else:
        ledger.mkdir()
        ledger.chmod(0o770 if kind == "open to others" else 0o700)
        if kind == "somebody else's":
            os.chown(ledger, 65534, 65534)
    with running(ledger) as line:
        assert str(ledger) in line.answer()["error"]["message"]
        assert line.process.wait(timeout=PATIENCE_S) == 1


def test_damaged_ledger_file_is_named_and_the_others_work(namespace: None, tmp_path: Path) -> None:
    ledger = tmp_path / "leases"
    broken = secrets.token_hex(16)
    with running(ledger) as line:
        line.call("status")
        (ledger / f"{broken}.json").write_text('{"schema":1')
        params = build_params(2)
        assert "result" in line.call("prepare", **params)
        assert broken in line.call("status")["result"]["problems"][0]
        assert broken in line.call("release", id=broken)["error"]["message"]
        assert broken in line.call("sweep")["error"]["message"]
        assert line.call("release", id=params["vm_id"]) == {"result": {}}


def test_ledger_file_cannot_name_a_link_of_its_writers_choice(
    namespace: None, tmp_path: Path
) -> None:
    """Everything to undo is derived from checked fields; a forged file does not pass the gate."""
    ledger = tmp_path / "leases"
    params = build_params(2)
    with running(ledger) as line:
        line.call("prepare", **params)
        path = ledger / f"{params['vm_id']}.json"
        honest = path.read_text()
        path.write_text(honest.replace("br-fc-t1", "eth0"))
        assert "bridge.name" in line.call("release", id=params["vm_id"])["error"]["message"]
        path.write_text(honest)
        assert line.call("release", id=params["vm_id"]) == {"result": {}}


def test_two_helpers_on_two_ledgers_work_at_the_same_time(namespace: None, tmp_path: Path) -> None:
    before = census()
    with running(tmp_path / "one") as one, running(tmp_path / "two") as two:
        for _ in range(5):
            first, second = build_params(2), build_params(3)
            for line, params in ((one, first), (two, second)):
                request = {"version": 1, "method": "prepare", "params": params}
                line.send(json.dumps(request).encode() + b"\n")
            assert "result" in one.answer()
            assert "result" in two.answer()
            for line, params in ((one, first), (two, second)):
                request = {"version": 1, "method": "release", "params": {"id": params["vm_id"]}}
                line.send(json.dumps(request).encode() + b"\n")
            assert one.answer() == {"result": {}}
            assert two.answer() == {"result": {}}
    assert census() == before


def test_probe_finds_nothing_missing_here(namespace: None) -> None:
    done = subprocess.run([*ISOLATED, str(HELPER), "--probe"], capture_output=True)
    assert json.loads(done.stdout) == {"version": 1, "problems": []}


def test_probe_names_what_an_ordinary_user_lacks(namespace: None) -> None:
    done = subprocess.run(
        [*ISOLATED, str(HELPER), "--probe"], capture_output=True, user=65534, group=65534
    )
    if done.returncode != 0:
        pytest.skip("needs a checkout that other users may read")
    assert "uid 65534" in json.loads(done.stdout)["problems"][0]


def test_helper_runs_from_a_zip(namespace: None, tmp_path: Path) -> None:
    import zipfile

    archive = tmp_path / "banger-root.pyz"
    with zipfile.ZipFile(archive, "w") as z:
        z.write(HELPER / "__main__.py", "__main__.py")
        for module in HELPER.glob("*.py"):
            z.write(module, f"banger_root/{module.name}")
    with running(tmp_path / "leases", *ISOLATED, str(archive)) as line:
        assert line.call("sweep") == {"result": SWEPT_NOTHING}


def test_helper_imports_only_the_standard_library(namespace: None) -> None:
    code = (
        "import sys, runpy; sys.argv = [sys.argv[1], '--probe']; "
        "sys.path.insert(0, sys.argv[0])\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit: pass\n"
        "names = {m.partition('.')[0] for m in sys.modules} - {'__main__'}\n"
        "print(sorted(names - sys.stdlib_module_names))"
    )
    done = subprocess.run([*ISOLATED, "-c", code, str(HELPER)], capture_output=True, text=True)
    assert done.stdout.splitlines()[1:] == ["['banger_root']"], done.stderr
