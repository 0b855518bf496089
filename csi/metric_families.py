"""The metrics of the CSI plugin: what each is called, and what it means. What is told of them: `csi.metrics`."""

from __future__ import annotations

from blockdev.families import COUNTER, GAUGE, HISTOGRAM, Family
from guestmount.events import EVENTS

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
