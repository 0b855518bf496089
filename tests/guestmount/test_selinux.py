"""What the kernel is told of a pod's SELinux label, call by call: it is written down and left out of the real call, since
this machine's kernel may know no such option. `tests/kernel/test_selinux.py` has one that does."""

from __future__ import annotations


import pytest

from blockdev import mountinfo, mounts, selinux, syscalls
from guestmount import Conflict, StageRequest, placeholder
from guestmount.requests import check_options
from guestmount.errors import BadRequest
from tests.csi.helpers import PODS
from tests.labels import Lab
from volumes import AccessMode, Capability

LABEL = "system_u:object_r:container_file_t:s0:c10,c20"
OTHER = "system_u:object_r:container_file_t:s0:c30,c40"


@pytest.fixture
def told(tmp_path, monkeypatch):
    """SELinux counts as on; what mount(2) and fsconfig(2) were told of labels, in their order."""
    known = tmp_path / "filesystems"
    known.write_text("nodev\tselinuxfs\n")
    monkeypatch.setattr(selinux, "_FILESYSTEMS", str(known))
    (tmp_path / "label").write_text("system_u:system_r:unconfined_t:s0\n")
    monkeypatch.setattr(selinux, "_OWN_LABEL", str(tmp_path / "label"))
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
    request = StageRequest(volume_id=lab.id, staging_path=lab.staging, capability=use)
    with pytest.raises(BadRequest, match="mount_flags = 'context=.*double quotes"):
        lab.node.stage(request, lab.soon)
    with pytest.raises(BadRequest, match="double quotes"):
        check_options(flags)
