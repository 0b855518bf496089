"""`runvol doctor` for the way from kubelet to the plugin: does it serve, and does kubelet know it?"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator

from blockdev import durable
from guestmount import drivers
from runvol.config import Config
from runvol.diagnosis import BROKEN, OK, WARNING, Diagnosis


def examine(config: Config) -> Iterator[Diagnosis]:
    """A line for the socket, and one for the registration, of each driver's name that is configured here."""
    # gRPC takes a moment to be imported.
    from csi import kubelet, server

    nodes = "node" in config.words("csi.services")
    registry = kubelet.registry(config.text("csi.plugins_registry"), config.words("node.roots"))
    for name, endpoint in (
        (drivers.NODES, config.text("csi.endpoint")),
        (drivers.NFS, config.text("csi.nfs_endpoint")),
    ):
        if not endpoint:
            continue
        path = server.socket_path(endpoint)
        serves = server.answers(path, name)
        yield Diagnosis(
            state=OK if serves else WARNING,
            subject=f"driver {name}",
            finding=f"answers at {path}"
            if serves
            else f"nobody answers at {path}: is `runvol csi` running here, and with these settings?",
        )
        if nodes and registry:
            yield _registration(name, path, registry, kubelet.told_at(config.text("paths.run_dir"), name), serves)


def _registration(name: str, path: str, registry: str, told: str, serves: bool) -> Diagnosis:
    from csi import kubelet

    subject, others = f"registration {name}", kubelet.sockets_of(name, registry)
    if not os.path.isdir(registry):
        finding = (
            f"{registry} is not there: no kubelet has run here, or node.roots names another directory than its own"
        )
        return Diagnosis(state=WARNING, subject=subject, finding=finding)
    wrong = [socket for socket, endpoint in others if endpoint != path]
    if wrong or len(others) > 1:
        finding = (
            f"{', '.join(socket for socket, _ in others)} register this name, the first for {others[0][1]}: kubelet "
        )
        finding += "forgets it with whichever ends first; leave one"
        return Diagnosis(state=BROKEN, subject=subject, finding=finding)
    state = _told(told) if serves else ""
    if state == "registered" and others:
        return Diagnosis(state=OK, subject=subject, finding=f"kubelet knows it, by {others[0][0]}")
    return Diagnosis(
        state=WARNING, subject=subject, finding=state or "kubelet does not know it: the plugin is not running"
    )


def _told(path: str) -> str:
    try:
        return str(json.loads(durable.read(path))["state"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""
