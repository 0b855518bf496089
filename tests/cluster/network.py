"""The cluster's network: a bridge in the control machine with a port for this machine and one for each node.

Everything has an address that the tests reach as well: the API server, the nodes, the pods.
"""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.machines import Broken, Machine

SERVICES = "10.96.0.0/16"
# The service `kubernetes`: nothing translates addresses here, so the API server itself has it.
KUBERNETES = "10.96.0.1"
_BRIDGE = "rvbr"


def _ip(*words: str, inside: Machine | None = None) -> None:
    # Only the network is another machine's: `netns PID` means a pid as it is seen here.
    prefix = [] if inside is None else ["nsenter", f"--net=/proc/{inside.pid}/ns/net", "--"]
    done = subprocess.run([*prefix, "ip", *words], capture_output=True, text=True)
    if done.returncode:
        raise Broken(f"ip {' '.join(words)}: {done.stderr}")


def link(one: Machine, address: str, name: str, other: Machine, others_address: str, others_name: str) -> None:
    """A cable between two machines; what `one` still has of that name goes before."""
    subprocess.run(
        ["nsenter", f"--net=/proc/{one.pid}/ns/net", "--", "ip", "link", "delete", name], capture_output=True
    )
    _ip("link", "add", name, "type", "veth", "peer", "name", others_name, "netns", str(other.pid), inside=one)
    _ip("addr", "add", address, "peer", f"{others_address}/32", "dev", name, inside=one)
    _ip("addr", "add", others_address, "peer", f"{address}/32", "dev", others_name, inside=other)
    _ip("link", "set", name, "up", inside=one)
    _ip("link", "set", others_name, "up", inside=other)


@dataclass(frozen=True)
class Network:
    """The number tells one cluster's network from another's on the same machine."""

    number: int

    @property
    def link(self) -> str:
        """The interface on this machine; it goes with the control machine."""
        return f"rvcluster{self.number}"

    @property
    def host(self) -> str:
        return f"10.78.{self.number}.1"

    @property
    def control(self) -> str:
        return f"10.78.{self.number}.2"

    def node(self, index: int) -> str:
        """The address of node 1 to 7."""
        return f"10.78.{self.number}.{10 + index}"

    def pods(self, index: int) -> str:
        """The addresses of a node's pods."""
        return f"10.{80 + index}.{self.number}.0/24"

    @classmethod
    def of(cls, control: Machine) -> Network:
        """The first number that is free, with the control machine connected to this one."""
        for number in range(1, 255):
            network = cls(number)
            made = subprocess.run(
                ["ip", "link", "add", network.link, "type", "veth", "peer", "name", "host", "netns", str(control.pid)],
                capture_output=True, text=True)  # fmt: skip
            if made.returncode == 0:
                network._connect(control)
                return network
            if "exists" not in made.stderr:
                raise Broken(f"no interface {network.link}: {made.stderr}")
        raise Broken("no free number for the network of a cluster")

    def _connect(self, control: Machine) -> None:
        # Without an address of its own a bridge has one of its ports', and another one when that port goes.
        _ip("link", "add", _BRIDGE, "address", f"02:00:00:00:00:{self.number:02x}", "type", "bridge", inside=control)
        _ip("addr", "add", f"{self.control}/24", "dev", _BRIDGE, inside=control)
        _ip("addr", "add", f"{KUBERNETES}/32", "dev", "lo", inside=control)
        _ip("link", "set", "host", "master", _BRIDGE, inside=control)
        for name in ("host", _BRIDGE):
            _ip("link", "set", name, "up", inside=control)
        control.run(["sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward"])
        _ip("addr", "add", f"{self.host}/24", "dev", self.link)
        _ip("link", "set", self.link, "up")

    def join(self, control: Machine, node: Machine, index: int) -> None:
        """A new node's machine gets its interface, which is gone with it."""
        port = f"node{index}"
        _ip("link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", str(node.pid), inside=control)
        _ip("link", "set", port, "master", _BRIDGE, "up", inside=control)
        _ip("addr", "add", f"{self.node(index)}/24", "dev", "eth0", inside=node)
        _ip("link", "set", "eth0", "up", inside=node)
        _ip("route", "add", "default", "via", self.control, inside=node)
        node.run(["sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward"])
        _ip("route", "replace", self.pods(index), "via", self.node(index), inside=control)
        _ip("route", "replace", self.pods(index), "via", self.control)

    def leave(self, control: Machine | None = None, index: int = 0) -> None:
        """Takes a node's link away, or this machine's: by itself it goes only some time after its namespace."""
        link = self.link if control is None else f"node{index}"
        try:
            _ip("link", "delete", link, inside=control)
        except Broken as gone:
            if "Cannot find device" not in str(gone):
                raise

    def cut(self, control: Machine, index: int) -> None:
        """The node hears nothing more, and nothing hears it."""
        _ip("link", "set", f"node{index}", "down", inside=control)

    def mend(self, control: Machine, index: int) -> None:
        _ip("link", "set", f"node{index}", "up", inside=control)


def write_pod_network(directory: Path, pods: str) -> None:
    """CNI's description of a node's network: a bridge, and addresses out of `pods`."""
    ranges = {
        "type": "host-local",
        "ranges": [[{"subnet": pods}]],
        "routes": [{"dst": "0.0.0.0/0"}],
        "dataDir": "/run/cni",
    }
    bridge = {"type": "bridge", "bridge": "cni0", "isGateway": True, "ipam": ranges}
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"cniVersion": "1.0.0", "name": "pods", "plugins": [bridge]})
    (directory / "10-pods.conflist").write_text(text)
