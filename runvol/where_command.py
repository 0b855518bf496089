"""`runvol where`."""

from __future__ import annotations

import os

import click

from runvol import assembly, tables
from runvol import where as search
from runvol.cli import Loader, as_json_option
from runvol.config import Config

_COLUMNS = ("kind", "container", "seen_at", "path", "on_host", "why")


@click.command()
@click.argument("pod", metavar="POD")
@as_json_option
@click.pass_obj
def where(load: Loader, pod: str, as_json: bool) -> None:
    """Tell where a pod's root filesystems, output and volumes are on this node.

    POD is a name, NAMESPACE/NAME, or a UID. What a guest has cannot be read from the host, and the last column says so.
    """
    config = load()
    root = config.text("paths.host_root")
    claims, damaged = assembly.claims(config).readable()
    for error in damaged:
        click.echo(f"warning: {error}", err=True)
    found = search.places(
        pod,
        claims=claims,
        containers=list(search.bundles(_states(config), root)),
        outputs=search.logged(config.text("paths.pod_logs"), root),
        root=root,
    )
    if not found:
        raise click.ClickException(
            f"nothing of a pod {pod} is on this node: no container of it runs here, kubelet has no output of it, and "
            "no volume is published to it"
        )
    rows = [
        {"kind": one.kind, "namespace": one.pod.namespace, "pod": one.pod.name, "pod_uid": one.pod.uid,
         "container": one.container, "seen_at": one.seen_at, "path": one.path,
         "on_host": "yes" if one.readable else "no", "readable": one.readable, "why": one.why,
         "volume": one.volume, "device": one.device, "handler": one.handler,
         "kernel": one.kernel, "read_only": one.read_only}
        for one in found
    ]  # fmt: skip
    tables.show(rows, _COLUMNS, as_json=as_json, empty="")


def _states(config: Config) -> list[str]:
    """Where the containerds that may be kubelet's keep what runs: beside their sockets."""
    sockets = [one.removeprefix("unix://") for one in assembly.places(config).taken().endpoints]
    root = config.text("paths.host_root").rstrip("/")
    return [os.path.dirname(one.removeprefix(root) if root else one) for one in sockets]
