"""The two services: restarted, killed at every stage of a start, uninstalled."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from tests.smoke import guests
from tests.smoke.calls import (
    CALL_S,
    Caller,
    banger,
    expect,
    host,
    kill_and_wait,
    main_pid,
    units_active,
    wait_until,
)
from tests.smoke.census import banger_processes, links, ruleset, take_census, vmm_processes
from tests.smoke.registry import scenario
from tests.smoke.user_mode import CONFIG, STATE, stop_daemon
from tests.smoke.user_mode import user_mode as user_installation

_DAEMON, _HELPER = "bangerd.service", "bangerd-root.service"
# Stages of a start, as the command shows them; `reserve` and `plan` acquire nothing on the host.
_STAGES = ("disks", "lease", "handles", "launch", "ready")
# Each row is what `uninstall --purge` may not leave.
_INSTALLED = (
    "/usr/local/lib/banger", "/usr/local/bin/banger", "/usr/local/bin/bangerd", "/etc/banger",
    "/var/lib/banger", "/var/lib/banger-root", "/var/cache/banger", "/run/banger",
    "/run/banger-root", "/etc/systemd/system/bangerd.service",
    "/etc/systemd/system/bangerd-root.service", "/etc/systemd/system/banger.slice",
)  # fmt: skip


@scenario("global", "both services restarted, then both killed: same boot id, guest at work")
def service_restart() -> None:
    with guests.vm("survivor") as vm:
        boot_id, pid = guests.boot_id(vm), guests.vmm_pid(vm)
        # Whole at any moment: it is read meanwhile.
        count = (
            "i=0; while :; do i=$((i+1)); echo $i > /root/next; mv /root/next /root/count; "
            "sleep 0.2; done"
        )
        banger("vm", "exec", vm, "--", "sh", "-c", f"setsid sh -c '{count}' >/dev/null 2>&1 &")
        for what in ("restarted", "killed"):
            before = _count(vm)
            if what == "restarted":
                host("systemctl", "restart", _HELPER, _DAEMON)
            else:
                for unit in (_DAEMON, _HELPER):
                    kill_and_wait(main_pid(unit))
                wait_until(lambda: units_active(_DAEMON, _HELPER), "both services to be back")
            expect(banger.vm_names() == [vm], f"{what}: the list is wrong")
            expect(guests.show(vm)["state"] == "running", f"{what}: the VM does not run")
            expect(guests.boot_id(vm) == boot_id, f"{what}: the guest booted again")
            expect(list(vmm_processes()) == [pid], f"{what}: VMMs are {vmm_processes()}")
            wait_until(lambda: _count(vm) > before, f"{what}: the guest's process to go on")  # noqa: B023 - within this turn
        # A lease that outlived both can be given back, and a new VM gets one.
        banger("vm", "restart", vm)
        expect(guests.boot_id(vm) != boot_id, "restart did not boot again")


def _count(vm: str) -> int:
    script = "until [ -s /root/count ]; do sleep 0.1; done; cat /root/count"
    return int(banger("vm", "exec", vm, "--", "sh", "-c", script))


@scenario("global", "the daemon killed at each stage of a start: nothing is left over afterwards")
def crash_census() -> None:
    before = take_census()
    for stage in _STAGES:
        # Before: a start goes on while the service manager is asked.
        daemon = main_pid(_DAEMON)
        process = banger.banger_started(
            "vm", "create", "--name", f"crash-{stage}",
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert process.stderr is not None
        with process.stderr as lines:
            reached = any(line.startswith(f"{stage}: ") for line in lines)
            expect(reached, f"the start did not come to the stage {stage}")
            kill_and_wait(daemon)
            print(f"{stage}: {lines.read()}")
        expect(process.wait(CALL_S) == 1, f"{stage}: the command's status is {process.returncode}")
        wait_until(lambda: units_active(_DAEMON), "the daemon to be back")
        expect(banger.vm_names() == [], f"{stage}: a VM that nobody was told of is left")
        wait_until(lambda: not take_census() - before, f"{stage}: nothing to be left over")


@scenario("global", "one VM in user mode as root beside the installed one; nothing of it stays")
def user_mode() -> None:
    with user_installation() as user:
        out = user("vm", "run", "--name", "user", "--", "sh", "-c", "hostname; exit 3", status=3)
        expect(out == "user\n", f"stdout is {out!r}")
        expect(user.json("vm", "show", "user")["vmm"] == "firecracker", "not firecracker")
        expect(banger.vm_names() == [], "the installed daemon sees a VM of user mode")
        expect(user.vm_names() == ["user"], "user mode does not list its VM")
        _check_limits(user)
        kill_and_wait(int(user.json("daemon", "status", "--json")["pid"]))
        user("vm", "exec", "user", "--", "true")
        _check_full_disk(user)
        user("vm", "delete", "user")


def _check_limits(user: Caller) -> None:
    """Those of a cgroup of our own, where no systemd makes scopes; and that `vm stats` reads it."""
    record = user.json("vm", "show", "user")
    handles = json.loads((STATE / "vms" / record["id"] / "handles.json").read_text())
    group = Path(f"/proc/{handles['process']['pid']}/cgroup").read_text().strip()
    expect(group == f"0::/banger/{record['id']}", f"its cgroup is {group}")
    directory = Path(f"/sys/fs/cgroup/banger/{record['id']}")
    limit = (record["memory_mib"] + 256) << 20
    for name, wanted in (("pids.max", "256"), ("memory.max", str(limit))):
        found = (directory / name).read_text().strip()
        expect(found == wanted, f"{name} is {found}, expected {wanted}")
    (stats,) = user.json("vm", "stats", "user")
    expect(stats["memory_limit_bytes"] == limit, f"stats say {stats['memory_limit_bytes']}")
    expect(0 < stats["memory_bytes"] <= limit, f"it uses {stats['memory_bytes']}")
    expect(stats["vmm_cpu_s"] > 0 and stats["network_sent_bytes"] > 0, f"stats are {stats}")


def _check_full_disk(user: Caller) -> None:
    """Firecracker pauses a VM below a quarter of the reserve, here one that no disk has."""

    text = CONFIG.read_text()

    def restart(with_text: str) -> None:
        stop_daemon(user)
        CONFIG.write_text(with_text)

    def paused() -> bool:
        return user.json("vm", "show", "user")["paused"] is not None

    restart(f'disk_reserve = "900T"\nstats_poll_interval = "1s"\n{text}')
    wait_until(paused, "the VM to be paused")
    done = user.done("vm", "exec", "user", "--", "true")
    expect(done.status == 1 and "is paused" in done.err, f"exec said {done.err}")
    restart(text)
    wait_until(lambda: not paused(), "the VM to go on")
    user("vm", "exec", "user", "--", "true")


@scenario("global", "refused while a VM runs; --purge leaves the user's own files only",
          final=True)  # fmt: skip
def uninstall() -> None:
    root = Caller(user="root", program=banger.program)
    own = banger.home / ".config" / "banger" / "config.toml"
    own.parent.mkdir(parents=True, exist_ok=True)
    own.write_text('log_level = "info"\n')
    guests.create("last")
    key = banger.home / ".local" / "state" / "banger" / "ssh" / "id_ed25519"
    expect(key.is_file(), f"{key} is missing")
    root.refused("system", "uninstall", because="VM last run")
    expect(guests.show("last")["state"] == "running", "the refusal stopped the VM")
    out = root("system", "uninstall", "--purge", "--force")
    expect(str(own.parent) in out, f"it does not tell what stays: {out!r}")
    left = [path for path in _INSTALLED if Path(path).exists()]
    expect(not left, f"left: {left}")
    expect(own.is_file() and key.is_file(), "the user's own files are gone")
    expect(not vmm_processes() and not list(banger_processes()), "processes are left")
    expect(not [link for link in links() if "-fc" in link or "tap-" in link], "links are left")
    expect(host("ip", "link", "show", "br-fc", status=None) == "", "the bridge is left")
    tables = [entry["table"]["name"] for entry in ruleset() if "table" in entry]
    expect("banger" not in tables, f"nftables has {tables}")
    units = host("systemctl", "list-units", "--all", "--plain", "--no-legend", "banger*").strip()
    expect(not units, f"systemd still knows {units}")
    expect("~vm" not in host("resolvectl", "domain"), "the resolver still routes .vm")
