"""The names under which Kubernetes knows the plugin, and what each of them serves.

A provisioner takes every claim of its driver's name, so volumes that live on one node, whose provisioner runs on each,
and volumes that any controller can make, whose provisioner runs once, need two names.
"""

from __future__ import annotations

from dataclasses import dataclass

from guestmount import Node
from guestmount.drivers import NFS, NODES
from volumes import Catalog


@dataclass(frozen=True, kw_only=True)
class CsiDriver:
    """`on_nodes`: whether its volumes may live on one node, so that where they are is told."""

    name: str
    catalog: Catalog
    on_nodes: bool = True


def of_nodes(node: Node, *, central: bool) -> CsiDriver:
    """Every backend, NFS among them: volumes on NFS were made under this name before the other was there. `central`:
    for a controller that serves no node, which only grants those of nodes a larger size."""
    return CsiDriver(name=NODES, catalog=node.catalog.central() if central else node.catalog)


def of_nfs(node: Node, *, central: bool) -> CsiDriver:  # noqa: ARG001  (it is the same anywhere)
    return CsiDriver(name=NFS, catalog=node.catalog.only("nfs", others_driver=NODES), on_nodes=False)
