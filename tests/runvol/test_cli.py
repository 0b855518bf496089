"""The command line as a person types it."""

from __future__ import annotations

import json
import os
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
    assert subjects["loop devices"]["state"] == "ok" and well.returncode == 0
    (driver.directory / "containerd.toml").write_text(
        '[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.kata]\nruntime_type = "io.containerd.kata.v2"\n'
    )
    config = driver.directory / "kata" / "etc/kata-containers/configuration.toml"
    config.parent.mkdir(parents=True)
    config.write_text("[hypervisor.qemu]\ndisable_block_device_use = true\n")
    ill = driver.cli("doctor", "--json", check=False)
    finding = next(row for row in rows(ill) if row["subject"] == "handler kata")
    assert ill.returncode == 1 and finding["state"] == "broken" and "disable_block_device_use" in finding["finding"]
    config.write_text('[hypervisor.qemu]\nshared_fs = "virtio-9p"\n')
    findings = [row for row in rows(driver.cli("doctor", "--json", check=False)) if row["subject"] == "handler kata"]
    assert [row["state"] for row in findings] == ["ok", "warning"] and "shared_fs" in findings[1]["finding"]
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
    unknown, can, cannot = (row["finding"] for row in told.values())
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
                        ("[log]\nformat = 'xml'\n", "log.format"), ("[[", "no TOML"), ("[loop]\ncapacity_bytes = -1\n", "negative")):  # fmt: skip
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
    assert refused.returncode == 3 and "UNAVAILABLE" in refused.stderr and "Traceback" not in refused.stderr


def test_parameters_and_help_are_there():
    with Driver() as driver:
        assert "preallocate" in driver.cli("parameters").stdout
        assert "Storage for pods" in driver.cli("--help").stdout
        assert driver.cli("detect", "default/web", "--attribute", "kata").stdout.startswith("sandbox (handler kata)")
