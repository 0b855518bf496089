"""What goes wrong with one volume, or one export, stops no list, no start and nothing of another's; and it is named."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from tests.csi.helpers import PODS, image, refused
from tests.driver import Driver, mount_capability

MIB = 1 << 20
FREE = {"backend": "directory", "quota": "none"}


def listed(driver: Driver) -> set[str]:
    return {entry.volume.volume_id for entry in driver.client.ListVolumes().entries}


def test_a_volume_that_cannot_be_looked_at_is_listed_with_the_reason(driver):
    """In its place is something that cannot be read: the look at it fails."""
    bad, good = driver.create("bad"), driver.create("good")
    path = image(driver, bad)
    path.unlink()
    path.mkdir()
    entries = {entry.volume.volume_id: entry for entry in driver.client.ListVolumes().entries}
    assert set(entries) == {bad.volume_id, good.volume_id}
    assert entries[bad.volume_id].status.volume_condition.abnormal
    assert not entries[good.volume_id].status.volume_condition.abnormal
    assert "cannot be looked at" in entries[bad.volume_id].status.volume_condition.message
    (unwell,) = driver.client.ControllerListVolumeHealth().entries
    assert unwell.volume_id == bad.volume_id
    assert good.volume_id in driver.cli("volumes", "--json").stdout
    assert bad.volume_id in driver.cli("doctor", "--json", check=False).stdout
    path.rmdir()
    driver.delete(bad)
    driver.delete(good)


def test_an_export_that_cannot_be_mounted_stops_no_list(driver):
    """As a release that remembered exports before anything worked has left it."""
    volume = driver.create("local")
    known = [{"server": "127.0.0.3", "path": "/gone", "version": "4.1", "options": []}]
    (driver.state / "exports.json").write_text(json.dumps(known))
    assert listed(driver) == {volume.volume_id}
    assert list(driver.client.ListSnapshots().entries) == []
    assert driver.client.Probe().ready.value
    shown = driver.cli("volumes")
    assert volume.volume_id in shown.stdout
    assert "127.0.0.3:/gone" in shown.stderr
    assert "127.0.0.3:/gone" in driver.cli("doctor", "--json", check=False).stdout
    with refused("UNAVAILABLE", "no export known for this id", "exports.json"):
        driver.client.DeleteVolume(volume_id="nfs-0123456789ab-0123456789abcdef0123")
    with refused("UNAVAILABLE", "no export known for this id"):
        driver.client.DeleteSnapshot(snapshot_id="nfssnap-0123456789ab-0123456789abcdef0123")
    driver.client.DeleteVolume(volume_id="nfs-of-somebody")
    driver.delete(volume)


def test_a_failed_creation_leaves_no_export_behind(driver):
    with pytest.raises(Exception, match="127.0.0.3"):
        driver.create("no", capability=mount_capability("MULTI_NODE_MULTI_WRITER"), backend="nfs", server="127.0.0.3",
                      path="/x")  # fmt: skip
    assert not (driver.state / "exports.json").exists()


def test_a_volume_that_cannot_be_recovered_stops_no_start(driver):
    """The disk has become too small for the growth of one; another was being deleted, and holds what cannot be removed."""
    grown, other = driver.create("grown", preallocate="true"), driver.create("other")
    kept = driver.create("kept", **FREE)
    file = driver.state / "directories" / kept.volume_id / "f"
    file.touch()
    driver.stop()
    with sqlite3.connect(driver.state / "volumes.db") as store:
        store.execute("UPDATE volumes SET capacity = ? WHERE id = ?", (1 << 50, grown.volume_id))
    with sqlite3.connect(driver.state / "directories.db") as store:
        store.execute("UPDATE volumes SET state = 'deleting' WHERE id = ?", (kept.volume_id,))
    subprocess.run(["chattr", "+i", file], check=True)
    try:
        driver.start()
        assert listed(driver) == {grown.volume_id, other.volume_id}
        planned = json.loads(driver.cli("gc", "--dry-run", "--json", check=False).stdout)["items"]
        done = json.loads(driver.cli("gc", "--json", check=False).stdout)["items"]
        assert [one["place"] for one in planned] == [kept.volume_id]
        assert sorted(one["place"] for one in done) == sorted([grown.volume_id, kept.volume_id])
        assert not any(one["done"] for one in done)
    finally:
        subprocess.run(["chattr", "-R", "-i", driver.state / "directories"], check=True)
    assert [one["done"] for one in json.loads(driver.cli("gc", "--json", check=False).stdout)["items"]] == [True, False]
    driver.delete(grown)
    driver.delete(other)


def test_a_pod_is_unpublished_although_the_state_directory_takes_no_writes(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256m", "none", disk], check=True)
    try:
        with Driver(environment={"RUNVOL_PATHS_STATE_DIR": f"{disk}/state"}) as driver:
            volume = driver.create("one", **FREE)
            driver.stage(volume)
            driver.publish(volume, PODS[0], runtime="runc")
            driver.kill()
            subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
            driver.start()
            driver.unpublish(volume, PODS[0])
            driver.unstage(volume)
            assert not driver.mounts()
            assert listed(driver) == {volume.volume_id}
            with refused("UNAVAILABLE", "directories"):
                driver.delete(volume)
            driver.stop()
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_gc_says_the_same_of_a_file_that_nobody_knows_before_and_after(driver):
    stranger = driver.state / "volumes/mine.new"
    stranger.write_text("hello")
    (planned,) = json.loads(driver.cli("gc", "--dry-run", "--json", check=False).stdout)["items"]
    (done,) = json.loads(driver.cli("gc", "--json", check=False).stdout)["items"]
    assert planned == done
    assert planned["place"] == str(stranger)
    driver.stop()
    driver.start()
    assert stranger.read_text() == "hello"
    stranger.unlink()


def test_a_deep_volume_of_a_pod_stops_neither_its_deletion_nor_a_start(driver):
    deep = driver.create("deep", **FREE)
    nest = "import os, sys\nos.chdir(sys.argv[1])\nfor _ in range(1500): os.mkdir('a'); os.chdir('a')"
    subprocess.run([sys.executable, "-c", nest, driver.state / "directories" / deep.volume_id], check=True)
    driver.kill()
    with sqlite3.connect(driver.state / "directories.db") as store:
        store.execute("UPDATE volumes SET state = 'deleting' WHERE id = ?", (deep.volume_id,))
    driver.start()
    assert os.listdir(driver.state / "directories") == []
    assert listed(driver) == set()


def test_pods_end_where_the_state_directory_is_full_and_a_claim_is_as_it_was(tmp_path):
    """Many pods of one volume: its record grows beyond a block, for which there is no room."""
    state = tmp_path / "state"
    state.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", state], check=True)
    try:
        with Driver(environment={"RUNVOL_PATHS_STATE_DIR": f"{state}/s"}) as driver:
            driver.state = state / "s"
            volume = driver.create("one", 32 << 20)
            driver.stage(volume)
            claim = driver.records / "claims" / f"{volume.volume_id}.json"
            pods = [f"11111111-2222-3333-4444-5555555555{number:02}" for number in range(30)]
            count = 0
            while len(claim.read_bytes().rstrip()) < 3700:
                driver.publish(volume, pods[count], runtime="runc")
                count += 1
            with open(state / "journal", "wb", buffering=0) as file, contextlib.suppress(OSError):
                while file.write(b"x" * 4096):
                    pass
            before = json.loads(claim.read_bytes())
            with refused("RESOURCE_EXHAUSTED", "No space left"):
                for pod in pods[count:]:
                    driver.publish(volume, pod, runtime="runc")
                    before = json.loads(claim.read_bytes())
            assert json.loads(claim.read_bytes()) == before and claim.stat().st_size == 4096
            assert os.listdir(driver.records / "tmp") == []
            for pod in pods:
                driver.unpublish(volume, pod)
            assert not [one for one in driver.mounts() if "/pods/" in one]
            driver.unstage(volume)
            (state / "journal").unlink()
            driver.delete(volume)
            driver._end(signal.SIGTERM)
    finally:
        subprocess.run(["umount", "-l", state], check=True)


def test_pods_end_where_the_state_directory_takes_no_writes(tmp_path):
    """A disk with an error is read only until somebody looks after it; nodes are drained then, and pods deleted."""
    state = tmp_path / "state"
    state.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", state], check=True)
    try:
        with Driver(environment={"RUNVOL_PATHS_STATE_DIR": str(state)}) as driver:
            driver.state = state
            volume = driver.create("one", 32 << 20)
            driver.stage(volume)
            target = driver.publish(volume, PODS[0], runtime="runc")
            driver.stop()
            subprocess.run(["mount", "-o", "remount,ro", state], check=False)
            driver.start()
            driver.unpublish(volume, PODS[0])
            driver.unpublish(volume, PODS[0])
            assert not os.path.exists(target)
            subprocess.run(["mount", "-o", "remount,rw", state], check=True)
            driver.publish(volume, PODS[0], runtime="kata")
            driver.unpublish(volume, PODS[0])
            driver.unstage(volume)
            driver.delete(volume)
            driver._end(signal.SIGTERM)
    finally:
        subprocess.run(["umount", "-l", state], check=True)


def test_a_static_volume_under_one_handle_is_one_export(driver):
    """What is mounted is compared in the kernel tier; here the claims, of a node that mounts nothing."""

    class Static:
        volume_id = "static-1"
        volume_context = {"backend": "nfs", "server": "127.0.0.3", "path": "/a", "subDir": "app"}  # noqa: RUF012

    use = mount_capability("MULTI_NODE_MULTI_WRITER")
    driver.stage(Static, use)
    claim = Path(driver.records / "claims/static-1.json")
    assert json.loads(claim.read_bytes())["nfs"]["path"] == "/a/app"
    Static.volume_context = {"backend": "nfs", "server": "127.0.0.3", "path": "/b"}
    with refused("ALREADY_EXISTS", "127.0.0.3:/a/app", "127.0.0.3:/b"):
        driver.publish(Static, PODS[0], runtime="runc", capability=use)
    driver.stage(Static, use)
    assert json.loads(claim.read_bytes())["nfs"]["path"] == "/b", "nobody had the first"
    Static.volume_context["archiveOnDelete"] = "false"
    driver.stage(Static, use)  # what was staged without the rule goes on
    driver.unstage(Static)
    driver.stage(Static, use)  # as it always was; what it does not heed, it says
    assert "a volume attribute is passed over" in driver.log.read_text() and "archiveOnDelete" in driver.log.read_text()
    driver.unstage(Static)
