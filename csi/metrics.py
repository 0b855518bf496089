"""Metrics of the CSI plugin: its calls, what goes on behind them, and what the last look at the node's volumes found.

A scrape asks no server and no disk: of volumes it tells what `guestmount.survey` has seen, and when that was.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from blockdev import deadlines, scraped
from csi import metric_families as families
from csi.call_book import BOUNDS, CallBook
from csi.workers import Workers
from guestmount import BadRequest, Detector
from guestmount.events import EVENTS, Events
from guestmount.known_pods import KnownPods
from guestmount.survey import Seen, Survey, Surveyed, User
from volumes import work

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

    from blockdev.scraped import Collector

_USAGE = ((families.CAPACITY, "total_bytes"), (families.USED, "used_bytes"), (families.AVAILABLE, "available_bytes"))
_INODES = ((families.INODES, "inodes"), (families.INODES_USED, "used_inodes"))
_COUNTED = (
    (families.READS, "reads"), (families.READ_BYTES, "read_bytes"), (families.READ_SECONDS, "read_seconds"),
    (families.WRITES, "writes"), (families.WRITTEN_BYTES, "written_bytes"), (families.WRITE_SECONDS, "write_seconds"),
)  # fmt: skip


class _Calls:
    """What is done now, and was since the start."""

    part = "calls"

    def __init__(self, book: CallBook, workers: Sequence[Workers]) -> None:
        self._book, self._workers = book, workers

    def collect(self) -> Iterator[Metric]:
        from prometheus_client.core import HistogramMetricFamily

        yield families.CALLS.of((key, number) for key, number in self._book.codes().items())
        histogram = HistogramMetricFamily(
            families.CALL_SECONDS.name, families.CALL_SECONDS.help, labels=families.CALL_SECONDS.labels
        )
        for method, durations in sorted(self._book.durations().items()):
            total, buckets = 0, []
            for bound, number in zip((*map(str, BOUNDS), "+Inf"), durations.within, strict=True):
                total += number
                buckets.append((bound, float(total)))
            histogram.add_metric([method], buckets, durations.seconds)
        yield histogram
        every, late = self._book.under_way()
        yield families.IN_FLIGHT.of(((method,), number) for method, number in every.items())
        yield families.HUNG.of(((method,), number) for method, number in late.items())
        yield families.QUEUED.of(((one.name,), one.queued) for one in self._workers)
        yield families.THREADS.of(((one.name,), one.count) for one in self._workers)
        yield families.BUSY.of(((one.name,), one.busy) for one in self._workers)
        yield families.BLOCKED.of(deadlines.left_behind())
        jobs = work.running.items()
        yield families.JOBS.of(len(jobs))
        yield families.JOB_DONE.of(((one.what,), one.done) for one in jobs)
        yield families.JOB_SIZE.of(((one.what,), one.total) for one in jobs)
        yield families.JOB_AGE.of(((one.what,), one.seconds) for one in jobs)


class _Detection:
    """How it is known what runs a pod, and how old that is."""

    part = "detection"

    def __init__(self, detector: Detector) -> None:
        self._detector = detector

    def collect(self) -> Iterator[Metric]:
        yield families.DETECTIONS.of(((by,), number) for by, number in _still(self._detector.decided))
        pods = self._detector.pods
        if not isinstance(pods, KnownPods):
            return
        yield families.LOOKUPS.of(((by,), number) for by, number in _still(pods.told))
        yield families.WATCH_HEALTHY.of(((one.what,), float(one.healthy)) for one in pods.watches)
        yield families.WATCH_HEARD.of(((one.what,), one.last) for one in pods.watches)


class _Events:
    """What was told to pods and claims."""

    part = "events"

    def __init__(self, events: Events) -> None:
        self._events = events

    def collect(self) -> Iterator[Metric]:
        yield EVENTS.of(((outcome,), number) for outcome, number in _still(self._events.outcomes))


def _still(counted: Counter[str]) -> list[tuple[str, int]]:
    """As it is now, whatever is counted meanwhile."""
    return list(counted.copy().items())


class _Volumes:
    """What the survey has seen; of devices, what their kernel counts now."""

    part = "volumes"

    def __init__(self, survey: Survey) -> None:
        self._survey = survey

    def collect(self) -> Iterator[Metric]:
        seen = self._survey.seen
        yield families.SURVEYED.of(seen.at)
        yield families.SURVEY_INTERVAL.of(self._survey.interval)
        yield families.SURVEY_SECONDS.of(seen.seconds)
        yield families.SURVEY_FAILURES.of(self._survey.failures)
        yield families.LEFT_OUT.of(seen.left_out)
        yield families.DAMAGED.of(seen.damaged)
        yield families.VOLUMES.of((key, number) for key, number in _by_owner(seen).items())
        yield families.HANDOFFS.of((key, number) for key, number in seen.handoffs.items())
        yield families.STORED.of(((name,), one.volumes) for name, one in seen.stores.items())
        yield families.PROMISED.of(((name,), one.promised) for name, one in seen.stores.items())
        yield families.CAN_PROMISE.of(((name,), one.available) for name, one in seen.stores.items())
        yield families.VOLUME_POD.of(
            ((*_labels(one, user), one.backend, one.owner, one.handler), 1)
            for one in seen.volumes
            for user in one.users
        )
        measured = [one for one in seen.volumes if one.usage is not None and one.users]
        yield families.MEASURED.of((_labels(one), one.measured) for one in measured)
        yield families.UNMEASURED.of((_labels(one), 1.0) for one in seen.volumes if one.trouble)
        for family, field in _USAGE:
            yield family.of((_labels(one), getattr(one.usage, field)) for one in measured)
        for family, field in _INODES:
            yield family.of(
                (_labels(one), getattr(one.usage, field)) for one in measured if one.usage and one.usage.inodes
            )
        yield from _io(seen)


def _by_owner(seen: Seen) -> Counter[tuple[str, str, str]]:
    return Counter((one.backend, one.owner, one.handler) for one in seen.volumes)


def _labels(one: Surveyed, user: User | None = None) -> Sequence[str]:
    """Of one of its pods; of what they have in common, where none is named."""
    user = user or one.user
    return (one.volume, user.namespace, user.persistent_volume_claim, user.pod)


def _io(seen: Seen) -> Iterator[Metric]:
    counted = [(_labels(one), io) for one in seen.volumes if (io := one.io()) is not None]
    for family, field in _COUNTED:
        yield family.of((labels, getattr(io, field)) for labels, io in counted)
    # A guest has several volumes, and is one process.
    vmms = {(one.user.namespace, one.user.pod, str(one.vmm)): one for one in seen.volumes if one.vmm}
    done = [(labels, moved) for labels, one in vmms.items() if (moved := one.vmm_io()) is not None]
    yield families.VMM_READ.of((labels, moved.read_bytes) for labels, moved in done)
    yield families.VMM_WRITTEN.of((labels, moved.written_bytes) for labels, moved in done)


def serve(
    address: str, *, version: str, book: CallBook, workers: Sequence[Workers], detector: Detector,
    survey: Survey | None, events: Events | None = None, others: Sequence[Collector] = (),
) -> None:  # fmt: skip
    """Serve `HOST:PORT`. BadRequest."""
    collectors: list[Collector] = [_Calls(book, workers), _Detection(detector), *others]
    if events is not None:
        collectors.append(_Events(events))
    if survey is not None:
        collectors.append(_Volumes(survey))
    try:
        scraped.listen(address, collectors, part="csi", version=version)
    except ValueError as error:
        raise BadRequest("csi.metrics", address, str(error)) from None
