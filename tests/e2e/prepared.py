"""The cluster that Kubernetes' tests run against: two nodes, runvol by its chart, the images of the tests' pods."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.cluster import installed
from tests.cluster.cluster import Cluster
from tests.e2e import images

NODES = 2
# Bytes, sparse, of each node's disk for its volumes.
_DISK = 64 << 30


@contextmanager
def cluster(directory: Path) -> Iterator[Cluster]:
    """Its nodes keep their volumes on XFS, which has reflinks: snapshots are taken of volumes in use."""
    directory.mkdir(parents=True)
    with ExitStack() as stack:
        for number in range(1, NODES + 1):
            stack.enter_context(_disk(directory, f"node{number}"))
        running = stack.enter_context(Cluster(directory))
        for _ in range(1, NODES):
            running.add_node()
        installed.snapshot_crds(running)
        archives = images.archives(directory / "images")
        for node in running.nodes:
            installed.import_images(running, node)
            for archive in archives:
                node.import_image(archive)
        installed.install(running, installed.values(running.nodes[0]))
        yield running


@contextmanager
def _disk(directory: Path, node: str) -> Iterator[None]:
    place, image = directory / node / "runvol", directory / f"{node}.disk"
    place.mkdir(parents=True)
    with image.open("wb") as file:
        file.truncate(_DISK)
    subprocess.run(["mkfs.xfs", "-q", "-m", "reflink=1", image], check=True)
    subprocess.run(["mount", "-o", "loop", image, place], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", place], check=True)
        image.unlink()
