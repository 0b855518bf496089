"""What a Kata shim makes of block devices, from the configuration that it will really read."""

from __future__ import annotations

from dataclasses import replace

import pytest

from guestmount import PodRef, Refused, Runtime, kata_config, preflight
from guestmount.kata_config import GO, RUST
from guestmount.pods import PodUnknown, facts_from, with_own
from guestmount import containerd_readings
from guestmount.runtimes import Handler

OFF = "[hypervisor.qemu]\ndisable_block_device_use = true\nenable_annotations = ['disable_block_device_use', 'enable_.*']\n"
ON = "[hypervisor.qemu]\ndisable_block_device_use = false\nshared_fs = 'none'\n"
GO_PATH, RUST_PATH = "/opt/kata/bin/containerd-shim-kata-v2", "/opt/kata/runtime-rs/bin/containerd-shim-kata-v2"


@pytest.fixture
def node(tmp_path):
    def write(path, text):
        file = tmp_path / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def read(**handler):
        handler.setdefault("pod_annotations", ("io.katacontainers.*",))
        return kata_config.read(
            Handler(name="kata", runtime_type="io.containerd.kata.v2", **handler), root=str(tmp_path)
        )

    write.read = read
    return write


def test_nothing_found_is_nothing_known(node):
    assert node.read() is None
    node("/etc/kata-containers/configuration.toml", "this is = not [ toml")
    assert node.read() is None


def test_each_shim_reads_its_own_file(node):
    node("/etc/kata-containers/configuration.toml", OFF)
    node("/opt/kata/share/defaults/kata-containers/runtime-rs/configuration.toml", ON)
    assert node.read(runtime_path=GO_PATH).disable_block_device_use
    found = node.read(runtime_path=RUST_PATH)
    assert (found.shim, found.disable_block_device_use, found.shared_fs) == (RUST, False, "none")


def test_containerds_config_path_comes_first(node):
    node("/etc/kata-containers/configuration.toml", ON)
    node("/opt/kata/special.toml", OFF)
    assert node.read(runtime_path=GO_PATH, config_path="/opt/kata/special.toml").disable_block_device_use


def test_drop_ins_win_in_alphabetical_order(node):
    node("/etc/kata-containers/configuration.toml", OFF)
    node("/etc/kata-containers/config.d/20-b.toml", "[hypervisor.qemu]\ndisable_block_device_use = false\n")
    node("/etc/kata-containers/config.d/10-a.toml", "[hypervisor.qemu]\ndisable_block_device_use = true\n")
    found = node.read(runtime_path=GO_PATH)
    assert not found.disable_block_device_use and found.settings["enable_annotations"]


def test_a_rust_configuration_is_known_by_its_runtime_name(node):
    node("/etc/kata-containers/configuration.toml", ON + "[runtime]\nname = 'virt_container'\n")
    assert node.read().shim == RUST
    node("/etc/kata-containers/configuration.toml", ON)
    assert node.read().shim == GO


def test_go_with_firecracker_always_uses_block_devices(node):
    node("/etc/kata-containers/configuration.toml", "[hypervisor.firecracker]\ndisable_block_device_use = true\n")
    assert not node.read(runtime_path=GO_PATH).blocks_disabled({})


KEY = "io.katacontainers.config.hypervisor.disable_block_device_use"


def test_a_pods_annotation_counts_only_if_it_is_enabled(node):
    node("/etc/kata-containers/configuration.toml", OFF)
    found = node.read(runtime_path=GO_PATH)
    assert found.blocks_disabled({}) and not found.blocks_disabled({KEY: "false"})
    node("/etc/kata-containers/configuration.toml", ON)
    assert not node.read(runtime_path=GO_PATH).blocks_disabled({KEY: "true"})


