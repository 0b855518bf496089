"""Which containerd is kubelet's: where its configuration and its socket are.

k3s and RKE2 start a containerd of their own, with a generated configuration below their data directory and one socket
for both (their documentation, "Advanced Options"). Another containerd beside it, such as Docker's, has its CRI plugin
disabled (`disabled_plugins`), and is none of kubelet's.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

from guestmount import runtimes
from guestmount.runtimes import in_root

AUTO = "auto"


@dataclass(frozen=True, kw_only=True)
class Place:
    """`config` and `socket` are the node's names."""

    name: str
    config: str
    socket: str


PLACES = (
    Place(name="containerd", config="/etc/containerd/config.toml", socket="/run/containerd/containerd.sock"),
    Place(name="k3s", config="/var/lib/rancher/k3s/agent/etc/containerd/config.toml",
          socket="/run/k3s/containerd/containerd.sock"),
    Place(name="RKE2", config="/var/lib/rancher/rke2/agent/etc/containerd/config.toml",
          socket="/run/k3s/containerd/containerd.sock"),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Taken:
    """`endpoint`: as this process reaches it (`unix://…`), empty for never. `certain`: it is the one that `config` is
    of, or an operator's word. `proved`: something of a place says that it is kubelet's, not only that somebody has the
    socket, and nothing says so of another. `others`: further ones on this node that may be kubelet's."""

    config: str
    endpoint: str
    certain: bool
    why: str
    proved: bool = True
    serves: bool = True
    others: tuple[Taken, ...] = ()

    @property
    def endpoints(self) -> tuple[str, ...]:
        """Of all that may be kubelet's; none that is never asked."""
        return tuple(dict.fromkeys(one.endpoint for one in (self, *self.others) if one.endpoint))


@dataclass(frozen=True, kw_only=True)
class Places:
    """What is set (`paths.containerd_config`, `cri.endpoint`), each of them or `auto`; `root`: the node's own."""

    config: str = AUTO
    endpoint: str = AUTO
    root: str = "/"

    def taken(self) -> Taken:
        """Looked for each time: a node's containerd may be installed after this process was started."""
        if self.config != AUTO:
            place = next((one for one in PLACES if one.config == self.config), None)
            socket = self._address(self.config) or (place.socket if place is not None else "")
            return self._reached(self.config, socket, "paths.containerd_config")
        candidates = self._candidates()
        there = [one for one in candidates if os.path.exists(in_root(one.config, self.root))]
        serving = [one for one in there if self._serves(one)]
        disabled = bool(there) and not serving
        if disabled:  # kubelet's is another one, whose file may lie anywhere
            serving = [one for one in candidates if one not in there and self._seen(one.socket)] + there
        if not serving:
            serving = [one for one in candidates if self._seen(one.socket)]
        elif self.endpoint == AUTO and not any(self._seen(self._socket(one)) for one in serving):
            # What was left of an earlier containerd, or one that does not run yet.
            serving += [one for one in candidates if one not in there and self._seen(one.socket)]
        first, *others = [
            self._reached(one.config, self._socket(one), f"{one.name}'s own place") for one in serving or candidates[:1]
        ]
        if not serving:
            first = replace(first, why="nothing was found at any place that is known")
        proved = (bool(there) and not others) or self.endpoint != AUTO
        places = {one.config for one in there} if disabled else set()
        first, *others = [replace(one, proved=proved, serves=one.config not in places) for one in (first, *others)]
        return replace(first, others=tuple(others))

    def _candidates(self) -> tuple[Place, ...]:
        """Those of the socket that is set, if it is one that is known."""
        said = [one for one in PLACES if one.socket == self.endpoint.removeprefix("unix://")]
        return tuple(said) or PLACES

    def _reached(self, config: str, socket: str, why: str) -> Taken:
        if self.endpoint != AUTO:
            return Taken(config=config, endpoint=self.endpoint, certain=True, why=why)
        path = socket or PLACES[0].socket
        return Taken(config=config, endpoint=f"unix://{self._seen(path) or path}", certain=bool(socket), why=why)

    def _socket(self, place: Place) -> str:
        return self._address(place.config) or place.socket

    def _seen(self, socket: str) -> str:
        """Where a socket of the node's is seen: below its root, or mounted where it is there. Empty for nowhere."""
        return next((one for one in (in_root(socket, self.root), socket) if os.path.exists(one)), "")

    def _address(self, config: str) -> str:
        """The socket that the file itself names."""
        said = [str(table["address"]) for table in runtimes.tables(config, "grpc", root=self.root) if
                table.get("address")]  # fmt: skip
        return said[-1] if said and said[-1].startswith("/") else ""

    def _serves(self, place: Place) -> bool:
        disabled: set[str] = set()
        for document in runtimes.tables(place.config, root=self.root):
            named = document.get("disabled_plugins")
            disabled.update(str(one) for one in named if isinstance(named, list)) if isinstance(named, list) else None
        return not disabled & set(runtimes.CRI_PLUGINS)
