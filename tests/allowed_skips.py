"""Every skip that a run may have: a pattern of test ids, and words that its reason must hold."""

from __future__ import annotations

ALLOWED: tuple[tuple[str, str], ...] = (
    ("tests/csi/test_expand.py::test_a_mounted_ext4_grows_online", "CAP_SYS_RESOURCE"),
    ("tests/csi/test_closing.py::test_a_kill_in_the_middle_of_the_growth*", "the kernel grows a mounted ext4 here"),
    ("tests/runvol/test_endings.py::*never_answers*", "this kernel has no FUSE"),
    ("tests/flexvolume/test_driver.py::test_a_call_that_hangs*", "this kernel has no FUSE"),
    ("tests/deploy/test_csi_unit.py::test_systemd_understands_the_unit*", "systemd-analyze is not installed"),
    ("tests/deploy/test_csi_unit.py::test_how_exposed_a_unit_is*", "systemd-analyze is not installed"),
    ("tests/csi/test_user_namespaces.py::*", "is not prepared: run tests/prepare/go.sh"),
    ("tests/csi/test_recursive_read_only.py::*", "is not prepared: run tests/prepare/go.sh"),
    ("tests/deploy/test_containerd_config.py::*", "is not prepared: run tests/prepare/containerds.sh"),
    ("tests/kernel/inside/test_gauge_in_cri.py::*", "is not prepared: run tests/prepare/containerds.sh"),
    ("tests/kernel/inside/test_containerd.py::*", "is not prepared: run tests/prepare/containerds.sh"),
    ("tests/kernel/inside/test_gauge_in_kubelet.py::*", "is not prepared: run tests/prepare/cluster.sh"),
    ("tests/sanity/test_sanity.py::*", "local volume"),
    ("tests/sanity/test_sanity.py::*-sandbox-*]", "what a sandbox has is not grown under it"),
    ("tests/sanity/test_sanity.py::*", "CSI calls alpha"),
    ("tests/sanity/test_sanity.py::*", "pending in csi-sanity"),
    ("tests/sanity/test_sanity.py::*-directory]", "the backend takes no snapshots"),
)