def test_every_file_beside_the_real_configuration_is_a_drop_in(node, tmp_path):
    """Both shims resolve a link first, and read whatever is not hidden, whatever it is called."""
    node("/opt/real/main.toml", OFF)
    node("/opt/real/config.d/20-on", "[hypervisor.qemu]\ndisable_block_device_use = false\n")
    node("/opt/real/config.d/.30-hidden", "[hypervisor.qemu]\ndisable_block_device_use = true\n")
    node("/etc/kata-containers/config.d/40.toml", "[hypervisor.qemu]\nshared_fs = 'none'\n")
    (tmp_path / "etc/kata-containers/configuration.toml").symlink_to("/opt/real/main.toml")
    found = node.read(runtime_path=GO_PATH)
    assert not found.blocks_disabled({})
    assert found.shared_fs == "virtio-fs"
    assert found.path.endswith("/etc/kata-containers/configuration.toml"), "it is named as the operator knows it"
    node("/opt/real/config.d/50-off.conf", "[hypervisor.qemu]\ndisable_block_device_use = true\n")
    assert node.read(runtime_path=GO_PATH).blocks_disabled({})


@pytest.mark.parametrize("kind", ["link", "directory"])
def test_a_drop_in_that_stops_the_rust_shim(node, tmp_path, kind):
    node("/etc/kata-containers/runtime-rs/configuration.toml", ON)
    node("/etc/kata-containers/configuration.toml", ON)
    for place in ("etc/kata-containers", "etc/kata-containers/runtime-rs"):
        extra = tmp_path / place / "config.d/10-x.toml"
        extra.parent.mkdir()
        extra.mkdir() if kind == "directory" else extra.symlink_to("../configuration.toml")
    with pytest.raises(Refused, match="does not start with .*10-x.toml"):
        preflight.check(a_runtime(node.read(runtime_path=RUST_PATH)), pv_name="v")
    preflight.check(a_runtime(node.read(runtime_path=GO_PATH)), pv_name="v")


@pytest.mark.parametrize(
    ("patterns", "go", "rust"),
    [
        ("['block_device']", True, True),  # anywhere in the key
        ("['^block_device$']", False, False),
        ("['use$']", True, True),
        ("['(', 'disable_.*']", True, False),  # a wrong one
        ("[]", False, False),
    ],
)
def test_annotations_are_enabled_by_expressions_without_anchors(node, patterns, go, rust):
    text = f"[hypervisor.qemu]\ndisable_block_device_use = false\nenable_annotations = {patterns}\n"
    node("/etc/kata-containers/configuration.toml", text)
    node("/etc/kata-containers/runtime-rs/configuration.toml", text)
    assert node.read(runtime_path=GO_PATH).blocks_disabled({KEY: "true"}) is go
    assert node.read(runtime_path=RUST_PATH).blocks_disabled({KEY: "true"}) is rust


@pytest.mark.parametrize(
    ("passed", "counts"),
    [
        ((), False),
        (("io.katacontainers.*",), True),
        (("io.kubernetes.*",), False),
        ((KEY,), True),
        (("*",), True),
        (("io.katacontainers.config.hypervisor.enable_*", "com.example.*"), False),
        (("io.katacontainers.config.hypervisor.[^e]*",), True),
    ],
)
def test_an_annotation_reaches_the_shim_only_through_containerd(node, passed, counts):
    node("/etc/kata-containers/configuration.toml", "[hypervisor.qemu]\nenable_annotations = ['.*']\n")
    found = node.read(runtime_path=GO_PATH, pod_annotations=passed)
    assert found.blocks_disabled({KEY: "true"}) is counts


