"""The uplink's MTU, from files as the kernel writes them."""

from __future__ import annotations

from pathlib import Path

from banger.host.uplink import find_uplink_mtu

HEAD = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n"


def write(root: Path, *rows: str) -> Path:
    path = root / "route"
    path.write_text(HEAD + "".join(f"{row}\n" for row in rows))
    return path


def link(root: Path, name: str, mtu: str) -> None:
    (root / name).mkdir()
    (root / name / "mtu").write_text(mtu)


def test_the_default_route_with_the_smallest_metric_counts(tmp_path: Path) -> None:
    link(tmp_path, "tun0", "1280\n")
    link(tmp_path, "eth0", "1500\n")
    routes = write(
        tmp_path,
        "eth0\t00000000\t0101A8C0\t0003\t0\t0\t100\t00000000\t0\t0\t0",
        "tun0\t00000000\t00000000\t0001\t0\t0\t50\t00000000\t0\t0\t0",
        "eth0\t0001A8C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0",
    )
    assert find_uplink_mtu(routes, tmp_path) == 1280


def test_half_a_default_route_of_a_vpn_is_none(tmp_path: Path) -> None:
    link(tmp_path, "tun0", "1280\n")
    half = "tun0\t00000000\t00000000\t0001\t0\t0\t0\t00000080\t0\t0\t0"
    assert find_uplink_mtu(write(tmp_path, half), tmp_path) is None


def test_without_routes_or_without_the_link_there_is_none(tmp_path: Path) -> None:
    assert find_uplink_mtu(tmp_path / "absent", tmp_path) is None
    row = "gone0\t00000000\t0101A8C0\t0003\t0\t0\t0\t00000000\t0\t0\t0"
    assert find_uplink_mtu(write(tmp_path, row), tmp_path) is None
