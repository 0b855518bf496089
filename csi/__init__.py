"""The CSI plugin: translates CSI 1.13 requests into volumes and guestmount, and errors into gRPC codes."""

from csi.server import SERVICES, Server
from guestmount.drivers import NFS, NODES

__all__ = ["NFS", "NODES", "SERVICES", "Server"]
