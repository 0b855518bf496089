"""What goes wrong with one volume, or one export, stops no list, no start and nothing of another's; and it is named."""

from __future__ import annotations

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
        planned = json.loads(driver.cli("gc", "--dry-run", "--json").stdout)
        done = json.loads(driver.cli("gc", "--json").stdout)
        assert [one["place"] for one in planned] == [kept.volume_id]
        assert sorted(one["place"] for one in done) == sorted([grown.volume_id, kept.volume_id])
        assert not any(one["done"] for one in done)
    finally:
        subprocess.run(["chattr", "-R", "-i", driver.state / "directories"], check=True)
    assert [one["done"] for one in json.loads(driver.cli("gc", "--json").stdout)] == [True, False]
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
    (planned,) = json.loads(driver.cli("gc", "--dry-run", "--json").stdout)
    (done,) = json.loads(driver.cli("gc", "--json").stdout)
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


def test_a_claim_is_as_it_was_where_the_run_directory_is_full(tmp_path):
    """Fourteen pods of one volume: its record has more than a page."""
    run = tmp_path / "run"
    run.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", run], check=True)
    try:
        with Driver(environment={"RUNVOL_PATHS_RUN_DIR": f"{run}/r"}) as driver:
            driver.run = run / "r"
            volume = driver.create("one", **FREE)
            driver.stage(volume)
            claim = run / "r/claims" / f"{volume.volume_id}.json"
            pods = [f"11111111-2222-3333-4444-5555555555{number:02}" for number in range(30)]
            count = 0
            while claim.stat().st_size < 3900:
                driver.publish(volume, pods[count], runtime="runc")
                count += 1
            free = os.statvfs(run).f_bavail
            (run / "journal").write_bytes(b"x" * 4096 * (free - 1))
            before = claim.read_bytes()
            with pytest.raises(Exception, match="No space left"):
                driver.publish(volume, pods[count], runtime="runc")
            assert claim.read_bytes() == before
            assert os.listdir(run / "r/tmp") == []
            (run / "journal").unlink()
            driver.publish(volume, pods[count], runtime="runc")
            for pod in pods[: count + 1]:
                driver.unpublish(volume, pod)
            driver.unstage(volume)
            driver.delete(volume)
            driver._end(signal.SIGTERM)
    finally:
        subprocess.run(["umount", "-l", run], check=True)


def test_a_static_volume_under_one_handle_is_one_export(driver):
    """What is mounted is compared in the kernel tier; here the claims, of a node that mounts nothing."""

    class Static:
        volume_id = "static-1"
        volume_context = {"backend": "nfs", "server": "127.0.0.3", "path": "/a", "subDir": "app"}  # noqa: RUF012

    use = mount_capability("MULTI_NODE_MULTI_WRITER")
    driver.stage(Static, use)
    claim = Path(driver.run / "claims/static-1.json")
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
