"""The CSI plugin: translates CSI 1.13 requests into volumes and guestmount, and errors into gRPC codes."""

from csi.identity import NAME
from csi.server import SERVICES, Server

__all__ = ["NAME", "SERVICES", "Server"]
