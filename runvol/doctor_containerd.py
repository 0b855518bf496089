"""`runvol doctor` for kubelet's containerd: which one was taken, whether it tells, whether its file says the same."""

from __future__ import annotations

from collections.abc import Iterator

from blockdev import Deadline
from guestmount.running_containerd import Answer, KubeletsContainerd
from guestmount.runtimes import ContainerdConfig, Handler
from runvol import assembly
from runvol.config import Config
from runvol.diagnosis import Diagnosis, good, warning

# Seconds.
_ASKING = 3.0
# What of a handler decides; a word of the file's that is empty stands for containerd's own.
_FIELDS = ("runtime_path", "config_path", "binary", "pod_annotations", "snapshotter")


def asked(config: Config) -> Answer:
    """Without what was kept of an earlier answer."""
    return KubeletsContainerd(assembly.places(config), roots=config.words("node.roots")).read(Deadline.after(_ASKING))


def examine(answer: Answer) -> Iterator[Diagnosis]:
    """A line for where it is, and one for whether what runs is what its file says."""
    taken = answer.taken
    where = f"{taken.config}, {taken.endpoint or 'never asked'} ({taken.why})"
    if answer.others:
        others = ", ".join(one.config for one in taken.others)
        yield warning("containerd.several", "containerd", f"{where}; {others} may be kubelet's too")
    elif answer.believed is None and not taken.proved:
        yield warning("containerd.not-found", "containerd", where)
    else:
        yield good("containerd.place", "containerd", where)
    yield _running(answer)


def _running(answer: Answer) -> Diagnosis:
    taken, subject = answer.taken, "running containerd"
    if answer.believed is None:
        finding = f"{taken.config} {answer.unread}, and {answer.doubt}: runtimes are known by name only"
        return warning("containerd.not-found", subject, finding)
    if answer.running is None:
        finding = f"was not asked for its runtimes, so its file counts: {answer.doubt}"
        if answer.differently:
            finding += (f"; containerd 1 and 2 read {taken.config} with its imports differently: a pod that this "
                        "matters to is refused")  # fmt: skip
            return warning("containerd.read-differently", subject, finding)
        if not taken.endpoint:
            return good("containerd.running", subject, finding)
        return warning("containerd.silent", subject, finding)
    if answer.on_file is None:
        return good("containerd.running", subject, f"tells its runtimes; {taken.config} {answer.unread}")
    wrong = list(_differences(answer.running, answer.on_file))
    if wrong:
        finding = f"is believed, and is not what {taken.config} says: {'; '.join(wrong)}"
        return warning("containerd.not-restarted", subject, finding)
    return good("containerd.running", subject, f"has its runtimes as {taken.config} has them")


def _differences(running: ContainerdConfig, on_file: ContainerdConfig) -> Iterator[str]:
    for name in sorted(on_file.handlers.keys() | running.handlers.keys()):
        runs, said = running.handlers.get(name), on_file.handlers.get(name)
        if runs is None:
            yield f"the file has the handler {name!r}, what runs has not"
        elif said is not None:
            yield from (f"{field} of the handler {name!r} is {getattr(runs, field)!r}, not {getattr(said, field)!r}"
                        for field in _fields(said) if getattr(runs, field) != getattr(said, field))  # fmt: skip
        elif name != "runc":  # which containerd has without a word
            yield f"what runs has the handler {name!r}, the file has not"
    if running.default_handler != on_file.default_handler:
        yield f"default_runtime_name is {running.default_handler!r}, not {on_file.default_handler!r}"


def _fields(said: Handler) -> Iterator[str]:
    if said.runtime_type:
        yield "runtime_type"
    yield from _FIELDS
