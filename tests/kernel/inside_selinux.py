"""Runs in a user-mode kernel of its own, which starts with SELinux and without a policy; `POLICY` is given to it."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from blockdev import mountinfo, selinux
from guestmount import Conflict
from tests.driver import POD
from tests.kernel.inside.nfs import ROOT, KernelNfs
from tests.kernel.selinux_policy import ONE, OTHER
from tests.labels import Lab

FOR_ALL = "system_u:object_r:container_file_t:s0"
FIRST, SECOND, THIRD = (POD.format(number) for number in (1, 2, 3))


def label_of(path: str) -> str:
    return os.getxattr(path, "security.selinux").decode().rstrip("\0")


def is_changed(label: str, path: str) -> bool:
    try:
        os.setxattr(path, "security.selinux", label.encode())
    except OSError as error:
        # The first is what containerd takes for an answer.
        assert error.errno in (errno.EOPNOTSUPP, errno.EROFS), error
        return False
    return True


def raised(kind: type[Exception], call: Callable[[], object]) -> str:
    try:
        call()
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind.__name__}")


def without_a_policy(lab: Lab) -> None:
    """Labels are refused by the kernel then, so it is told none."""
    assert not selinux.is_on()
    lab.stage(ONE)
    lab.publish(FIRST, ONE, "runc")
    lab.node.unpublish(lab.id, lab.target(FIRST), lab.soon)
    assert os.listdir(lab.publish(SECOND, ONE, "kata")) == ["RUNVOL-PLACEHOLDER"]
    lab.end(SECOND)


def on_the_host(lab: Lab) -> None:
    lab.stage(ONE)
    target = lab.publish(FIRST, ONE, "runc")
    Path(target, "f").write_text("x")
    assert label_of(target) == label_of(f"{target}/f") == ONE
    assert not is_changed(OTHER, f"{target}/f")
    assert label_of(f"{lab.publish(SECOND, ONE, 'runc')}/f") == ONE
    assert OTHER in raised(Conflict, lambda: lab.publish(THIRD, OTHER, "runc"))
    assert OTHER in raised(Conflict, lambda: lab.stage(OTHER))
    lab.end(FIRST, SECOND)
    lab.stage(OTHER)
    assert label_of(f"{lab.publish(THIRD, OTHER, 'runc')}/f") == OTHER
    lab.end(THIRD)
    # containerd labels each file of a volume that was mounted without a label.
    lab.stage("")
    target = lab.publish(FIRST, "", "runc")
    mount = mountinfo.at(target)
    assert mount is not None and "seclabel" in mount.super_options, mount
    assert is_changed(ONE, f"{target}/f") and label_of(f"{target}/f") == ONE
    lab.end(FIRST)


def in_a_guest(lab: Lab, label: str, expected: str) -> None:
    lab.stage(label)
    target = lab.publish(FIRST, label, "kata")
    assert label_of(target) == label_of(f"{target}/RUNVOL-PLACEHOLDER") == expected
    mount = mountinfo.at(target)
    # Where kubelet reads this word it has containerd label each file, which is refused: this one is read-only.
    assert mount is not None and "seclabel" not in mount.super_options, mount
    assert not is_changed(OTHER, target)
    (handed,) = lab.node.means.dialects.delivered().values()
    assert handed.options == ("rw", "noatime")
    lab.end(FIRST)


def on_nfs(lab: Lab, server: KernelNfs) -> None:
    """The label is the mount's here, too, also of two volumes of one server (since Linux 5.13)."""
    server.start()
    for name in ("one", "two"):
        (ROOT / name).mkdir()
    lab.another("nfs-one", "", backend="nfs", server="127.0.0.1", path=str(ROOT / "one"))
    lab.stage(ONE)
    assert label_of(lab.publish(FIRST, ONE, "runc")) == ONE
    lab.another("nfs-two", "", backend="nfs", server="127.0.0.1", path=str(ROOT / "two"))
    lab.stage(OTHER)
    assert label_of(lab.publish(FIRST, OTHER, "runc")) == OTHER
    assert ONE in raised(Conflict, lambda: lab.publish(SECOND, ONE, "runc"))
    lab.end(FIRST)
    lab.another("nfs-one", "", backend="nfs", server="127.0.0.1", path=str(ROOT / "one"))
    lab.end(FIRST)


def main() -> None:
    directory = Path("/var/lib/selinux")
    lab = Lab(directory)
    without_a_policy(lab)
    subprocess.run(["mount", "-t", "selinuxfs", "selinuxfs", "/sys/fs/selinux"], check=True)
    policy = Path(sys.argv[1]).read_bytes()
    with open("/sys/fs/selinux/load", "wb", buffering=0) as load:
        assert load.write(policy) == len(policy)
    assert selinux.is_on()
    on_the_host(lab)
    in_a_guest(lab, ONE, ONE)
    in_a_guest(lab, "", FOR_ALL)
    lab.another("x", "xfs", 320)
    on_the_host(lab)
    on_nfs(lab, KernelNfs(directory / "exported"))
    left = [mount.target for mount in mountinfo.table() if mount.target.startswith(str(lab.root))]
    assert not left, left
    print("all seen")


if __name__ == "__main__":
    main()
