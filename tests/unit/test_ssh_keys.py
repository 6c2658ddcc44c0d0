"""Keys and known_hosts, judged by OpenSSH's own tools."""

from __future__ import annotations

import shutil
import stat
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from banger.ssh.keys import ensure_owner_key, generate_key
from banger.ssh.known_hosts import replace_host

KEY_A = generate_key("a").public
KEY_B = generate_key("b").public


def keygen(*words: str | Path) -> str:
    program = shutil.which("ssh-keygen")
    if program is None:
        pytest.skip("ssh-keygen is not installed here")
    return subprocess.run([program, *words], check=True, capture_output=True, text=True).stdout


def test_private_key_is_one_that_openssh_reads(tmp_path: Path) -> None:
    pair = generate_key("web")
    path = tmp_path / "key"
    path.write_text(pair.private)
    path.chmod(0o600)
    assert keygen("-y", "-f", path).split()[:2] == pair.public.split()[:2]
    assert pair.public.split()[0] == "ssh-ed25519"
    assert pair.public.endswith(" web")


def test_owner_key_is_made_once_and_private(tmp_path: Path) -> None:
    path = tmp_path / "ssh" / "id_ed25519"
    line = ensure_owner_key(path)
    content = path.read_bytes()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert ensure_owner_key(path) == line
    assert path.read_bytes() == content


def test_first_calls_at_once_agree_on_one_key(tmp_path: Path) -> None:
    path = tmp_path / "id_ed25519"
    with ThreadPoolExecutor(4) as pool:
        lines = set(pool.map(lambda _: ensure_owner_key(path), range(4)))
    assert len(lines) == 1
    assert keygen("-y", "-f", path).split()[:2] == lines.pop().split()[:2]


def test_public_half_that_is_missing_is_derived(tmp_path: Path) -> None:
    path = tmp_path / "id_ed25519"
    line = ensure_owner_key(path)
    path.with_name("id_ed25519.pub").unlink()
    assert ensure_owner_key(path).split()[:2] == line.split()[:2]


def test_known_host_is_found_by_name_and_address(tmp_path: Path) -> None:
    path = tmp_path / "known_hosts"
    replace_host(path, ["web.vm", "172.16.0.2"], KEY_A)
    for host in ("web.vm", "172.16.0.2"):
        assert KEY_A.split()[1] in keygen("-F", host, "-f", path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_address_that_another_vm_gets_has_only_the_new_key(tmp_path: Path) -> None:
    path = tmp_path / "known_hosts"
    replace_host(path, ["old.vm", "172.16.0.2"], KEY_A)
    replace_host(path, ["other.vm", "172.16.0.3"], KEY_A)
    replace_host(path, ["new.vm", "172.16.0.2"], KEY_B)
    lines = path.read_text().splitlines()
    assert [line.split()[0] for line in lines] == ["other.vm,172.16.0.3", "new.vm,172.16.0.2"]
    assert KEY_A.split()[1] not in keygen("-F", "172.16.0.2", "-f", path)


def test_removed_host_is_gone_and_the_others_stay(tmp_path: Path) -> None:
    path = tmp_path / "known_hosts"
    replace_host(path, ["a.vm"], KEY_A)
    replace_host(path, ["b.vm"], KEY_B)
    replace_host(path, ["a.vm", "172.16.0.9"], None)
    assert [line.split()[0] for line in path.read_text().splitlines()] == ["b.vm"]


def test_removing_from_nothing_makes_no_file(tmp_path: Path) -> None:
    replace_host(tmp_path / "known_hosts", ["a.vm"], None)
    assert not (tmp_path / "known_hosts").exists()


def test_changes_at_once_lose_none(tmp_path: Path) -> None:
    path = tmp_path / "known_hosts"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: replace_host(path, [f"vm-{n}.vm"], KEY_A), range(24)))
    names = {line.split()[0] for line in path.read_text().splitlines()}
    assert names == {f"vm-{n}.vm" for n in range(24)}
