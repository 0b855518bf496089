"""Makes state.tar.gz: what a release keeps on a node and on a share. Run in a checkout of that release, as root:

    PYTHONPATH=. python make.py state.tar.gz

`state/` is its state directory: volumes of `loop` (one with a filesystem, one that was being deleted, a clone), a snapshot,
a volume of `directory`, the exports that it remembers. `share/` is what the server nas.example exports at /export.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from blockdev import Deadline
from tests.driver import POD, Driver
from volumes import SizeRange, exports
from volumes.nfs import NfsBackend

MIB = 1 << 20
NFS = {"backend": "nfs", "server": "nas.example", "path": "/export"}


def main(target: str) -> None:
    work = Path(tempfile.mkdtemp())
    share = work / "share"
    share.mkdir()
    with Driver() as driver:
        local(driver)
        driver.stop()
        store = sqlite3.connect(driver.state / "volumes.db", isolation_level=None)
        store.execute("UPDATE volumes SET state = 'deleting' WHERE name = 'pvc-half'")
        store.close()
        on_share(driver.state, share)
        subprocess.run(["cp", "-a", "--sparse=always", driver.state, work / "state"], check=True)
    subprocess.run(["tar", "-C", work, "-S", "-czf", os.path.abspath(target), "state", "share"], check=True)
    shutil.rmtree(work)


def local(driver: Driver) -> None:
    volume = driver.create("pvc-loop", 16 * MIB)
    driver.stage(volume)
    (Path(driver.publish(volume, POD.format(1), runtime="runc")) / "data").write_text("precious")
    driver.unpublish(volume, POD.format(1))
    driver.unstage(volume)
    taken = driver.client.CreateSnapshot(name="snapshot-1", source_volume_id=volume.volume_id).snapshot
    driver.client.CreateVolume(
        name="pvc-clone",
        capacity_range={"required_bytes": 16 * MIB},
        volume_capabilities=[{"mount": {}, "access_mode": {"mode": "SINGLE_NODE_WRITER"}}],
        volume_content_source={"snapshot": {"snapshot_id": taken.snapshot_id}},
    )
    driver.create("pvc-half", 16 * MIB)
    made = driver.create("pvc-directory", MIB, backend="directory", quota="none")
    (driver.state / "directories" / made.volume_id / "data").write_text("precious")


def on_share(state: Path, share: Path) -> None:
    @contextlib.contextmanager
    def opened(_export: object) -> Iterator[int]:
        fd = os.open(share, os.O_RDONLY | os.O_DIRECTORY)
        try:
            yield fd
        finally:
            os.close(fd)

    exports.opened = opened
    backend = NfsBackend(str(state))
    for name, more in (("pvc-kept", {}), ("pvc-removed", {"archiveOnDelete": "false"}),
                       ("pvc-below", {"subDir": "team/a"}), ("pvc-share", {"volumeAs": "sharepath"})):  # fmt: skip
        made = backend.create(name, SizeRange(required=MIB), NFS | more, [])
        if name != "pvc-share":
            (share / (more.get("subDir") or name) / "data").write_text("precious")
        if name == "pvc-kept":
            backend.take_snapshot("snapshot-2", made.volume_id, Deadline.after(20))


if __name__ == "__main__":
    main(sys.argv[1])
