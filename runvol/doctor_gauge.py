"""`runvol doctor` for the filesystem that shows the pool's fill: whether it is there, and tells the truth."""

from __future__ import annotations

from collections.abc import Iterator

from blockdev import BlockdevError, Deadline
from blockdev.deadlines import bounded
from runvol.diagnosis import OK, WARNING, Diagnosis
from runvol.sizes import words as size
from snapshotter.errors import SnapshotterError
from snapshotter.gauge import Fill, Gauge

# Seconds; and the share by which it may lag behind the pool.
_LOOKING = 3.0
_LAG = 0.1


def examine(path: str, state_dir: str, wanted: Fill) -> Iterator[Diagnosis]:
    """`wanted`: what it is to show. An empty path: it is not wanted."""
    if not path:
        return
    subject = f"gauge {path}"
    gauge = Gauge(path, state_dir)
    try:
        shown = bounded(f"looking at {path}", Deadline.after(_LOOKING), gauge.shown)
    except (SnapshotterError, BlockdevError, OSError) as error:
        yield Diagnosis(state=WARNING, subject=subject, finding=f"{error}: kubelet and what watches the node do not "
                        "see how full the pool is. `systemctl restart runvol-snapshotter` makes it; why it could not "
                        "stands in its log")  # fmt: skip
        return
    said = f"{size(shown.available)} of {size(shown.total)} free"
    if abs(shown.available - wanted.available) > _LAG * wanted.total or shown.total < wanted.total * (1 - _LAG):
        yield Diagnosis(state=WARNING, subject=subject, finding=f"shows {said}, but the pool has "
                        f"{size(wanted.available)} of {size(wanted.total)}: it does not follow the pool, as the "
                        "snapshotter is not running, or its log says why")  # fmt: skip
        return
    yield Diagnosis(state=OK, subject=subject, finding=f"shows {said}")
