"""The CSI plugin: translates CSI 1.13 requests into volumes and guestmount, and errors into gRPC codes."""

from csi.drivers import NFS, NODES
from csi.server import SERVICES, Server

__all__ = ["NFS", "NODES", "SERVICES", "Server"]
