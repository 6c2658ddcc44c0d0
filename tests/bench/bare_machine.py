"""Everything that a bare run needs and that is made before the clock starts: tap, disks, initrd.

The plan and the VMM's command line are banger's own, so both sides boot the same machine. The lease
lives from `open` to `close`; disks and initrd are made anew before each run.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import msgspec

from banger.api.records import VmRecord
from banger.config.paths import VmPaths
from banger.config.settings import read_settings
from banger.disk.blank import write_blank_disk
from banger.disk.initrd import write_vm_initrd
from banger.guest.config import CONFIG_MEMBER, TcpTransport
from banger.guest.endpoint import TcpEndpoint
from banger.host.host import Host
from banger.host.lease import derive_mac
from banger.image.entries import get_image
from banger.kernel.entries import get_kernel
from banger.names import new_vm_id
from banger.ssh.keys import ensure_owner_key, generate_key
from banger.units import MIB
from banger.vm.handles import Secrets
from banger.vm.plan import StartPlan, build_start_plan
from banger.vmm.driver import Driver, remove_stale_sockets
from banger.vmm.firecracker import FirecrackerDriver, build_documents, make_links
from banger.vmm.probe import choose_driver, probe
from tests.bench.ground import ADDRESS, PYTHON, Ground
from tests.bench.measure import timed
from tests.boot.installation import IMAGE, KERNEL

# Not the daemon's port, which listens on the same address.
_ANNOUNCE_PORT = 7002


class BareMachine:
    """A machine of the same size as `SMALL`, started by `bare.py` alone.

    `number` is the last one of its address: machines that are open at once differ in it.
    """

    def __init__(self, ground: Ground, *, kernel: str = KERNEL, number: int = 250) -> None:
        self._ground = ground
        self._kernel = kernel
        self._number = number
        self._address = f"{ADDRESS.rpartition('.')[0]}.{number}"
        settings = read_settings(ground.config)
        verdict = probe(bin_directory=ground.paths.bin, firecracker_bin=settings.firecracker_bin)
        self.driver: Driver = choose_driver(settings.vmm, verdict, network="bridge")
        self.accel = verdict.accel
        self._spec = ground.root / f"bare-{number}.json"
        self._plan = self._build_plan(settings)

    def _build_plan(self, settings: Any) -> StartPlan:
        paths = self._ground.paths
        image = get_image(paths, IMAGE)
        key = generate_key("bare")
        vm_id = new_vm_id()
        vm = VmRecord(
            id=vm_id,
            name="bare",
            state="created",
            image_id=image.id,
            image=image.name,
            kernel=self._kernel,
            vcpu=1,
            memory_mib=512,
            overlay_bytes=512 * MIB,
            work_disk_bytes=512 * MIB,
            address=self._address,
            mac=derive_mac(self._address),
            network="bridge",
            created_at="",
            updated_at="",
            touched_at="",
        )
        runtime = self._ground.root / f"b{self._number}"
        plan = build_start_plan(
            vm=vm,
            paths=VmPaths(directory=self._ground.root / f"bare-{self._number}", runtime=runtime),
            image=image,
            kernel=get_kernel(paths, self._kernel),
            secrets=Secrets(token=vm_id * 2, host_key=key.private, host_key_pub=key.public),
            settings=settings,
            capabilities=self.driver.capabilities,
            authorized_keys=(ensure_owner_key(paths.ssh_key),),
            git_identity=None,
            agent_host_port=None,
            jailing=None,
            uplink_mtu=None,
            now_unix_ns=time.time_ns(),
        )
        transport = plan.guest_config.transport
        if isinstance(transport, TcpTransport):
            transport = TcpTransport(announce=f"{ADDRESS}:{_ANNOUNCE_PORT}", peer=ADDRESS)
        config = msgspec.structs.replace(plan.guest_config, transport=transport)
        assert plan.lease is not None
        lease = msgspec.structs.replace(plan.lease, announce_port=_ANNOUNCE_PORT)
        return msgspec.structs.replace(plan, guest_config=config, lease=lease)

    def open(self) -> None:
        """Make directories and the tap."""
        for directory in (self._plan.paths.directory, self._plan.paths.runtime):
            directory.mkdir(mode=0o700)
        asyncio.run(self._with_host("prepare"))

    def close(self) -> None:
        """Give the tap back."""
        asyncio.run(self._with_host("release"))

    async def _with_host(self, what: str) -> None:
        lease = self._plan.lease
        assert lease is not None
        host = await Host.open(ledger=self._ground.paths.leases, log=self._ground.root / "root.log")
        try:
            await (host.prepare(lease) if what == "prepare" else host.release(lease.lease_id))
        finally:
            await host.aclose()

    def run(self) -> float:
        """Prepare fresh disks, then time one bare run."""
        self._prepare()
        return timed(self._argv)

    def boot(self) -> float:
        """Prepare fresh disks; seconds from the start of the VMM to the agent's announcement."""
        self._prepare()
        done = subprocess.run(
            self._argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise RuntimeError(f"booting {self._kernel}: {done.stderr}")
        return float(done.stdout)

    @property
    def _argv(self) -> list[str]:
        return [str(PYTHON), "-IS", str(Path(__file__).with_name("bare.py")), str(self._spec)]

    def _prepare(self) -> None:
        plan, paths = self._plan, self._plan.paths
        shutil.rmtree(paths.runtime)
        paths.runtime.mkdir(mode=0o700)
        remove_stale_sockets(paths.runtime)
        for role, target in (("overlay", paths.overlay), ("work", paths.work)):
            target.unlink(missing_ok=True)
            write_blank_disk(self._ground.paths, role, 512 * MIB, target)  # type: ignore[arg-type]  # a Role
        write_vm_initrd(
            Path(plan.base_initrd), paths.initrd, {CONFIG_MEMBER: plan.guest_config.encode()}
        )
        documents: tuple[Any, ...] = ()
        if isinstance(self.driver, FirecrackerDriver):
            make_links(plan.machine)
            documents = build_documents(plan.machine)
        launch = self.driver.build_launch(plan.machine)
        endpoint = plan.endpoint
        spec = {
            "argv": launch.argv,
            "cwd": str(launch.cwd),
            "console": str(paths.console),
            "documents": documents,
            "announce": {"unix": plan.announce_path.name}
            if plan.announce_path is not None
            else {"host": ADDRESS, "port": _ANNOUNCE_PORT},
            "agent": {"host": endpoint.address, "port": endpoint.port}
            if isinstance(endpoint, TcpEndpoint)
            else {"unix": Path(endpoint.path).name, "port": endpoint.port},
            "token": plan.guest_config.token,
            "exec": {"argv": ["true"], "env": {"BANGER_VM": "bare"}, "login": True, "tty": None},
        }
        self._spec.write_text(json.dumps(spec))
