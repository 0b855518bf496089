"""`runvol doctor` for kubelet: its directory, whether it sees what is mounted, whether it knows the plugin."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterable, Iterator

from blockdev import Deadline, WaitExpired, durable
from blockdev.deadlines import bounded
from guestmount import Node, drivers
from guestmount.handoff.kata import LONGEST_TARGET
from runvol.config import Config
from runvol.diagnosis import Diagnosis, broken, good, unknown, warning

_DIRECTORY = "kubelet's directory"
# The longest that kubelet makes of a volume below its directory: the pod's UID, and a PersistentVolume as provisioners
# name it.
_TARGET = "pods/00000000-0000-0000-0000-000000000000/volumes/kubernetes.io~csi/pvc-00000000-0000-0000-0000-000000000000"
_MOUNT = "/mount"
# Seconds for which a directory may let wait for it.
_LOOKING = 5.0


def silent(places: Iterable[str]) -> str:
    """The first of these directories that gives no answer; empty if all do. Asked once more it is known at once."""
    for place in places:
        try:
            bounded(f"looking at {place}", Deadline.after(_LOOKING), functools.partial(os.path.isdir, place))
        except WaitExpired:
            return place
    return ""


def directories(config: Config) -> Iterator[Diagnosis]:
    dead = silent(config.words("node.roots"))
    for root in config.words("node.roots"):
        if root == dead:
            yield unknown("kubelet.root-silent", _DIRECTORY, f"{root} gives no answer within {_LOOKING:.0f} seconds")
            return
        if not os.path.isdir(root):
            yield warning("kubelet.root-missing", _DIRECTORY, f"{root} does not exist: no kubelet has run here, or its "
                          "--root-dir is another one", "set `node.roots` to kubelet's --root-dir")  # fmt: skip
            continue
        length = len(os.fsencode(os.path.join(root, _TARGET) + _MOUNT))
        if length > LONGEST_TARGET:
            yield warning("kubelet.root-too-long", _DIRECTORY, f"below {root} a volume of a pod has a path of {length} "
                          f"bytes; Kata finds one by a path of at most {LONGEST_TARGET} bytes",
                          f"give kubelet a --root-dir that is {length - LONGEST_TARGET} bytes shorter, and set "
                          "`node.roots` to it")  # fmt: skip
        else:
            yield good("kubelet.root", _DIRECTORY, root)


def reach(config: Config, node: Node) -> Iterator[Diagnosis]:
    """Of this command's own mount namespace; the plugin says the same of its own in its health and its log."""
    if dead := silent(config.words("node.roots")):
        yield unknown("kubelet.mounts-unproved", "mounts", f"{dead} gives no answer")
        return
    doubt = node.reach.doubt() if node.reach is not None else None
    if doubt is None:
        yield good("kubelet.mounts", "mounts", "what is mounted here is seen by kubelet")
    elif doubt.certain:
        yield broken("kubelet.mounts-not-propagated", "mounts", doubt.why)
    else:
        yield unknown("kubelet.mounts-unproved", "mounts", doubt.why)


def examine(config: Config) -> Iterator[Diagnosis]:
    """A line for the socket, and one for the registration, of each driver's name that is configured here."""
    # gRPC takes a moment to be imported.
    from csi import kubelet, server

    nodes = "node" in config.words("csi.services")
    registry = kubelet.registry(config.text("csi.plugins_registry"), config.words("node.roots"))
    sockets = [server.socket_path(config.text(key)) for key in ("csi.endpoint", "csi.nfs_endpoint") if config.text(key)]
    roots = config.words("node.roots") if nodes else ()
    if dead := silent((*roots, *map(os.path.dirname, sockets), *([registry] if nodes and registry else []))):
        yield unknown("doctor.not-looked", "the driver", f"{dead} gives no answer, where its sockets are looked for")
        return
    for name, endpoint in (
        (drivers.NODES, config.text("csi.endpoint")),
        (drivers.NFS, config.text("csi.nfs_endpoint")),
    ):
        if not endpoint:
            continue
        path = server.socket_path(endpoint)
        serves = server.answers(path, name)
        if serves:
            yield good("kubelet.driver", f"driver {name}", f"answers at {path}")
        else:
            yield warning("kubelet.driver-silent", f"driver {name}", f"nobody answers at {path}")
        if nodes and registry:
            yield _registration(name, path, registry, kubelet.told_at(config.text("paths.run_dir"), name), serves)


def _registration(name: str, path: str, registry: str, told: str, serves: bool) -> Diagnosis:
    from csi import kubelet

    subject = f"registration {name}"
    if not os.path.isdir(registry):
        return warning("kubelet.registry-missing", subject, f"{registry} is not there: no kubelet has run here, or "
                       "node.roots names another directory than its own")  # fmt: skip
    others = kubelet.sockets_of(name, registry)
    wrong = [socket for socket, endpoint in others if endpoint != path]
    if wrong or len(others) > 1:
        finding = (f"{', '.join(socket for socket, _ in others)} register this name, the first for {others[0][1]}: "
                   "kubelet forgets it with whichever ends first")  # fmt: skip
        return broken("kubelet.registration-twice", subject, finding)
    state = _told(told) if serves else ""
    if state == "registered" and others:
        return good("kubelet.registration", subject, f"kubelet knows it, by {others[0][0]}")
    finding = state or "kubelet does not know it: the plugin is not running"
    return warning("kubelet.registration-missing", subject, finding)


def _told(path: str) -> str:
    try:
        return str(json.loads(durable.read(path))["state"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""
