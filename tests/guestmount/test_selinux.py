"""What the kernel is told of a pod's SELinux label, call by call. No kernel here runs SELinux: the label is written down
and left out of the real call, which would know no such option."""

from __future__ import annotations

from pathlib import Path

import pytest

from blockdev import Deadline, mountinfo, mounts, selinux, syscalls
from guestmount import Conflict, PodRef, PublishRequest, StageRequest, placeholder
from guestmount.requests import check_options
from guestmount.errors import BadRequest
from runvol import assembly, config
from tests.csi.helpers import PODS
from volumes import AccessMode, Capability, SizeRange

LABEL = "system_u:object_r:container_file_t:s0:c10,c20"
OTHER = "system_u:object_r:container_file_t:s0:c30,c40"


@pytest.fixture
def told(tmp_path, monkeypatch):
    """SELinux counts as on; what mount(2) and fsconfig(2) were told of labels, in their order."""
    known = tmp_path / "filesystems"
    known.write_text("nodev\tselinuxfs\n")
    monkeypatch.setattr(selinux, "_FILESYSTEMS", str(known))
    calls: list[tuple[str, str]] = []
    mount, configure = syscalls.mount, syscalls.fsconfig_set

    def spied_mount(source, target, fstype, flags, data):
        words = mounts.words(data or "")
        calls.extend(("mount", word) for word in words if selinux.is_label(word))
        mount(source, target, fstype, flags, ",".join(word for word in words if not selinux.is_label(word)))

    def spied_configure(fd, key, value):
        if selinux.is_label(key):
            calls.append(("fsconfig", f"{key}={value}"))
        else:
            configure(fd, key, value)

    monkeypatch.setattr(syscalls, "mount", spied_mount)
    monkeypatch.setattr(syscalls, "fsconfig_set", spied_configure)
    return calls


def capability(label: str, *more: str) -> Capability:
    flags = (*more, *((f'context="{label}"',) if label else ()))
    return Capability(mode=AccessMode.SINGLE_NODE_MULTI_WRITER, fstype="ext4", mount_flags=flags)


class Lab:
    """A node in this process, and one volume."""

    def __init__(self, directory: Path) -> None:
        self.root, self.soon = directory / "kubelet", Deadline.after(60)
        self.root.mkdir()
        settings = {
            "node.roots": str(self.root), "paths.state_dir": str(directory / "state"),
            "paths.run_dir": str(directory / "run"), "paths.direct_volumes": str(directory / "direct"),
            "paths.containerd_config": str(directory / "containerd.toml"), "paths.kata_root": str(directory / "kata"),
            "node.id": "node-1", "node.unproved_mounts": "allow",
        }  # fmt: skip
        self.node = assembly.build(config.load(flags=settings))
        backend = self.node.catalog.for_parameters({"backend": "loop"})
        self.volume = backend.create("v", SizeRange(required=64 << 20), {}, [capability("")])

    def stage(self, label: str) -> None:
        self.node.stage(StageRequest(volume_id=self.volume.volume_id, staging_path=self.staging,
                                     capability=capability(label, "noatime")), self.soon)  # fmt: skip

    @property
    def staging(self) -> str:
        path = self.root / "staging"
        path.mkdir(exist_ok=True)
        return str(path)

    def target(self, pod: str) -> str:
        path = self.root / "pods" / pod / "volumes/kubernetes.io~csi/v"
        path.mkdir(parents=True, exist_ok=True)
        return str(path / "mount")

    def publish(self, pod: str, label: str, runtime: str) -> str:
        self.node.publish(
            PublishRequest(
                volume_id=self.volume.volume_id, staging_path=self.staging, target=self.target(pod),
                capability=capability(label, "noatime"), pod=PodRef(uid=pod), context={"runtime": runtime},
            ), self.soon,
        )  # fmt: skip
        return self.target(pod)

    def end(self, *pods: str) -> None:
        for pod in pods:
            self.node.unpublish(self.volume.volume_id, self.target(pod), self.soon)
        self.node.unstage(self.volume.volume_id, self.staging, self.soon)


@pytest.fixture
def lab(tmp_path):
    return Lab(tmp_path)


def test_a_runc_pods_filesystem_is_mounted_with_its_label_whole(lab, told):
    lab.stage(LABEL)
    target = lab.publish(PODS[1], LABEL, "runc")
    # mount(2) takes it with its quotes: the comma is no other option's.
    assert told == [("mount", f'context="{LABEL}"')]
    assert mountinfo.at(target).fstype == "ext4"
    lab.publish(PODS[2], LABEL, "runc")
    assert len(told) == 1, "it is mounted once"
    lab.end(PODS[1], PODS[2])


def test_a_pod_with_another_label_waits_until_it_is_staged_again(lab, told):
    lab.stage(LABEL)
    lab.publish(PODS[1], LABEL, "runc")
    with pytest.raises(Conflict, match=f"with the SELinux label {LABEL}, asked for is {OTHER}.*{PODS[1]}"):
        lab.publish(PODS[2], OTHER, "runc")
    with pytest.raises(Conflict, match=f"asked for is {OTHER}"):
        lab.stage(OTHER)
    assert not mounts.is_mount_point(lab.target(PODS[2]))
    lab.publish(PODS[1], LABEL, "runc")
    lab.end(PODS[1])
    lab.stage(OTHER)
    lab.publish(PODS[2], OTHER, "runc")
    assert told == [("mount", f'context="{LABEL}"'), ("mount", f'context="{OTHER}"')]
    lab.end(PODS[2])


def test_a_volume_without_a_label_is_not_given_one_by_a_second_pod(lab, told):
    lab.stage("")
    lab.publish(PODS[1], "", "runc")
    with pytest.raises(Conflict, match="without an SELinux label"):
        lab.publish(PODS[2], LABEL, "runc")
    assert told == []
    lab.end(PODS[1])


def test_a_guest_is_told_no_label_and_the_placeholder_has_the_pods(lab, told):
    lab.stage(LABEL)
    target = lab.publish(PODS[1], LABEL, "kata")
    # fsconfig(2) takes it without quotes.
    assert told == [("fsconfig", f"context={LABEL}")]
    assert placeholder.stands(target)
    (handed,) = lab.node.means.dialects.delivered().values()
    assert handed.options == ("rw", "noatime")
    lab.end(PODS[1])


def test_without_a_label_of_the_pods_every_container_may_read_the_placeholder(lab, told):
    lab.stage("")
    lab.publish(PODS[1], "", "kata")
    assert told == [("fsconfig", "context=system_u:object_r:container_file_t:s0")]
    lab.end(PODS[1])


def test_half_a_label_is_refused_before_anything_is_staged(lab):
    flags = tuple(mounts.words(f"context={LABEL}"))
    use = Capability(mode=AccessMode.SINGLE_NODE_MULTI_WRITER, fstype="ext4", mount_flags=flags)
    request = StageRequest(volume_id=lab.volume.volume_id, staging_path=lab.staging, capability=use)
    with pytest.raises(BadRequest, match="mount_flags = 'context=.*double quotes"):
        lab.node.stage(request, lab.soon)
    with pytest.raises(BadRequest, match="double quotes"):
        check_options(flags)
