"""`runvol doctor`: what this node can do, what it cannot, and what to change. Nothing is changed, and nothing made."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from blockdev import Deadline, WaitExpired
from blockdev.deadlines import bounded
from guestmount import Node
from guestmount.running_containerd import Answer
from runvol import (
    assembly,
    doctor_cluster,
    doctor_containerd,
    doctor_kata,
    doctor_kernel,
    doctor_kubelet,
    doctor_nri,
    doctor_sidecars,
    doctor_snapshots,
    doctor_versions,
    doctor_volumes,
)
from runvol.config import Config
from runvol.diagnosis import Diagnosis, unknown

# Seconds for one kind of check, of which each has deadlines of its own.
_LONGEST = 60.0

Look = Callable[[], Iterable[Diagnosis]]


def examine_all(config: Config) -> Iterator[Diagnosis]:
    """As `examine`, by the settings alone. Where the directory of the stores gives no answer, what can be looked at
    without them."""
    if dead := doctor_kubelet.silent((config.text("paths.state_dir"),)):
        yield unknown("state.silent", "state directory", f"{dead} gives no answer within 5 seconds")
        yield from examine(config, None)
        return
    opening = Deadline.after(_LONGEST)
    yield from examine(config, bounded("opening the stores", opening, lambda: assembly.build(config, looking=True)))


def examine(config: Config, node: Node | None) -> Iterator[Diagnosis]:
    """Every check, one after the other. What only a node has is looked at where the node's service is (csi.services): a
    central controller has neither kubelet nor containerd. A check that fails or hangs is a finding of its own."""
    for what, look in _looks(config, node):
        yield from ended(what, look)


def _with(node: Node | None, what: str, look: Callable[[Node], Iterable[Diagnosis]]) -> tuple[str, Look]:
    """The look, or that it cannot be had without the stores."""
    if node is None:
        return what, lambda: [unknown("doctor.not-looked", what, "the state directory gives no answer")]
    return what, lambda: look(node)


def ended(what: str, look: Look, seconds: float = _LONGEST) -> Iterator[Diagnosis]:
    """What the look has found; if it came to no end, that and why."""
    found: list[Diagnosis] = []

    def all_of_it() -> None:
        for one in look():
            found.append(one)

    trouble = ""
    try:
        bounded(f"looking at {what}", Deadline.after(seconds), all_of_it)
    except WaitExpired as error:
        trouble = str(error)
    except Exception as error:  # of whatever kind: the other checks are still to come, and the reason is told
        trouble = f"{type(error).__name__}: {error}"
    yield from found
    if trouble:
        yield unknown("doctor.not-looked", what, trouble)


def _looks(config: Config, node: Node | None) -> Iterator[tuple[str, Look]]:
    on_node = "node" in config.words("csi.services")
    yield "programs", doctor_kernel.programs
    yield "the kernel", lambda: doctor_kernel.examine(config, on_node=on_node)
    if on_node:
        yield "kubelet's directory", lambda: doctor_kubelet.directories(config)
        yield _with(node, "mounts", lambda it: doctor_kubelet.reach(config, it))
    yield "the driver", lambda: doctor_kubelet.examine(config)
    yield "sidecars", lambda: doctor_sidecars.examine(config)
    yield "versions", lambda: doctor_versions.examine(config, on_node=on_node)
    yield _with(node, "the clock", lambda _: doctor_versions.clock(config, assembly.api(config)))
    if on_node:
        answers: list[Answer] = []

        def ask() -> Iterator[Diagnosis]:
            answers.append(doctor_containerd.asked(config))
            yield from doctor_containerd.examine(answers[0])

        yield "containerd", ask
        yield "Kubernetes", lambda: doctor_cluster.examine(config, assembly.api(config), next(iter(answers), None))
        # Of a containerd that gives no answer the handlers are not known; that it gives none was told.
        handlers = answers[0].handlers.values() if answers else ()
        yield _with(node, "runtime handlers", lambda it: doctor_kata.examine(config, handlers, it.claims.known()[0]))
        yield "NRI", lambda: doctor_nri.examine(config, handlers)
    else:
        yield "Kubernetes", lambda: doctor_cluster.examine(config, assembly.api(config), None)
    yield _with(node, "backends", doctor_volumes.backends)
    yield _with(node, "volumes", doctor_volumes.examine)
    roots = config.words("node.roots") if on_node else ()
    yield _with(node, "what is left over", lambda it: doctor_volumes.left_over(it, doctor_kubelet.silent(roots)))
    if on_node:
        yield _with(node, "root filesystems", lambda _: doctor_snapshots.examine(config))
