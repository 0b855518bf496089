"""The command line as a person types it."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from runvol import schemas
from tests.csi.helpers import PODS
from tests.driver import Driver, mount_capability

pytestmark = pytest.mark.kernel
A = PODS[0]


def rows(done):
    """The items, each of which the schema allows."""
    document = json.loads(done.stdout)
    schemas.read(document)
    return document["items"]


def test_volumes_are_a_table_and_json(driver):
    assert "no volumes" in driver.cli("volumes").stdout
    volume = driver.create("pvc-1")
    driver.stage(volume)
    driver.publish(volume, A, runtime="kata", name="web-0")
    table = driver.cli("volumes").stdout
    assert volume.volume_id[:20] in table and "pvc-1" in table and "64.0 MiB" in table
    (row,) = rows(driver.cli("volumes", "--json"))
    assert (row["capacityBytes"], row["state"], row["source"]) == (64 << 20, "owned", None)
    assert row["owner"] | {"podUid": A} == {
        "kernel": "sandbox", "podNamespace": "default", "podName": "web-0", "podUid": A, "handler": "kata",
    }  # fmt: skip
    assert [(one["podName"], one["readOnly"]) for one in row["targets"]] == [("web-0", False)]
    driver.unpublish(volume, A)


def test_static_volumes_are_made_adopted_and_deleted(driver):
    (made,) = rows(driver.cli("volumes", "create", "static", "--size", str(64 << 20), "-p", "runtime=runc", "--json"))
    assert made["parameters"] == {"runtime": "runc"}
    image = driver.directory / "old.img"
    image.write_bytes(b"old" + bytes((8 << 20) - 3))
    (adopted,) = rows(driver.cli("volumes", "adopt", str(image), "--name", "old", "--json"))
    assert not image.exists() and adopted["capacityBytes"] == 8 << 20
    for row in (made, adopted):
        assert "deleted" in driver.cli("volumes", "delete", row["volume"], "--yes").stdout
    refused = driver.cli("volumes", "delete", made["volume"], "--yes", check=False)
    assert refused.returncode == 1 and "does not exist" in refused.stderr and "Traceback" not in refused.stderr


def test_a_volume_in_use_is_not_deleted(driver):
    volume = driver.create("pvc-1")
    driver.stage(volume)
    target = driver.publish(volume, A, runtime="kata")
    refused = driver.cli("volumes", "delete", volume.volume_id, "--yes", check=False)
    assert refused.returncode == 1 and target in refused.stderr
    driver.unpublish(volume, A)


def test_hand_offs_and_where_tell_what_a_pod_has(driver):
    assert "no hand-offs" in driver.cli("handoffs").stdout
    volume = driver.create("pvc-1")
    driver.stage(volume)
    target = driver.publish(volume, A, runtime="kata", name="web-0")
    (row,) = rows(driver.cli("handoffs", "--json"))
    assert (row["volume"], row["podName"], row["podUid"], row["dialect"], row["target"], row["problem"]) == (
        volume.volume_id, "web-0", A, "kata", target, None,
    )  # fmt: skip
    for name in ("default/web-0", A):
        (row,) = rows(driver.cli("where", name, "--json"))
        assert (row["kernel"], row["handler"], row["volume"]) == ("sandbox", "kata", volume.volume_id)
    assert driver.cli("where", "default/other", check=False).returncode == 1
    driver.unpublish(volume, A)


def test_gc_says_first_and_takes_back_what_nobody_needs(driver):
    volume = driver.create("pvc-1")
    driver.stage(volume)
    # At a target that is no pod's of kubelet's: what a pod's directory still holds is kubelet's to unpublish.
    target = driver.kubelet / "elsewhere" / "mount"
    target.parent.mkdir()
    driver.client.NodePublishVolume(
        volume_id=volume.volume_id, staging_target_path=driver.staging(volume.volume_id), target_path=str(target),
        volume_capability=mount_capability(), volume_context={"runtime": "kata"},
    )  # fmt: skip
    for name in os.listdir(driver.records / "claims"):
        os.unlink(driver.records / "claims" / name)
    told = driver.cli("gc", "--dry-run", "--json", check=False)
    planned = rows(told)
    assert (
        told.returncode == 1
        and {row["what"] for row in planned} == {"hand-off", "placeholder"}
        and not any(row["done"] for row in planned)
    )
    assert len(driver.mounts()) == 1
    done = rows(driver.cli("gc", "--json"))
    assert [row | {"done": False} for row in done] == planned and all(row["done"] for row in done)
    assert driver.mounts() == [] and "nothing is left over" in driver.cli("gc").stdout


def test_gc_leaves_alone_what_is_in_use_and_what_is_somebody_elses(driver):
    volume = driver.create("pvc-1")
    driver.stage(volume)
    driver.publish(volume, A, runtime="kata")
    foreign = driver.direct_volumes / "L290aGVy"
    foreign.mkdir()
    (foreign / "mountInfo.json").write_text('{"volume-type":"blk","device":"/other/disk.img","fstype":"ext4"}')
    before = driver.left_over()
    assert rows(driver.cli("gc", "--json")) == []
    assert driver.left_over() == before
    driver.unpublish(volume, A)


def test_doctor_names_what_is_broken_and_what_to_change(driver):
    driver.kubelet.mkdir(exist_ok=True)
    well = driver.cli("doctor", "--json", check=False)
    subjects = {row["subject"]: row for row in rows(well)}
    assert subjects["loop devices"]["state"] == "ok" and well.returncode in (0, 3)
    (driver.directory / "containerd.toml").write_text(
        '[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.kata]\nruntime_type = "io.containerd.kata.v2"\n'
    )
    config = driver.directory / "kata" / "etc/kata-containers/configuration.toml"
    config.parent.mkdir(parents=True)
    config.write_text("[hypervisor.qemu]\ndisable_block_device_use = true\n")
    ill = driver.cli("doctor", "--json", check=False)
    finding = next(row for row in rows(ill) if row["id"] == "kata.block-devices-disabled")
    assert ill.returncode == 1 and finding["state"] == "broken" and "disable_block_device_use" in finding["finding"]
    config.write_text('[hypervisor.qemu]\nshared_fs = "virtio-9p"\n')
    findings = {row["id"]: row for row in rows(driver.cli("doctor", "--json", check=False))}
    assert findings["kata.handler"]["fix"] is None and "shared_fs" in findings["kata.no-shared-directories"]["fix"]
    assert "quota" in subjects["backend directory"]["finding"] and "NFS client" in subjects["backend nfs"]["finding"]


def test_doctor_of_a_central_controller_says_nothing_of_nodes(driver):
    driver.environment["RUNVOL_CSI_SERVICES"] = "identity,controller"
    said = driver.cli("doctor", "--json", check=False)
    subjects = {row["subject"] for row in rows(said)}
    assert {"mkfs.ext4", "CAP_SYS_ADMIN", "volumes"} <= subjects
    nodes = (
        "loop devices",
        "mounts",
        "containerd",
        "handler",
        "running containerd",
        str(driver.kubelet),
        "registration",
    )
    assert not [one for one in subjects if one.startswith(nodes)]


def test_doctor_tells_whether_guests_can_mount_nfs(driver):
    (driver.directory / "containerd.toml").write_text(
        '[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.kata]\nruntime_type = "io.containerd.kata.v2"\n'
    )
    root = driver.directory / "kata"
    share = root / "opt/kata/share/kata-containers"
    for place in (root / "etc/kata-containers", share):
        place.mkdir(parents=True)
    kernel = "/opt/kata/share/kata-containers/vmlinux.container"
    (root / "etc/kata-containers/configuration.toml").write_text(f'[hypervisor.qemu]\nkernel = "{kernel}"\n')
    (share / "vmlinux-6.12.47").write_bytes(b"ELF")
    (share / "vmlinux.container").symlink_to("vmlinux-6.12.47")
    told = {}
    for config in ("", "CONFIG_NFS_FS=y\nCONFIG_NFS_V4=y\n", "# CONFIG_NFS_FS is not set\n"):
        if config:
            (share / "config-6.12.47").write_text(config)
        found = [row for row in rows(driver.cli("doctor", "--json", check=False)) if "NFS" in row["finding"]]
        told[config] = next(row for row in found if row["subject"] == "handler kata")
    assert [row["state"] for row in told.values()] == ["warning", "ok", "warning"]
    unknown, can, cannot = (f"{row['finding']}; {row['fix']}" for row in told.values())
    assert "not known" in unknown
    assert "can mount NFS 4.0 (" in can
    assert "CONFIG_NFS_FS" in cannot
    assert "inSandbox: share" in cannot


def test_config_shows_every_setting_and_its_source(driver, tmp_path):
    file = tmp_path / "runvol.toml"
    file.write_text('[log]\nlevel = "debug"\n')
    shown = {row["key"]: row for row in rows(driver.cli("--config", str(file), "config", "--json"))}
    assert (shown["log.level"]["source"], shown["log.level"]["saidBy"]) == ("file", str(file))
    assert shown["node.id"]["saidBy"] == "RUNVOL_NODE_ID" and shown["csi.endpoint"]["saidBy"] == "paths.run_dir"
    shown = {
        row["key"]: row for row in rows(driver.cli("--config", str(file), "--log-level", "error", "config", "--json"))
    }
    level = shown["log.level"]
    assert (level["value"], level["source"], level["saidBy"]) == ("error", "flag", "--log-level")


def test_a_wrong_setting_is_a_sentence_and_a_status(driver, tmp_path):
    file = tmp_path / "runvol.toml"
    for text, words in (("[log]\ncolour = 1\n", "'log.colour' is not known"), ("[log]\nlevel = 3\n", "must be a text"), ("x = 1\n", "outside of a section"),
                        ("[log]\nformat = 'xml'\n", "log.format"), ("[[", "no TOML"), ("[loop]\ncapacity_bytes = -1\n", "must lie between 0 and")):  # fmt: skip
        file.write_text(text)
        refused = driver.cli("--config", str(file), "config", check=False)
        assert refused.returncode == 2 and words in refused.stderr and "Traceback" not in refused.stderr, refused.stderr
    assert "does not exist" in driver.cli("--config", "/nowhere.toml", "config", check=False).stderr


def test_the_servers_flags_are_checked(tmp_path):
    environment = {
        **os.environ,
        "RUNVOL_PATHS_STATE_DIR": str(tmp_path / "s"),
        "RUNVOL_PATHS_RUN_DIR": str(tmp_path / "r"),
    }
    for flags, words in ((["--endpoint", "tcp://x"], "must be unix"), (["--endpoint", f"unix://{tmp_path}/x"], ".sock"),
                         (["--services", "node,banana", "--endpoint", f"unix://{tmp_path}/a.sock"], "banana"), (["--node-id", "-x-"], "node.id")):  # fmt: skip
        done = subprocess.run([sys.executable, "-m", "runvol", "csi", *flags], env=environment, capture_output=True, text=True, timeout=30,
                              check=False, cwd=Path(__file__).resolve().parents[2])  # fmt: skip
        assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_bench_measures_the_running_driver_and_leaves_nothing(driver):
    figures = {
        row["call"]: row
        for row in rows(
            driver.cli("bench", "publish", "--endpoint", f"unix://{driver.socket}", "--samples", "5", "--json")
        )
    }
    assert figures["NodePublishVolume"]["p50Ms"] > 0 and figures["NodePublishVolume"]["samples"] == 5
    assert not any(driver.left_over().values()) and not list(driver.kubelet.glob("runvol-bench-*"))
    refused = driver.cli("bench", "publish", "--endpoint", "unix:///nowhere/x.sock", check=False)
    assert refused.returncode == 3 and "nobody answers at /nowhere/x.sock" in refused.stderr


def test_volume_snapshots_have_a_listing_with_bytes(driver):
    assert "no volume snapshots" in driver.cli("volumes", "snapshots").stdout
    volume, other = driver.create("pvc-1"), driver.create("pvc-2")
    taken = driver.client.CreateSnapshot(source_volume_id=volume.volume_id, name="one").snapshot
    (row,) = rows(driver.cli("volumes", "snapshots", "--json"))
    assert (row["snapshot"], row["volume"], row["sizeBytes"]) == (taken.snapshot_id, volume.volume_id, 64 << 20)
    assert row["ready"] and row["group"] is None and row["created"].endswith("Z")
    table = driver.cli("volumes", "snapshots", "--volume", volume.volume_id).stdout
    assert taken.snapshot_id in table and "64.0 MiB" in table
    assert rows(driver.cli("volumes", "snapshots", "--volume", other.volume_id, "--json")) == []
    assert "does not exist" in driver.cli("snapshots", check=False).stderr
    driver.client.DeleteSnapshot(snapshot_id=taken.snapshot_id)


def test_whatever_is_done_is_told_as_json(driver, tmp_path):
    """What `runvol` prints for programs, for each command that takes no pool and no share."""
    (made,) = rows(driver.cli("volumes", "create", "static", "--size", "64Mi", "--json"))
    for words, action in (
        (("volumes", "delete", made["volume"], "--yes"), "deleted"),
        (("volumes", "forget", made["volume"][:-4] + "0000", "--yes"), "forgotten"),
        (("flexvolume", "install", "--plugin-dir", tmp_path, "--log", tmp_path / "log"), "installed"),
        (("flexvolume", "uninstall", "--plugin-dir", tmp_path), "removed"),
        (("images", "keygen", tmp_path / "key"), "made"),
    ):
        (told,) = rows(driver.cli(*map(str, words), "--json"))
        assert (told["action"], told["done"]) == (action, True) and told["message"]
    (found,) = rows(driver.cli("detect", "default/web", "--runtime", "kata", "--json"))
    assert (found["kernel"], found["handler"], found["podName"]) == ("sandbox", "kata", "web")
    volumes = tmp_path / "pv.yaml"
    volumes.write_text(
        "kind: PersistentVolume\nmetadata: {name: a}\nspec: {flexVolume: {driver: runvol/runvol, options: {volume: "
        "loop-1}}, capacity: {storage: 1Gi}}\n"
    )
    migrated = driver.cli("migrate", "flexvolume", str(volumes), "--json", check=False)
    (item,) = rows(migrated)
    assert (item["persistentVolume"], item["becomes"]) == ("a", None) and item["whyNot"] and migrated.returncode == 1
    shared = tmp_path / "images"
    shared.mkdir()
    driver.environment["RUNVOL_SNAPSHOTTER_IMAGES"] = str(shared)
    for words, empty in (
        (("images",), "no images"),
        (("images", "check"), "no images"),
        (("volumes", "work"), "nothing"),
    ):
        assert rows(driver.cli(*words, "--json")) == [] and empty in driver.cli(*words).stdout
    assert {row["key"] for row in rows(driver.cli("parameters", "--json"))} >= {"backend", "runtime"}


def test_what_is_read_in_a_pipe_is_whole(driver):
    volume = driver.create("a-name-that-is-long-" + "n" * 60)
    driver.stage(volume)
    driver.publish(volume, A, runtime="kata", name="web-0")
    for words in (("volumes",), ("handoffs",), ("where", "default/web-0"), ("config",), ("parameters",), ("gc",)):
        text = driver.cli(*words, check=False).stdout
        assert not [line for line in text.splitlines() if line != line.rstrip()], words
    for words in (("config",), ("parameters",)):
        long = [line for line in driver.cli(*words).stdout.splitlines() if len(line) > 80]
        assert not [line for line in long if " = " not in line or str(driver.directory) not in line], long
    head, line = driver.cli("volumes").stdout.splitlines()
    assert head.split() == ["VOLUME", "NAME", "SIZE", "USED", "STATE", "OWNER", "TARGETS"]
    assert volume.volume_id in line.split() and line.split()[1] == "a-name-that-is-long-" + "n" * 60
    driver.unpublish(volume, A)


def test_a_terminal_gets_key_and_value_where_a_table_does_not_fit(driver):
    volume = driver.create("pvc-1")
    program = ("import os, pty, sys; os.environ['COLUMNS'] = '80'; "
               "pty.spawn([sys.executable, '-m', 'runvol', 'volumes'])")  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **driver.environment}, capture_output=True, text=True,
        check=True, stdin=subprocess.DEVNULL, cwd=Path(__file__).resolve().parents[2],
    )  # fmt: skip
    lines = [line.rstrip("\r") for line in done.stdout.splitlines()]
    assert f"volume = {volume.volume_id}" in lines and "name = pvc-1" in lines and "state = idle" in lines, lines


def test_gc_names_a_file_of_nobody_and_never_removes_it(driver):
    driver.delete(driver.create("pvc-1"))
    file = driver.state / "volumes" / "mine.new"
    file.write_text("hello")
    told = []
    for words in (("gc", "--dry-run", "--json"), ("gc", "--json")):
        done = driver.cli(*words, check=False)
        told.append(rows(done))
        assert done.returncode == 1 and file.read_text() == "hello"
    assert told[0] == told[1] == [
        {"what": "file", "place": str(file), "done": False, "byHand": True,
         "why": "no volume has it; `runvol volumes adopt` takes it, `rm` removes it"}
    ]  # fmt: skip


def test_gc_plans_what_it_does_to_a_volume_that_was_being_deleted(driver):
    volume = driver.create("pvc-1")
    driver.stop()
    with sqlite3.connect(driver.state / "volumes.db") as store:
        store.execute("UPDATE volumes SET state = 'deleting' WHERE id = ?", (volume.volume_id,))
    (planned,) = rows(driver.cli("gc", "--dry-run", "--json", check=False))
    (done,) = rows(driver.cli("gc", "--json"))
    assert planned | {"done": True} == done and done["place"] == volume.volume_id
    assert not (driver.state / "volumes" / f"{volume.volume_id}.img").exists()


def test_parameters_and_help_are_there():
    with Driver() as driver:
        assert "preallocate" in driver.cli("parameters").stdout
        assert "Storage for pods" in driver.cli("--help").stdout
        assert driver.cli("detect", "default/web", "--attribute", "kata").stdout.startswith("sandbox (handler kata)")
