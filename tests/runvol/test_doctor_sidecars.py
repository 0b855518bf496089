"""What doctor says of the sidecars that run beside the plugin."""

from __future__ import annotations

import pytest

from runvol import config, doctor_sidecars

NODES, NFS = "--csi-address=/run/runvol/csi.sock", "--csi-address=unix:///run/runvol/nfs-csi.sock"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["/csi-provisioner", NODES, "--node-deployment", "--strict-topology"], ""),
        (["/csi-provisioner", NODES, "--strict-topology"], "without --node-deployment"),
        (["/csi-provisioner", NODES, "--node-deployment=true", "--strict-topology=false"], "without --strict-topology"),
        (["/csi-snapshotter", NODES, "-node-deployment"], ""),
        (["/csi-snapshotter", NODES], "without --node-deployment"),
        (["/csi-provisioner", NFS, "--leader-election"], ""),
        (["/csi-provisioner", NFS, "--node-deployment"], "central provisioner"),
        (["/csi-resizer", NODES, "--leader-election"], "serves one node"),
        (["/csi-resizer", NFS], ""),
        (["/csi-provisioner", "--csi-address=/run/other.sock"], None),
        (["/usr/bin/vi", "csi-provisioner", NODES], None),
    ],
)
def test_what_suits_a_driver(tmp_path, words, said):
    (tmp_path / "12").mkdir()
    (tmp_path / "12/cmdline").write_text("\0".join(words) + "\0")
    (tmp_path / "13").mkdir()  # has ended
    (tmp_path / "self").mkdir()
    loaded = config.load(file=None, flags={"csi.nfs_endpoint": "unix:///run/runvol/nfs-csi.sock"}, environment={})
    found = [*doctor_sidecars.examine(loaded, str(tmp_path))]
    if said is None:
        assert not found
        return
    (line,) = found
    assert (line.state == "ok") == (not said) and said in f"{line.finding}; {line.fix}"
