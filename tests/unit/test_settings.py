"""The configuration file: strict, with the file, the key and the nearest key in its errors."""

from __future__ import annotations

from pathlib import Path

import pytest

from banger.config.paths import Paths
from banger.config.settings import Settings, host_memory_mib, read_settings
from banger.errors import BangerError


def read(tmp_path: Path, text: str) -> Settings:
    path = tmp_path / "config.toml"
    path.write_text(text)
    return read_settings(path)


def test_missing_file_means_the_defaults(tmp_path: Path) -> None:
    assert read_settings(tmp_path / "none.toml") == Settings()


def test_empty_file_means_the_defaults(tmp_path: Path) -> None:
    assert read(tmp_path, "") == Settings()


def test_keys_are_read_into_their_units(tmp_path: Path) -> None:
    settings = read(
        tmp_path,
        'disk_reserve = "3G"\nready_timeout = "2m"\nstop_timeout = "5s"\n'
        "[vm_defaults]\nvcpu = 3\nmemory_mib = 256\n",
    )
    assert settings.disk_reserve_bytes == 3 << 30
    assert (settings.ready_timeout_s, settings.stop_timeout_s) == (120, 5)
    assert (settings.vm_defaults.vcpu, settings.vm_defaults.memory_mib) == (3, 256)


def test_bridge_address_and_prefix_make_the_subnet(tmp_path: Path) -> None:
    settings = read(tmp_path, 'bridge_ip = "10.9.8.1"\ncidr = 20\n')
    assert str(settings.subnet) == "10.9.0.0/20"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("vmn = 'qemu'", "unknown field `vmn`; did you mean `vmm`?"),
        ("[vm_defaults]\nvcpus = 2", "did you mean `vcpu`?"),
        ("vmm = 'xen'", "vmm"),
        ("cidr = '24'", "cidr"),
        ("cidr = 7", "cidr must be 8 to 30"),
        ("bridge_name = 'docker0'", "bridge_name must be br-fc"),
        ("bridge_name = 'br-fc-far-too-long'", "15 characters"),
        ("bridge_ip = '8.8.8.1'", "must lie within"),
        ("bridge_ip = '172.16.0.0'", "a host's address"),
        ("bridge_ip = '172.16.0.255'", "a host's address"),
        ("bridge_ip = 'bridge'", "bridge"),
        ("default_dns = []", "one to three"),
        ("default_dns = ['resolver']", "resolver"),
        ("memory_budget_percent = 5", "10 to 95"),
        ("disk_reserve = 'much'", "is no size"),
        ("ready_timeout = 'long'", "long"),
        ("[vm_defaults]\nvcpu = 0", "1 to 32"),
        ("[vm_defaults]\nmemory_mib = 64", "128 or more"),
        ("[vm_defaults]\ndisk_size = 'big'", "is no size"),
        ("vmm = ", "config.toml"),
        ("log_level = 'loud'", "log_level"),
    ],
)  # fmt: skip
def test_what_is_not_allowed_is_named_with_its_file(
    tmp_path: Path, text: str, expected: str
) -> None:
    with pytest.raises(BangerError) as caught:
        read(tmp_path, text)
    error = caught.value
    assert error.code == "bad_request"
    assert expected in error.message
    assert error.message.startswith(f"reading the configuration {tmp_path / 'config.toml'}: ")
    assert error.hint == f"$EDITOR {tmp_path / 'config.toml'}"


def test_file_that_is_no_text_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(BangerError, match=r"config\.toml"):
        read_settings(tmp_path / "config.toml")


def test_file_that_is_a_directory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BangerError, match="Is a directory"):
        read_settings(tmp_path)


def test_memory_of_this_host_is_what_the_kernel_says() -> None:
    import os

    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20
    assert abs(host_memory_mib() - total) <= 1


# --- paths ----------------------------------------------------------------------------------------


def test_directories_follow_the_xdg_variables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("STATE_HOME", "CACHE_HOME", "CONFIG_HOME", "RUNTIME_DIR"):
        monkeypatch.setenv(f"XDG_{name}", str(tmp_path / name))
    paths = Paths.user_mode()
    assert paths.state == tmp_path / "STATE_HOME" / "banger"
    assert paths.cache == tmp_path / "CACHE_HOME" / "banger"
    assert paths.runtime == tmp_path / "RUNTIME_DIR" / "banger"
    assert paths.config_file == tmp_path / "CONFIG_HOME" / "banger" / "config.toml"


@pytest.mark.parametrize("value", ["", "relative/path"])
def test_xdg_variable_that_is_not_absolute_is_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    """As the XDG base directory specification asks for."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_STATE_HOME", value)
    monkeypatch.setenv("XDG_RUNTIME_DIR", value)
    paths = Paths.user_mode()
    assert paths.state == tmp_path / ".local" / "state" / "banger"
    assert paths.runtime.is_absolute()


def test_socket_of_a_vm_fits_sun_path_in_the_usual_runtime_directory() -> None:
    paths = Paths(
        state=Path("/s"), cache=Path("/c"), runtime=Path("/run/user/4294967295/banger"),
        config_file=Path("/x"),
    )  # fmt: skip
    vm = paths.vm("0" * 32)
    longest = f"{vm.vsock}_65535"
    assert len(longest.encode()) < 108