def test_containerds_table_tells_which_annotations_pass(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text("""[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.kata]
runtime_type = "io.containerd.kata.v2"
pod_annotations = ["io.katacontainers.*"]
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.other]
runtime_type = "io.containerd.kata.v2"
""")
    (newer,) = containerd_readings.read(str(path)).found
    handlers = newer.handlers
    assert handlers["kata"].pod_annotations == ("io.katacontainers.*",)
    assert handlers["other"].pod_annotations == ()


@pytest.mark.parametrize(
    ("shim", "settings", "words"),
    [
        (RUST, 'block_device_driver = "virtio-blk"', "'virtio-blk'.*Rust shim.*virtio-scsi or virtio-blk-pci"),
        (RUST, 'block_device_driver = "virtio-blk-mmio"', "virtio-blk-mmio"),
        (RUST, 'block_device_driver = "virtio-pmem"', "virtio-pmem"),
        (RUST, 'block_device_driver = "virtio-blk-pci"', ""),
        (RUST, 'block_device_driver = "virtio-scsi"', ""),
        (RUST, 'block_device_aio = "native"', "set block_device_cache_direct = true beside it"),
        (RUST, 'block_device_aio = "native"\nblock_device_cache_set = true', "block_device_cache_direct"),
        (RUST, 'block_device_aio = "native"\nblock_device_cache_direct = true', ""),
        (RUST, 'block_device_aio = "io_uring"', ""),
        (GO, 'block_device_driver = "virtio-blk"', ""),
        (GO, 'block_device_driver = "virtio-blk-pci"', "'virtio-blk-pci'.*Go shim.*virtio-scsi or virtio-blk in"),
        (GO, 'block_device_aio = "native"', "block_device_cache_set = true and block_device_cache_direct = true"),
        (GO, 'block_device_aio = "native"\nblock_device_cache_direct = true', "block_device_cache_set = true"),
        (GO, 'block_device_aio = "native"\nblock_device_cache_direct = true\nblock_device_cache_set = true', ""),
        (GO, "", ""),
        (RUST, "", ""),
    ],
)
def test_settings_with_which_the_shim_plugs_nothing_in(node, shim, settings, words):
    place = "runtime-rs/" if shim == RUST else ""
    node(f"/etc/kata-containers/{place}configuration.toml", f"[hypervisor.qemu]\n{settings}\n")
    runtime = a_runtime(node.read(runtime_path=RUST_PATH if shim == RUST else GO_PATH))
    for check in (lambda: preflight.check(runtime, pv_name="v"), lambda: preflight.check_raw(runtime)):
        if words:
            with pytest.raises(Refused, match=words):
                check()
        else:
            check()


def test_a_raw_device_needs_no_block_setting_of_the_go_shim(node):
    for place, path in (("", GO_PATH), ("runtime-rs/", RUST_PATH)):
        node(f"/etc/kata-containers/{place}configuration.toml", OFF)
        runtime = a_runtime(node.read(runtime_path=path))
        if path == GO_PATH:
            preflight.check_raw(runtime)
        else:
            with pytest.raises(Refused, match="its containers fail"):
                preflight.check_raw(runtime)


CACHE = "io.katacontainers.config.hypervisor.block_device_cache_set"


def test_who_sets_cache_options_of_the_go_shim_needs_a_node(node):
    node("/etc/kata-containers/configuration.toml", "[hypervisor.qemu]\nenable_annotations = ['cache']\n")
    found = node.read(runtime_path=GO_PATH)
    assert not found.wants_node({})
    assert found.wants_node({CACHE: "true"})
    node("/etc/kata-containers/config.d/10-fast", "[hypervisor.qemu]\nblock_device_cache_set = true\n")
    assert node.read(runtime_path=GO_PATH).wants_node({})
    assert not node.read(runtime_path=GO_PATH).wants_node({CACHE: "false"})
    node("/etc/kata-containers/runtime-rs/configuration.toml", "[hypervisor.qemu]\nblock_device_cache_set = true\n")
    assert not node.read(runtime_path=RUST_PATH).wants_node({})


# -- preflight


def a_runtime(config, pod=None):
    return Runtime(kind="sandbox", handler="kata", source="test", dialect="kata", kata=config, pod=pod)


def with_names(pod, *names):
    return replace(pod, own=frozenset(names) or None)


def a_pod(*mounts, annotations=None):
    return with_names(facts_from({
        "metadata": {"uid": "u", "annotations": annotations or {}},
        "spec": {
            "containers": [{"name": f"c{n}", "volumeMounts": [one]} for n, one in enumerate(mounts)],
            "volumes": [{"name": "data", "persistentVolumeClaim": {"claimName": "pvc"}}, {"name": "tmp", "emptyDir": {}}],
        },
    }), "data")  # fmt: skip


def test_a_shim_that_ignores_block_devices_is_refused_with_file_and_setting(node):
    node("/etc/kata-containers/configuration.toml", OFF)
    with pytest.raises(
        Refused,
        match=r"disable_block_device_use is true in .*/etc/kata-containers/configuration\.toml.*hypervisor\.qemu",
    ):
        preflight.check(a_runtime(node.read(runtime_path=GO_PATH)), pv_name="v")


def test_a_pod_that_switches_block_devices_off_for_itself_is_refused(node):
    node("/etc/kata-containers/configuration.toml", "[hypervisor.qemu]\nenable_annotations = ['disable_.*']\n")
    config = node.read(runtime_path=GO_PATH)
    preflight.check(a_runtime(config, a_pod()), pv_name="v")
    with pytest.raises(Refused, match="ignores block devices"):
        preflight.check(a_runtime(config, a_pod(annotations={KEY: "true"})), pv_name="v")


@pytest.mark.parametrize(
    ("mount", "words"),
    [({"name": "data", "subPath": "x"}, "'c0'.*subPath 'x'"), ({"name": "data", "subPathExpr": "$(A)"}, "subPath"),
     ({"name": "data", "mountPropagation": "Bidirectional"}, "mountPropagation Bidirectional")],
)  # fmt: skip
def test_what_cannot_work_in_a_guest_is_refused_with_the_container(mount, words):
    with pytest.raises(Refused, match=words):
        preflight.check(a_runtime(None, a_pod(mount)), pv_name="v")


def test_other_kinds_of_volumes_are_no_concern():
    preflight.check(
        a_runtime(None, a_pod({"name": "tmp", "subPath": "x", "mountPropagation": "Bidirectional"})), pv_name="v"
    )


def test_a_mount_below_dev_is_refused_for_the_rust_shim_alone(node):
    pod = a_pod({"name": "data", "mountPath": "/dev/data"})
    node("/etc/kata-containers/configuration.toml", ON)
    preflight.check(a_runtime(node.read(runtime_path=GO_PATH), pod), pv_name="v")
    node("/etc/kata-containers/runtime-rs/configuration.toml", ON)
    with pytest.raises(Refused, match="'c0'.*'/dev/data'"):
        preflight.check(a_runtime(node.read(runtime_path=RUST_PATH), pod), pv_name="v")


def test_mixed_read_only_and_read_write_is_refused_for_the_rust_shim_alone(node):
    mixed = a_pod({"name": "data"}, {"name": "data", "readOnly": True})
    node("/etc/kata-containers/configuration.toml", ON)
    preflight.check(a_runtime(node.read(runtime_path=GO_PATH), mixed), pv_name="v")
    node("/etc/kata-containers/runtime-rs/configuration.toml", ON)
    with pytest.raises(Refused, match="'c0' and 'c1'"):
        preflight.check(a_runtime(node.read(runtime_path=RUST_PATH), mixed), pv_name="v")
    both_read = a_pod({"name": "data", "readOnly": True}, {"name": "data", "readOnly": True})
    preflight.check(a_runtime(node.read(runtime_path=RUST_PATH), both_read), pv_name="v")


# -- several containers that write to one block volume, under the Rust shim


def rust(node, pod):
    node("/etc/kata-containers/runtime-rs/configuration.toml", ON)
    return a_runtime(node.read(runtime_path=RUST_PATH), pod)


def of(*, init=(), containers=(), volumes=None):
    """A pod of containers that are told as (name, mounts) or (name, mounts, restartPolicy)."""

    def spec(name, mounts, policy=""):
        return {"name": name, "volumeMounts": [{"name": mount.strip("-"), "readOnly": mount.startswith("-")}
                                              for mount in mounts]} | ({"restartPolicy": policy} if policy else {})  # fmt: skip

    claims = {"data": "pvc", "again": "pvc", "other": "pvc2"}
    pod = facts_from({
        "metadata": {"uid": "u", "name": "p"},
        "spec": {
            "initContainers": [spec(*one) for one in init], "containers": [spec(*one) for one in containers],
            "volumes": volumes or [{"name": name, "persistentVolumeClaim": {"claimName": claim}} for name, claim in claims.items()],
        },
    })  # fmt: skip
    return with_names(pod, *(name for name, claim in pod.claims.items() if claim == "pvc"))


ONE, TWO = ("one", ["data"]), ("two", ["data"])
SIDECAR = ("side", ["data"], "Always")


@pytest.mark.parametrize(
    ("pod", "names"),
    [
        (of(containers=[ONE, TWO]), ("'one' and 'two'", "volume 'data'", "claim 'pvc'")),
        (of(containers=[ONE, ("two", ["again"])]), ("volumes 'data' and 'again'", "claim 'pvc'")),
        (of(init=[SIDECAR], containers=[ONE]), ("'side' and 'one'",)),
        (of(init=[SIDECAR, TWO], containers=[("one", ["other"])]), ("'side' and 'two'",)),
        (of(init=[SIDECAR, ("late", ["data"], "Always")], containers=[("one", [])]), ("'side' and 'late'",)),
        (of(containers=[ONE, ("two", ["other"]), ("three", ["other", "data"])]), ("'one' and 'three'",)),
        (of(containers=[ONE, TWO], volumes=[{"name": "data", "ephemeral": {"volumeClaimTemplate": {}}}]), ("'p-data'",)),
        (of(containers=[ONE, TWO], volumes=[{"name": "data", "flexVolume": {"driver": "runvol/runvol"}}]),
         ("FlexVolume 'data'",)),
        (of(containers=[ONE, ("two", ["again"])], volumes=[
            {"name": name, "flexVolume": {"driver": "runvol/runvol", "options": {"volume": "loop-1"}}}
            for name in ("data", "again")]), ("FlexVolume 'loop-1'",)),
        (of(containers=[ONE, ("two", ["again"])], volumes=[
            {"name": name, "flexVolume": {"driver": "runvol/runvol", "options": {"device": "/img/x.img"}}}
            for name in ("data", "again")]), ("FlexVolume '/img/x.img'",)),
        (of(containers=[ONE, ("two", ["again"])], volumes=[
            {"name": name, "flexVolume": {"driver": "alicloud/disk", "options": {key: "d-1"}}}
            for name, key in (("data", "volumeId"), ("again", "volumeID"))]), ("FlexVolume 'd-1'",)),
        (of(containers=[ONE, ("two", ["again"])], volumes=[
            {"name": name, "flexVolume": {"driver": "acme/blocks", "options": {"device": device}}}
            for name, device in (("data", "/dev/stdin"), ("again", "/dev/fd/0"))]), ("FlexVolume",)),
    ],
)  # fmt: skip
def test_two_containers_that_write_to_one_block_volume_are_refused_under_the_rust_shim(node, pod, names):
    runtime = rust(node, pod)
    with pytest.raises(Refused) as caught:
        preflight.check(runtime, pv_name="v")
    for words in (*names, "handler 'kata'", "data is lost", "directory or nfs", 'kata.rust_shared_block = "allow"'):
        assert words in str(caught.value)
    preflight.check(runtime, pv_name="v", rust_shared_block=True)
    preflight.check(runtime, pv_name="v", read_only=True)
    preflight.check_mounts(runtime, pv_name="v")
    node("/etc/kata-containers/configuration.toml", ON)
    preflight.check(a_runtime(node.read(runtime_path=GO_PATH), pod), pv_name="v")


@pytest.mark.parametrize(
    "pod",
    [
        of(init=[TWO, ("three", ["data"])], containers=[ONE]),
        of(init=[TWO, ("side", ["data"], "Always")], containers=[("one", ["other"])]),
        of(containers=[("one", ["-data"]), ("two", ["-data"])]),
        of(containers=[("one", ["data"]), ("two", ["other"])]),
        of(containers=[("one", ["data", "again"])]),
        of(init=[("two", ["-data"])], containers=[ONE]),
        of(containers=[ONE, TWO], volumes=[{"name": "data", "emptyDir": {}}]),
        of(containers=[ONE, TWO],
           volumes=[{"name": "data", "persistentVolumeClaim": {"claimName": "pvc", "readOnly": True}}]),
    ],
)  # fmt: skip
def test_containers_that_never_write_at_the_same_time_are_no_two_writers(node, pod):
    preflight.check(rust(node, pod), pv_name="v")


@pytest.mark.parametrize(
    ("pod", "refused"),
    [
        (of(containers=[ONE, ("two", ["-again"])]), True),
        (of(init=[("side", ["-data"], "Always")], containers=[ONE]), True),
        (of(containers=[("one", ["data", "-again"])]), True),
        (of(init=[("two", ["-data"])], containers=[ONE]), False),
    ],
)
def test_mixing_is_told_by_claims_and_by_who_lives_at_the_same_time(node, pod, refused):
    runtime = rust(node, pod)
    if not refused:
        preflight.check(runtime, pv_name="v", rust_shared_block=True)
        return
    with pytest.raises(Refused, match="cannot mix them"):
        preflight.check(runtime, pv_name="v", rust_shared_block=True)


@pytest.mark.parametrize(
    "flex",
    [
        {"driver": "other/x", "options": {"volume": "v"}},
        {"driver": "runvol/runvol", "options": {"directory": "/data"}},
        {"driver": "runvol/runvol", "options": {"server": "s", "path": "/e"}},
        {"driver": "alicloud/nas", "options": {"server": "s", "path": "/e"}},
    ],
    ids=str,
)
def test_a_flexvolume_that_is_no_disk_of_ours_may_be_written_by_several(node, flex):
    volumes = [{"name": "data", "flexVolume": flex}, {"name": "again", "flexVolume": flex}]
    pod = of(containers=[ONE, ("two", ["data", "again"])], volumes=volumes)
    preflight.check(rust(node, pod), pv_name="v")


def test_what_the_rust_shim_does_with_disks_is_no_concern_of_nfs(node):
    """The guest mounts it once a container, and knows no device."""
    mixed = a_pod({"name": "data", "mountPath": "/dev/data"}, {"name": "data", "readOnly": True})
    preflight.check_mounts(rust(node, mixed), pv_name="v")


def test_what_begins_with_dev_is_a_device_for_the_rust_shim(node):
    with pytest.raises(Refused, match="'/devices'"):
        preflight.check(rust(node, a_pod({"name": "data", "mountPath": "/devices"})), pv_name="v")


class Volumes:
    """Who is asked for a PersistentVolume's claim."""

    def __init__(self, claim=None):
        self.claim = claim

    def claim_of(self, persistent_volume, deadline, *, anew=False):
        if self.claim is None:
            raise PodUnknown("403 Forbidden")
        return "default", self.claim


SUBPATH = facts_from({
    "metadata": {"uid": "u", "name": "p"},
    "spec": {
        "containers": [{"name": "c", "volumeMounts": [{"name": "ours"}, {"name": "theirs", "subPath": "x"}]}],
        "volumes": [{"name": "ours", "persistentVolumeClaim": {"claimName": "a"}},
                    {"name": "theirs", "persistentVolumeClaim": {"claimName": "b"}},
                    {"name": "scratch", "ephemeral": {"volumeClaimTemplate": {}}}],
    },
})  # fmt: skip


@pytest.mark.parametrize(("claim", "refused"), [("a", False), ("b", True), (None, False), ("p-scratch", False)])
def test_another_drivers_claims_are_no_concern(claim, refused, soon):
    """Only the claim that this volume's PersistentVolume is bound to; where that is not known, none is refused."""
    ref = PodRef(namespace="default", name="p", uid="u", persistent_volume="pvc-1")
    pod = with_own(SUBPATH, ref, Volumes(claim), soon)
    runtime = a_runtime(None, pod)
    if refused:
        with pytest.raises(Refused, match="subPath"):
            preflight.check(runtime, pv_name="v")
    else:
        preflight.check(runtime, pv_name="v")


def test_an_inline_volume_is_known_by_the_pods_own_name(soon):
    pod = facts_from({
        "metadata": {"uid": "u", "name": "p"},
        "spec": {"containers": [{"name": "c", "volumeMounts": [{"name": "flex", "subPath": "x"}]}],
                 "volumes": [{"name": "flex", "flexVolume": {"driver": "runvol/runvol"}}]},
    })  # fmt: skip
    ref = PodRef(namespace="default", name="p", uid="u", pod_volume="flex", persistent_volume="flex")
    with pytest.raises(Refused, match="subPath"):
        preflight.check(a_runtime(None, with_own(pod, ref, Volumes(), soon)), pv_name="v")


def test_a_generic_ephemeral_volume_is_a_claim(soon):
    pod = facts_from({
        "metadata": {"uid": "u", "name": "p"},
        "spec": {"containers": [{"name": "c", "volumeMounts": [{"name": "scratch", "subPath": "x"}]}],
                 "volumes": [{"name": "scratch", "ephemeral": {"volumeClaimTemplate": {}}}]},
    })  # fmt: skip
    with pytest.raises(Refused, match="subPath"):
        preflight.check(a_runtime(None, with_own(pod, PodRef(), Volumes(), soon)), pv_name="v")


def test_where_the_pod_is_not_known_the_hazard_is_told(node, caplog):
    preflight.check(rust(node, None), pv_name="v")
    assert "several containers" in caplog.text


@pytest.mark.parametrize(
    ("path", "hypervisor", "settings", "slots"),
    [
        (GO_PATH, "qemu", "block_device_driver = 'virtio-blk'", 30),
        (GO_PATH, "qemu", "block_device_driver = 'virtio-blk'\ndefault_bridges = 3", 90),
        (GO_PATH, "qemu", "block_device_driver = 'virtio-blk'\ndefault_bridges = 0", 30),
        (GO_PATH, "qemu", "block_device_driver = 'virtio-blk'\ndefault_bridges = 99", 150),
        (GO_PATH, "qemu", "block_device_driver = 'virtio-scsi'", 0),
        (GO_PATH, "qemu", "", 0),
        (GO_PATH, "firecracker", "", 8),
        (GO_PATH, "clh", "block_device_driver = 'virtio-blk'", 0),
        (RUST_PATH, "qemu", "block_device_driver = 'virtio-blk-pci'", 30),
        (RUST_PATH, "qemu", "block_device_driver = 'virtio-blk-pci'\npcie_root_port = 2", 0),
        (RUST_PATH, "qemu", "block_device_driver = 'virtio-scsi'", 0),
        (RUST_PATH, "firecracker", "", 6),
    ],
)
def test_how_many_disks_a_guest_has_places_for(node, path, hypervisor, settings, slots):
    where = "runtime-rs/" if path == RUST_PATH else ""
    node(f"/etc/kata-containers/{where}configuration.toml", f"[hypervisor.{hypervisor}]\n{settings}\n")
    assert node.read(runtime_path=path).disk_slots({}) == slots


def test_a_pods_annotation_decides_about_its_own_places(node):
    node("/etc/kata-containers/configuration.toml",
         "[hypervisor.qemu]\nblock_device_driver = 'virtio-blk'\nenable_annotations = ['default_bridges', 'block_device_driver']\n")  # fmt: skip
    found = node.read(runtime_path=GO_PATH)
    name = "io.katacontainers.config.hypervisor."
    assert found.disk_slots({f"{name}default_bridges": "2"}) == 60
    assert found.disk_slots({f"{name}default_bridges": "two"}) == 30
    assert found.disk_slots({f"{name}block_device_driver": "virtio-scsi"}) == 0
