"""Read-only, also what is mounted below: the target that is bound, and a container of the real runc that asks for it
(`recursiveReadOnly`, CRI's `rro`)."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from blockdev import mountinfo
from tests import runc
from tests.csi.helpers import PODS
from tests.driver import Driver

WRITES = "echo x > /data/f && echo wrote; echo x > /data/inner/f && echo wrote below"


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[Path]:
    """A directory on a mount whose mounts propagate, as systemd makes the node's."""
    place = tmp_path / "disk"
    runc.mounted("tmpfs", place, "tmpfs")
    subprocess.run(["mount", "--make-shared", str(place)], check=True)
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.fixture
def driver(shared: Path) -> Iterator[Driver]:
    settings = {"RUNVOL_DIRECTORY_PATH": str(shared / "volumes"), "RUNVOL_DETECT_DEFAULT_RUNTIME": "runc"}
    with Driver(environment=settings) as one:
        yield one
        assert not one.mounts()


@pytest.fixture
def volume(driver):
    made = driver.create("files", backend="directory", quota="none")
    driver.stage(made)
    yield made
    for pod in PODS[1:4]:
        driver.unpublish(made, pod)
    driver.unstage(made)


@contextmanager
def inner(shared: Path) -> Iterator[Path]:
    """A filesystem of its own that somebody mounts inside of the volume's directory."""
    (directory,) = (path for path in (shared / "volumes").iterdir() if path.is_dir() and not path.name.startswith("."))
    place = directory / "inner"
    runc.mounted("tmpfs", place, "tmpfs")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def below(target: str) -> list[str]:
    return [mount.target for mount in mountinfo.table() if mount.target.startswith(f"{target}/")]


def test_what_was_mounted_inside_before_is_at_no_target(driver, volume, shared):
    """As kubelet's own volumes of a directory have it: a bind is of one filesystem."""
    with inner(shared):
        reads, writes = driver.publish(volume, PODS[1], read_only=True), driver.publish(volume, PODS[2])
        assert below(reads) == below(writes) == []
        (Path(writes) / "inner/f").write_text("in the directory, below what is mounted there")
        with pytest.raises(OSError, match="Read-only"):
            (Path(reads) / "inner/g").write_text("x")


def test_what_is_mounted_inside_later_never_makes_a_read_only_target_writable(driver, volume, shared):
    reads, writes = driver.publish(volume, PODS[1], read_only=True), driver.publish(volume, PODS[2])
    with inner(shared) as place:
        assert below(writes) == [f"{writes}/inner"], "a mount that may be written goes on as before"
        assert below(reads) == []
        with pytest.raises(OSError, match="Read-only"):
            (Path(reads) / "inner/f").write_text("x")
        done = runc.run(reads, WRITES, options=("ro",))
        assert "wrote" not in done.stdout and done.stderr.count("Read-only file system") == 2, done
        assert not list(place.iterdir())


@pytest.mark.parametrize("users", [True, False], ids=["host users", "users of its own"])
@pytest.mark.parametrize(("option", "said"), [("ro", "wrote below\n"), ("rro", "")])
def test_a_container_that_asks_for_it_may_write_nowhere(driver, volume, shared, option, said, users):
    """On a target that may be written, which another container of the pod has so: CRI's `ro` is of the top alone."""
    target = driver.publish(volume, PODS[3])
    with inner(shared) as place:
        place.chmod(0o777)
        done = runc.run(target, WRITES, options=(option,), host_users=users)
        assert done.stdout == said, done
        assert [path.name for path in place.iterdir()] == (["f"] if said else [])


def test_a_read_only_block_volume_is_so_for_a_container_that_asks_for_it(driver):
    volume = driver.create("v", backend="loop")
    driver.stage(volume)
    target = driver.publish(volume, PODS[1], read_only=True)
    done = runc.run(target, WRITES, options=("rro",), host_users=False)
    assert done.returncode != 0 and "Read-only file system" in done.stderr
    driver.unpublish(volume, PODS[1])
    driver.unstage(volume)
