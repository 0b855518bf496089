"""`runvol where`."""

from __future__ import annotations

import os
import sys

import click

from runvol import assembly, schemas, tables, troubles
from runvol import where as search
from runvol.cli import Loader, as_json_option
from runvol.config import Config

_COLUMNS: tables.Columns[schemas.PodPlace] = [
    "what",
    "container",
    "seen_at",
    "path",
    ("on host", lambda one: one.readable),
    "why",
]


@click.command(short_help="Tell where the parts of a pod are on this node.")
@click.argument("pod", metavar="POD")
@as_json_option
@click.pass_obj
def where(load: Loader, pod: str, as_json: bool) -> None:
    """Tell where a pod's root filesystems, output and volumes are on this node.

    POD is a name, NAMESPACE/NAME, or a UID. What a guest has cannot be read from the host, and the last column says so.
    Status 1 if nothing of it is here.
    """
    with troubles.looking(troubles.LOOKING):
        config = load()
        root = config.text("paths.host_root")
        claims, damaged = assembly.claims(config).readable()
        for error in damaged:
            tables.warn(error)
        found = search.places(
            pod,
            claims=claims,
            containers=list(search.bundles(_states(config), root)),
            outputs=search.logged(config.text("paths.pod_logs"), root),
            root=root,
        )
    if not found and not as_json:
        raise click.ClickException(
            f"nothing of a pod {pod} is on this node: no container of it runs here, kubelet has no output of it, and "
            "no volume is published to it"
        )
    items = [
        schemas.PodPlace(what=one.kind, pod_namespace=one.pod.namespace or None, pod_name=one.pod.name or None,
                         pod_uid=one.pod.uid, container=one.container or None, volume=one.volume or None,
                         seen_at=one.seen_at or None, path=one.path or None, readable=one.readable,
                         why=one.why or None, device=one.device or None, handler=one.handler or None,
                         kernel=one.kernel or None, read_only=one.read_only)
        for one in found
    ]  # fmt: skip
    tables.show(schemas.PodPlace, items, _COLUMNS, as_json=as_json, empty="")
    sys.exit(troubles.FINE if found else troubles.FOUND)


def _states(config: Config) -> list[str]:
    """Where the containerds that may be kubelet's keep what runs: beside their sockets."""
    sockets = [one.removeprefix("unix://") for one in assembly.places(config).taken().endpoints]
    root = config.text("paths.host_root").rstrip("/")
    return [os.path.dirname(one.removeprefix(root) if root else one) for one in sockets]
