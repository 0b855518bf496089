"""Metrics of the CSI plugin: its calls, what goes on behind them, and what the last look at the node's volumes found.

A scrape asks no server and no disk: of volumes it tells what `guestmount.survey` has seen, and when that was.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from blockdev import deadlines, scraped
from blockdev.families import COUNTER, GAUGE, HISTOGRAM, Family
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

_OF_VOLUME = ("volume", "namespace", "persistentvolumeclaim", "pod")

CALLS = Family(name="runvol_csi_calls_total", kind=COUNTER, labels=("method", "code"), help="Calls that have ended.")
CALL_SECONDS = Family(
    name="runvol_csi_call_seconds", kind=HISTOGRAM, labels=("method",), help="How long calls took, whatever their code."
)
IN_FLIGHT = Family(name="runvol_csi_calls_in_flight", kind=GAUGE, labels=("method",), help="Calls under way.")
HUNG = Family(
    name="runvol_csi_calls_hung", kind=GAUGE, labels=("method",), help="Calls under way whose deadline is over."
)
QUEUED = Family(name="runvol_csi_calls_queued", kind=GAUGE, labels=("pool",), help="Calls that wait for a thread.")
THREADS = Family(name="runvol_csi_threads", kind=GAUGE, labels=("pool",), help="Threads for calls.")
BUSY = Family(name="runvol_csi_threads_busy", kind=GAUGE, labels=("pool",), help="Threads that have a call.")
BLOCKED = Family(
    name="runvol_blocked_system_calls", kind=GAUGE,
    help="System calls that have not come back in their time: a dead server, a broken disk.",
)  # fmt: skip
JOBS = Family(name="runvol_jobs", kind=GAUGE, help="Copies, walks and deletions behind calls now.")
JOB_DONE = Family(
    name="runvol_job_done_bytes",
    kind=GAUGE,
    labels=("work",),
    help="Bytes that are done of each, where it counts them.",
)
JOB_SIZE = Family(
    name="runvol_job_size_bytes", kind=GAUGE, labels=("work",), help="Bytes that each has in all; 0 for not known."
)
JOB_AGE = Family(name="runvol_job_age_seconds", kind=GAUGE, labels=("work",), help="Seconds since each began.")
VOLUMES = Family(
    name="runvol_volumes", kind=GAUGE, labels=("backend", "owner", "handler"),
    help="Volumes that are staged or published here, by the kernel that has them (host, sandbox, unknown, none for "
    "staged only) and the runtime handler of their pods.",
)  # fmt: skip
VOLUME_POD = Family(
    name="runvol_volume_pod", kind=GAUGE, labels=(*_OF_VOLUME, "backend", "owner", "handler"),
    help="1 for each pod that has a volume.",
)  # fmt: skip
MEASURED = Family(
    name="runvol_volume_measured_timestamp_seconds", kind=GAUGE, labels=_OF_VOLUME,
    help="When the values of the volume's bytes and inodes were true, in seconds since 1970.",
)  # fmt: skip
UNMEASURED = Family(
    name="runvol_volume_unmeasured", kind=GAUGE, labels=_OF_VOLUME,
    help="1 for a volume that could not be measured at the last look.",
)  # fmt: skip
CAPACITY = Family(
    name="runvol_volume_capacity_bytes", kind=GAUGE, labels=_OF_VOLUME, help="Bytes that the volume's filesystem has."
)
USED = Family(
    name="runvol_volume_used_bytes", kind=GAUGE, labels=_OF_VOLUME,
    help="Bytes in use; of one that a guest has, as its kernel has written it back.",
)  # fmt: skip
AVAILABLE = Family(
    name="runvol_volume_available_bytes", kind=GAUGE, labels=_OF_VOLUME, help="Bytes that a pod can still write."
)
INODES = Family(
    name="runvol_volume_inodes", kind=GAUGE, labels=_OF_VOLUME, help="Inodes in all; none for a raw device."
)
INODES_USED = Family(name="runvol_volume_inodes_used", kind=GAUGE, labels=_OF_VOLUME, help="Inodes in use.")
_IO = "by the block device that carries the volume, since the plugin saw it first."
READS = Family(name="runvol_volume_reads_total", kind=COUNTER, labels=_OF_VOLUME, help=f"Reads done {_IO}")
READ_BYTES = Family(name="runvol_volume_read_bytes_total", kind=COUNTER, labels=_OF_VOLUME, help=f"Bytes read {_IO}")
READ_SECONDS = Family(
    name="runvol_volume_read_seconds_total", kind=COUNTER, labels=_OF_VOLUME, help=f"Seconds that reads took {_IO}"
)
WRITES = Family(name="runvol_volume_writes_total", kind=COUNTER, labels=_OF_VOLUME, help=f"Writes done {_IO}")
WRITTEN_BYTES = Family(
    name="runvol_volume_written_bytes_total", kind=COUNTER, labels=_OF_VOLUME, help=f"Bytes written {_IO}"
)
WRITE_SECONDS = Family(
    name="runvol_volume_write_seconds_total", kind=COUNTER, labels=_OF_VOLUME, help=f"Seconds that writes took {_IO}"
)
VMM_READ = Family(
    name="runvol_vmm_read_bytes_total", kind=COUNTER, labels=("namespace", "pod", "pid"),
    help="Bytes that the process of a guest has had read from disks, of all its volumes and images together: of guests "
    "that have a volume's file itself, which no device of the host's counts for.",
)  # fmt: skip
VMM_WRITTEN = Family(
    name="runvol_vmm_written_bytes_total", kind=COUNTER, labels=("namespace", "pod", "pid"),
    help="Bytes that the process of a guest has given to be written, likewise.",
)  # fmt: skip
LEFT_OUT = Family(
    name="runvol_volumes_left_out", kind=GAUGE,
    help="Volumes without metrics of their own, as there are more than metrics.volumes.",
)  # fmt: skip
DAMAGED = Family(name="runvol_claims_damaged", kind=GAUGE, help="Records of who has a volume that cannot be read.")
HANDOFFS = Family(
    name="runvol_handoffs", kind=GAUGE, labels=("dialect", "state"),
    help="Hand-offs to sandboxes: open, closed (while the volume grows), damaged, missing, and unclaimed, which are "
    "another driver's or left over.",
)  # fmt: skip
STORED = Family(
    name="runvol_backend_volumes",
    kind=GAUGE,
    labels=("backend",),
    help="Volumes in the store of a backend of this node.",
)
PROMISED = Family(
    name="runvol_backend_promised_bytes", kind=GAUGE, labels=("backend",), help="Bytes that they may hold in all."
)
CAN_PROMISE = Family(
    name="runvol_backend_available_bytes", kind=GAUGE, labels=("backend",), help="Bytes that can still be promised."
)
SURVEYED = Family(
    name="runvol_survey_timestamp_seconds", kind=GAUGE,
    help="When the node's volumes were looked at last, in seconds since 1970; 0 for not yet.",
)  # fmt: skip
SURVEY_INTERVAL = Family(
    name="runvol_survey_interval_seconds", kind=GAUGE, help="How often they are looked at (metrics.interval_seconds)."
)
SURVEY_SECONDS = Family(name="runvol_survey_seconds", kind=GAUGE, help="How long that look took.")
SURVEY_FAILURES = Family(name="runvol_survey_failures_total", kind=COUNTER, help="Looks that failed as a whole.")
DETECTIONS = Family(
    name="runvol_detections_total", kind=COUNTER, labels=("decided_by",),
    help="Pods' runtimes that were detected, by what decided: containerd (it has no sandboxes), runtime_class, "
    "annotation, default_runtime, attribute, setting, or nobody.",
)  # fmt: skip
LOOKUPS = Family(
    name="runvol_pod_lookups_total", kind=COUNTER, labels=("told_by",),
    help="Pods that were asked about, by who told: watch, api, kubelet, kept (an answer on the disk), or nobody.",
)  # fmt: skip
WATCH_HEALTHY = Family(
    name="runvol_watch_healthy",
    kind=GAUGE,
    labels=("watch",),
    help="1 while what is known is as new as the API server's.",
)
WATCH_HEARD = Family(
    name="runvol_watch_heard_timestamp_seconds", kind=GAUGE, labels=("watch",),
    help="When the API server told something last, in seconds since 1970: as old is what is known; 0 for never.",
)  # fmt: skip

FAMILIES = (
    CALLS, CALL_SECONDS, IN_FLIGHT, HUNG, QUEUED, THREADS, BUSY, BLOCKED, JOBS, JOB_DONE, JOB_SIZE, JOB_AGE, VOLUMES,
    VOLUME_POD, CAPACITY, USED, AVAILABLE, INODES, INODES_USED, MEASURED, UNMEASURED, READS, READ_BYTES, READ_SECONDS,
    WRITES, WRITTEN_BYTES, WRITE_SECONDS, VMM_READ, VMM_WRITTEN, LEFT_OUT, DAMAGED, HANDOFFS, STORED, PROMISED,
    CAN_PROMISE, SURVEYED, SURVEY_INTERVAL, SURVEY_SECONDS, SURVEY_FAILURES, DETECTIONS, LOOKUPS, WATCH_HEALTHY,
    WATCH_HEARD, EVENTS,
)  # fmt: skip
_USAGE = ((CAPACITY, "total_bytes"), (USED, "used_bytes"), (AVAILABLE, "available_bytes"))
_INODES = ((INODES, "inodes"), (INODES_USED, "used_inodes"))
_COUNTED = (
    (READS, "reads"), (READ_BYTES, "read_bytes"), (READ_SECONDS, "read_seconds"), (WRITES, "writes"),
    (WRITTEN_BYTES, "written_bytes"), (WRITE_SECONDS, "write_seconds"),
)  # fmt: skip


class _Calls:
    """What is done now, and was since the start."""

    part = "calls"

    def __init__(self, book: CallBook, workers: Sequence[Workers]) -> None:
        self._book, self._workers = book, workers

    def collect(self) -> Iterator[Metric]:
        from prometheus_client.core import HistogramMetricFamily

        yield CALLS.of((key, number) for key, number in self._book.codes().items())
        histogram = HistogramMetricFamily(CALL_SECONDS.name, CALL_SECONDS.help, labels=CALL_SECONDS.labels)
        for method, durations in sorted(self._book.durations().items()):
            total, buckets = 0, []
            for bound, number in zip((*map(str, BOUNDS), "+Inf"), durations.within, strict=True):
                total += number
                buckets.append((bound, float(total)))
            histogram.add_metric([method], buckets, durations.seconds)
        yield histogram
        every, late = self._book.under_way()
        yield IN_FLIGHT.of(((method,), number) for method, number in every.items())
        yield HUNG.of(((method,), number) for method, number in late.items())
        yield QUEUED.of(((one.name,), one.queued) for one in self._workers)
        yield THREADS.of(((one.name,), one.count) for one in self._workers)
        yield BUSY.of(((one.name,), one.busy) for one in self._workers)
        yield BLOCKED.of(deadlines.left_behind())
        jobs = work.running.items()
        yield JOBS.of(len(jobs))
        yield JOB_DONE.of(((one.what,), one.done) for one in jobs)
        yield JOB_SIZE.of(((one.what,), one.total) for one in jobs)
        yield JOB_AGE.of(((one.what,), one.seconds) for one in jobs)


class _Detection:
    """How it is known what runs a pod, and how old that is."""

    part = "detection"

    def __init__(self, detector: Detector) -> None:
        self._detector = detector

    def collect(self) -> Iterator[Metric]:
        yield DETECTIONS.of(((by,), number) for by, number in _still(self._detector.decided))
        pods = self._detector.pods
        if not isinstance(pods, KnownPods):
            return
        yield LOOKUPS.of(((by,), number) for by, number in _still(pods.told))
        yield WATCH_HEALTHY.of(((one.what,), float(one.healthy)) for one in pods.watches)
        yield WATCH_HEARD.of(((one.what,), one.last) for one in pods.watches)


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
        yield SURVEYED.of(seen.at)
        yield SURVEY_INTERVAL.of(self._survey.interval)
        yield SURVEY_SECONDS.of(seen.seconds)
        yield SURVEY_FAILURES.of(self._survey.failures)
        yield LEFT_OUT.of(seen.left_out)
        yield DAMAGED.of(seen.damaged)
        yield VOLUMES.of((key, number) for key, number in _by_owner(seen).items())
        yield HANDOFFS.of((key, number) for key, number in seen.handoffs.items())
        yield STORED.of(((name,), one.volumes) for name, one in seen.stores.items())
        yield PROMISED.of(((name,), one.promised) for name, one in seen.stores.items())
        yield CAN_PROMISE.of(((name,), one.available) for name, one in seen.stores.items())
        yield VOLUME_POD.of(
            ((*_labels(one, user), one.backend, one.owner, one.handler), 1)
            for one in seen.volumes
            for user in one.users
        )
        measured = [one for one in seen.volumes if one.usage is not None and one.users]
        yield MEASURED.of((_labels(one), one.measured) for one in measured)
        yield UNMEASURED.of((_labels(one), 1.0) for one in seen.volumes if one.trouble)
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
    yield VMM_READ.of((labels, moved.read_bytes) for labels, moved in done)
    yield VMM_WRITTEN.of((labels, moved.written_bytes) for labels, moved in done)


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
