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
        'oci_cache_limit = "512MiB"\n'
        "[vm_defaults]\nvcpu = 3\nmemory_mib = 256\n",
    )
    assert settings.disk_reserve_bytes == 3 << 30
    assert settings.oci_cache_limit_bytes == 512 << 20
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
        ("cidr = 'x24'", "cidr"),
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
        ("oci_cache_limit = '-1G'", "is no size"),
        ("ready_timeout = 'long'", "long"),
        ("auto_stop_stale_after = '59s'", "0 or at least 60 s"),
        ("auto_stop_stale_after = 'never'", "no duration"),
        ("stats_poll_interval = '0'", "at least 1s"),
        ("[vm_defaults]\nvcpu = 0", "1 to 32"),
        ("[vm_defaults]\nmemory_mib = 64", "128 or more"),
        ("[vm_defaults]\ndisk_size = 'big'", "is no size"),
        ("tap_pool_size = 65", "64 or less"),
        ("dns_listen_addr = '0.0.0.0:53'", "loopback address"),
        ("dns_listen_addr = '127.0.0.1'", "loopback address"),
        ("dns_listen_addr = '127.0.0.1:70000'", "loopback address"),
        ("guest_host_ports = [0]", "1 to 65535"),
        (f"guest_host_ports = {list(range(1, 34))}", "32 ports"),
        ("jailer_bin = 'bin/jailer'", "absolute path or begin with ~/"),
        ("firecracker_bin = '~alice/firecracker'", "absolute path or begin with ~/"),
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


def test_bad_value_is_shown(tmp_path: Path) -> None:
    with pytest.raises(BangerError, match=r"it is 1024"):
        read(tmp_path, "memory_budget_percent = 1024")


def test_keys_may_be_written_in_their_simple_form(tmp_path: Path) -> None:
    settings = read(tmp_path, 'cidr = "20"\ndefault_dns = "9.9.9.9"\n')
    assert (settings.cidr, settings.default_dns) == (20, ("9.9.9.9",))


@pytest.mark.parametrize("listen", ["127.0.0.1:42069", "127.0.0.53:53", "[::1]:5353"])
def test_any_loopback_address_may_answer_names(tmp_path: Path, listen: str) -> None:
    assert read(tmp_path, f'dns_listen_addr = "{listen}"').dns_listen_addr == listen


# --- layers ---------------------------------------------------------------------------------------


def two_files(tmp_path: Path, host: str, owner: str) -> tuple[Path, Path]:
    files = tmp_path / "host.toml", tmp_path / "owner.toml"
    for path, text in zip(files, (host, owner), strict=True):
        path.write_text(text)
    return files


def test_owners_file_overrides_the_hosts_key_by_key(tmp_path: Path) -> None:
    settings = read_settings(
        *two_files(
            tmp_path,
            'log_level = "warn"\ndefault_dns = ["9.9.9.9", "1.1.1.1"]\n'
            "[vm_defaults]\nvcpu = 3\nmemory_mib = 512\n",
            'default_dns = ["8.8.8.8"]\n[vm_defaults]\nvcpu = 4\n',
        )
    )
    assert settings.log_level == "warn"
    assert settings.default_dns == ("8.8.8.8",)
    assert (settings.vm_defaults.vcpu, settings.vm_defaults.memory_mib) == (4, 512)


@pytest.mark.parametrize("wrong", ["host", "owner"])
def test_error_names_the_file_that_has_it(tmp_path: Path, wrong: str) -> None:
    texts = {"host": "cidr = 20\n", "owner": "cidr = 21\n"} | {wrong: "vmn = 1\n"}
    files = two_files(tmp_path, texts["host"], texts["owner"])
    with pytest.raises(BangerError) as caught:
        read_settings(*files)
    assert caught.value.message.startswith(
        f"reading the configuration {tmp_path / wrong}.toml: Object contains unknown field `vmn`"
    )


def test_value_that_fits_only_with_the_hosts_is_no_error(tmp_path: Path) -> None:
    """172.16.0.255 is a host's address in a /16, and none in the default /24."""
    files = two_files(tmp_path, "cidr = 16\n", 'bridge_ip = "172.16.0.255"\n')
    assert str(read_settings(*files).subnet) == "172.16.0.0/16"


def test_jail_base_is_the_hosts_to_say(tmp_path: Path) -> None:
    """Root makes directories there."""
    files = two_files(tmp_path, 'jailer_chroot_base = "/srv/jail"\n', "")
    assert read_settings(*files).jailer_chroot_base == "/srv/jail"
    files = two_files(tmp_path, "", 'jailer_chroot_base = "/somewhere/jail"\n')
    with pytest.raises(BangerError, match=r"for the whole host only, in .*host\.toml"):
        read_settings(*files)


def test_tilde_is_the_owners_home(tmp_path: Path) -> None:
    files = two_files(tmp_path, "", 'ssh_key_path = "~/.ssh/vm"\n')
    assert read_settings(*files, home=Path("/alice")).ssh_key_path == "/alice/.ssh/vm"


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
