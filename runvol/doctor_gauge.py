"""`runvol doctor` for the filesystem that shows the pool's fill: whether it is there, and tells the truth."""

from __future__ import annotations

from collections.abc import Iterator

from blockdev import BlockdevError, Deadline
from blockdev.deadlines import bounded
from runvol.diagnosis import Diagnosis, good, warning
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
    subject = "gauge"
    gauge = Gauge(path, state_dir)
    try:
        shown = bounded(f"looking at {path}", Deadline.after(_LOOKING), gauge.shown)
    except (SnapshotterError, BlockdevError, OSError) as error:
        yield warning("pool.gauge-missing", subject, f"{error}: kubelet and what watches the node do not see how full "
                      "the pool is")  # fmt: skip
        return
    said = f"{path} shows {size(shown.available)} of {size(shown.total)} free"
    if abs(shown.available - wanted.available) > _LAG * wanted.total or shown.total < wanted.total * (1 - _LAG):
        yield warning("pool.gauge-behind", subject, f"{said}, but the pool has {size(wanted.available)} of "
                      f"{size(wanted.total)}")  # fmt: skip
        return
    yield good("pool.gauge", subject, said)
