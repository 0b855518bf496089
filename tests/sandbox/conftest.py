"""One guest for many tests; the tests that kill a guest bring their own."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from blockdev import Deadline, filesystems
from guestmount import KataDialect
from guestmount.handoff import Delivery
from tests.sandbox.shim import Sandbox, Settings, volume_mount, write_bundle
from tests.sandbox.vm import VM


@pytest.fixture(scope="session")
def place() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="rv-guest-", dir="/var/tmp"))
    (path / "shared").mkdir()
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="session")
def vm(place: Path) -> Iterator[VM]:
    with VM(virtiofs=place / "shared") as machine:
        yield machine


@dataclass
class Bench:
    """A sandbox in the shared guest, with a volume of its own."""

    sandbox: Sandbox
    place: Path
    dialect: KataDialect
    made: int = 0
    containers: int = 0

    def image(self, fstype: str = "ext4") -> Path:
        self.made += 1
        path = self.place / f"volume-{self.made}.img"
        path.touch()
        with path.open("r+b") as file:
            file.truncate((320 if fstype == "xfs" else 64) << 20)
        filesystems.make(str(path), fstype, Deadline.after(20))
        return path

    def target(self) -> Path:
        path = self.place / f"target-{self.made}"
        path.mkdir(exist_ok=True)
        return path

    def hand_over(self, device: Path | str, fstype: str = "ext4", **more) -> str:
        target = str(self.target())
        self.dialect.deliver(Delivery(volume_id="v", target=target, device=str(device), fstype=fstype, **more))
        return target

    def hand_over_another(self, device: Path | str, fstype: str = "ext4") -> str:
        self.made += 1
        return self.hand_over(device, fstype)

    def container(self, *mounts: dict, devices: list[dict] | None = None) -> str:
        self.containers += 1
        name = f"c{self.containers}-{self.place.name[-6:]}"
        self.sandbox.create_container(write_bundle(self.place / f"bundle-{name}", list(mounts), devices), name)
        return name

    def with_volume(self, target: str, **more) -> str:
        return self.container(volume_mount(target, **more))


_sandboxes = 0


@pytest.fixture
def bench(request: pytest.FixtureRequest, vm: VM, place: Path, tmp_path: Path) -> Iterator[Bench]:
    """Parametrised indirectly with changes of the shim's settings."""
    global _sandboxes  # noqa: PLW0603 - the guest has one agent for all sandboxes
    changes = getattr(request, "param", {})
    directory = Path(tempfile.mkdtemp(prefix="b-", dir=place))
    settings = replace(Settings(direct_volumes=directory / "direct-volumes", shared=place / "shared"), **changes)
    sandbox = Sandbox(vm=vm, settings=settings)
    _sandboxes += 1
    if _sandboxes == 1:
        sandbox.start()
    vm.commands.clear()
    made = Bench(sandbox, directory, KataDialect(str(directory / "direct-volumes")))
    yield made
    for name in list(sandbox._containers):
        sandbox.remove_container(name)
    sandbox.destroy()
