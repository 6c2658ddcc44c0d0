"""A machine that an image is made of, and one that is to install an sshd: what their guests get."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from banger.api.records import VmRecord
from banger.config.file_sync import FileSync
from banger.guest.config import GitIdentity
from banger.progress import Silent
from banger.vm.create import create
from fakes.guest import read_config
from fakes.world import EMPTY, World

pytestmark = pytest.mark.asyncio


class Heard(Silent):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, message: str) -> None:
        self.warnings.append(message)


def give_it_an_owner(world: World, tmp_path: Path) -> None:
    """An owner with a git identity and a file that goes into every new machine."""
    (tmp_path / "token").write_text("secret")
    world.ctx.home = tmp_path
    world.ctx.git_identity = lambda: GitIdentity(name="O", email="o@example.invalid")
    world.ctx.settings = msgspec.structs.replace(
        world.ctx.settings, file_sync=(FileSync(host="~/token", guest="~/token"),)
    )


async def make(world: World, **options: Any) -> VmRecord:
    return await create(world.ctx, world.params("web"), world.image, Silent(), **options)


async def test_nothing_of_the_owner_goes_into_a_machine_that_an_image_is_made_of(
    world: World, tmp_path: Path
) -> None:
    give_it_an_owner(world, tmp_path)
    vm = await make(world, building=True)
    config = read_config(world.paths.vm(vm.id).initrd)
    assert (config["authorized_keys"], config["git_identity"]) == ([], None)
    assert world.driver.guests[vm.id].received == []


async def test_any_other_machine_gets_all_of_it(world: World, tmp_path: Path) -> None:
    give_it_an_owner(world, tmp_path)
    vm = await make(world)
    config = read_config(world.paths.vm(vm.id).initrd)
    assert config["authorized_keys"]
    assert config["git_identity"]["name"] == "O"
    assert len(world.driver.guests[vm.id].received) == 1


async def test_a_daemon_that_finds_a_machine_of_a_build_removes_it(world: World) -> None:
    await make(world, building=True)
    await world.crash()
    assert world.census() == EMPTY


@pytest.mark.parametrize(("nat", "building"), [(True, False), (False, False), (True, True)])
async def test_an_sshd_is_installed_only_where_there_is_a_way_out(
    world: World, nat: bool, building: bool
) -> None:
    image = msgspec.structs.replace(world.image, install_sshd=True)
    manifest = world.paths.images / image.id / "manifest.json"
    stored = msgspec.json.decode(manifest.read_bytes()) | {"install_sshd": True}
    manifest.chmod(0o644)
    manifest.write_bytes(msgspec.json.encode(stored))
    heard = Heard()
    vm = await create(world.ctx, world.params("web", nat=nat), image, heard, building=building)
    wanted = nat and not building
    assert read_config(world.paths.vm(vm.id).initrd)["install_sshd"] is wanted
    assert any("see --nat" in w for w in heard.warnings) is (not nat)
