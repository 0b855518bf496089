"""Paths that options describe, while somebody who has a directory on the way puts other things there."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from volumes import InvalidParameter
from volumes.given import GivenDirectory

from blockdev import Deadline, beneath, mounts
from flexvolume import Driver as Calls
from flexvolume import Reply
from runvol import assembly, config
from tests.driver import Driver
from tests.flexvolume.test_described import described, image
from tests.flexvolume.test_driver import Flex


class Here(Flex):
    """The calls in this process, so that a test can come between two steps of one."""

    def __init__(self, driver: Driver) -> None:
        super().__init__(driver)
        self.node = assembly.build(config.load(environment=self.environment))
        self.calls = Calls(self.node, directory=str(driver.records / "flexvolume"))

    def answer(self, *words: str) -> Reply:
        return self.calls.answer(words, Deadline.after(20))

    def after_attach(self, backend: str, change) -> None:
        """`change` is done after each look at the path, and before anything is done with it."""
        one = self.node.catalog.named(backend)
        attach = one.attach

        def attached(*arguments):
            source = attach(*arguments)
            change()
            return source

        one.attach = attached


@pytest.fixture
def here() -> Iterator[Here]:
    driver = Driver()
    for name in ("data/team/sub", "disks", "outside"):
        (driver.directory / name).mkdir(parents=True)
    (driver.directory / "outside/secret").write_text("s")
    driver.environment |= {
        "RUNVOL_FLEXVOLUME_DIRECTORIES": str(driver.directory / "data"),
        "RUNVOL_FLEXVOLUME_DEVICES": str(driver.directory / "disks"),
    }
    one = Here(driver)
    yield one
    one.node.catalog.close()
    held = one.driver.run / "given"
    left = [*driver.mounts(), *driver.loop_devices(), *(os.listdir(held) if held.exists() else [])]
    driver.remove()
    assert not left, left


@pytest.mark.parametrize("swapped", ["data/team", "data/team/sub"])
def test_a_directory_that_becomes_a_link_after_the_look_at_it_is_not_bound(here, swapped):
    root = here.driver.directory
    (root / "outside/sub").mkdir()

    def swap() -> None:
        (root / swapped).rename(root / "away")
        (root / swapped).symlink_to(root / "outside")
        one.attach = lambda *_: source

    one = here.node.catalog.named("given-directory")
    place = str(root / "data/team/sub")
    source = one.attach(one.id_of(place), {"directory": place})
    here.after_attach("given-directory", swap)
    target = here.target("v")
    reply = here.answer("mount", target, described(directory=place))
    assert not os.listdir(target)
    assert reply.status == "Failure"
    assert place in reply.message
    assert "link" in reply.message
    assert here.answer("unmount", target).status == "Success"


def test_a_directory_is_never_bound_from_outside_however_often_it_is_swapped(here):
    team, outside = here.driver.directory / "data/team", here.driver.directory / "outside"
    (team / "link").symlink_to(outside)
    stop = threading.Event()

    def swap() -> None:
        number = 0
        while not stop.is_set():
            exchange(team / "sub", team / "link", team / "tmp")
            number += 1
            time.sleep((0.0004, 0.0011, 0.0007)[number % 3])

    thread = threading.Thread(target=swap)
    thread.start()
    seen = {"Success": 0, "Failure": 0}
    try:
        target = here.target("v")
        until = time.monotonic() + 5
        while time.monotonic() < until:
            reply = here.answer("mount", target, described(directory=str(team / "sub")))
            seen[reply.status] += 1
            assert not os.path.exists(f"{target}/secret")
            here.answer("unmount", target)
            os.makedirs(target, exist_ok=True)
    finally:
        stop.set()
        thread.join()
    assert all(seen.values()), seen


def exchange(one: Path, other: Path, spare: Path) -> None:
    """Neither name is missing for longer than a rename takes."""
    os.rename(one, spare)
    os.rename(other, one)
    os.rename(spare, other)


def test_what_a_group_is_given_is_what_was_opened(here):
    root = here.driver.directory
    before = (root / "outside").stat()
    one = here.node.catalog.named("given-directory")
    place = str(root / "data/team/sub")
    source = one.attach(one.id_of(place), {"directory": place})

    def swap() -> None:
        (root / "data/team").rename(root / "away")
        (root / "data/team").symlink_to(root)
        (root / "sub").symlink_to("outside")
        one.attach = lambda *_: source

    here.after_attach("given-directory", swap)
    target = here.target("v")
    options = described(directory=place, **{"kubernetes.io/mounterArgs.FsGroup": "4711"})
    assert here.answer("mount", target, options).status == "Failure"
    assert ((root / "outside").stat().st_gid, (root / "outside").stat().st_mode) == (before.st_gid, before.st_mode)
    here.answer("unmount", target)


@pytest.mark.parametrize("runtime", ["runc", "kata"])
def test_an_image_that_is_swapped_after_the_look_at_it_is_still_the_one_that_was_opened(here, runtime):
    disk, other = image(here), image(here, "other.img")
    before = other.read_bytes()
    one = here.node.catalog.named("given-device")
    volume = one.id_of(str(disk))
    source = one.attach(volume, {"device": str(disk)})
    disk.rename(disk.with_name("away.img"))
    disk.symlink_to("other.img")
    one.attach = lambda *_: source
    one.id_of = lambda _path: volume
    target = here.target("v")
    # Nobody has a claim yet, so what is held is let go before the mount; here it has to stay.
    one.let_go, let_go = (lambda _volume: None), one.let_go
    reply = here.answer("mount", target, described(device=str(disk), runtime=runtime))
    assert reply.status == "Success", reply
    if runtime == "kata":
        (handed,) = json.loads(here.driver.cli("handoffs", "--json").stdout)["items"]
        assert os.path.samefile(handed["device"], disk.with_name("away.img"))
    else:
        (Path(target) / "mine").write_text("x")
        os.sync()
        assert other.read_bytes() == before
    one.let_go = let_go
    assert here.answer("unmount", target).status == "Success"


def test_an_image_in_use_keeps_its_file_whatever_its_name_stands_for(here):
    disk, target = image(here), here.target("v")
    assert here.answer("mount", target, described(device=str(disk), runtime="kata")).status == "Success"
    (handed,) = json.loads(here.driver.cli("handoffs", "--json").stdout)["items"]
    first = os.stat(handed["device"]).st_ino
    disk.rename(disk.with_name("away.img"))
    image(here)
    said = here.answer("mount", target, described(device=str(disk), runtime="kata"))
    assert "is another file than the one" in said.message
    assert os.stat(handed["device"]).st_ino == first
    assert here.answer("unmount", target).status == "Success"
    os.makedirs(target, exist_ok=True)
    assert here.answer("mount", target, described(device=str(disk))).status == "Success"
    assert here.answer("unmount", target).status == "Success"


def test_a_device_node_that_a_container_made_is_refused(here):
    node = here.driver.directory / "disks/sda"
    os.mknod(node, 0o600 | 0o060000, os.makedev(7, 0))
    said = here.answer("mount", here.target("v"), described(device=str(node))).message
    assert "outside of /dev" in said


def test_a_root_below_another_one_is_no_root_of_its_own(here):
    root = here.driver.directory
    (root / "data/team/images").symlink_to("/etc")
    here.environment["RUNVOL_FLEXVOLUME_DIRECTORIES"] = f"{root}/data,{root}/data/team/images"
    said = here.fails("mount", here.target("v"), described(directory=f"{root}/data/team/images/ssl"))
    assert "must lie below" in said


@pytest.mark.parametrize("allowed", ["{root}/", "{root}//sub/..", "/"])
def test_an_allowed_directory_may_be_written_with_a_slash_at_its_end(tmp_path, allowed):
    (tmp_path / "v").mkdir()
    given = GivenDirectory(allowed=[allowed.format(root=tmp_path)])
    assert given.id_of(str(tmp_path / "v")).startswith("given-dir-")
    narrow = GivenDirectory(allowed=[f"{tmp_path}/v/", f"{tmp_path}/v"])
    (tmp_path / "v" / "in").mkdir()
    assert narrow.id_of(str(tmp_path / "v" / "in"))
    with pytest.raises(InvalidParameter, match="must lie below"):
        narrow.id_of(str(tmp_path))
    assert GivenDirectory(allowed=["/", "//", f"/{tmp_path}"]).id_of(str(tmp_path / "v"))


@pytest.mark.parametrize("allowed", ["", ".", "v"])
def test_an_allowed_directory_that_is_no_absolute_path_allows_nothing(tmp_path, monkeypatch, caplog, allowed):
    (tmp_path / "v").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidParameter, match="must lie below"):
        GivenDirectory(allowed=[allowed]).id_of(str(tmp_path / "v"))
    assert "no absolute path" in caplog.text


def test_a_second_spelling_of_an_allowed_directory_is_no_root_of_its_own(tmp_path):
    (tmp_path / "in").symlink_to("/etc")
    with pytest.raises(InvalidParameter, match="must lie below"):
        GivenDirectory(allowed=[str(tmp_path), f"/{tmp_path}/in"]).id_of("/etc/ssl")


@pytest.mark.parametrize("option", ["journal_path=/dev/sda", "journal_dev=0x800", "logdev=/dev/sda", "rtdev=/dev/sda"])
def test_no_mount_option_names_another_device(here, option):
    said = here.answer("mount", here.target("v"), described(device=str(image(here)), mountOptions=f"noatime,{option}"))
    assert option.partition("=")[0] in said.message
    assert "mountOptions" in said.message


def test_something_else_at_the_target_of_a_directory_is_told_and_left(here):
    root = here.driver.directory
    target = here.target("v")
    options = described(directory=str(root / "data/team/sub"))
    assert here.answer("mount", target, options).status == "Success"
    assert here.answer("mount", target, options).status == "Success"
    mounts.be_unmounted(target, Deadline.after(5))
    mounts.bind(str(root / "outside"), target, read_only=False)
    said = here.answer("mount", target, options)
    assert "something else than" in said.message
    assert target in said.message
    assert os.path.exists(f"{target}/secret")
    assert here.answer("unmount", target).status == "Success"


@pytest.mark.parametrize("kind", ["directory", "device"])
def test_claims_of_the_release_before_go_on(here, kind):
    """Their source is the described path itself, and nothing holds it."""
    place = str(here.driver.directory / "data/team/sub") if kind == "directory" else str(image(here))
    one, two = here.target("v", 10), here.target("v", 11)
    assert here.answer("mount", one, described(**{kind: place})).status == "Success"
    (record,) = (here.driver.records / "claims").iterdir()
    claim = json.loads(record.read_text())
    record.write_text(json.dumps({**claim, "source": place}))
    here.node.catalog.named(f"given-{kind}").let_go(claim["volume"])
    for target in (one, two):
        assert here.answer("mount", target, described(**{kind: place})).status == "Success"
    (Path(one) / "f").write_text("x")
    assert (Path(two) / "f").read_text() == "x"
    for target in (one, two):
        assert here.answer("unmount", target).status == "Success"
    assert not os.listdir(here.driver.records / "claims")


def test_what_a_killed_call_holds_is_let_go_by_the_next_one(here):
    disk, target = image(here), here.target("v")
    one = here.node.catalog.named("given-device")
    one.attach(one.id_of(str(disk)), {"device": str(disk)})
    disk.rename(disk.with_name("away.img"))
    image(here)
    assert here.answer("mount", target, described(device=str(disk))).status == "Success"
    assert here.answer("unmount", target).status == "Success"


def test_no_link_is_followed_and_the_root_is_not_left(tmp_path):
    (tmp_path / "in/deep").mkdir(parents=True)
    (tmp_path / "in/link").symlink_to("deep")
    (tmp_path / "in/up").symlink_to("..")
    with beneath.opened(str(tmp_path / "in/deep"), root=str(tmp_path / "in")) as fd:
        assert os.path.samestat(os.fstat(fd), (tmp_path / "in/deep").stat())
        with beneath.opened(str(tmp_path / "in/deep")) as again, beneath.opened(str(tmp_path)) as other:
            assert beneath.same(fd, again)
            assert not beneath.same(fd, other)
    for path in ("in/link", "in/up/in", "in/link/x", "../x"):
        with pytest.raises(OSError), beneath.opened(str(tmp_path / path), root=str(tmp_path / "in")):  # noqa: PT011
            pass
