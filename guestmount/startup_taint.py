"""A node takes pods only once its driver is registered: the plugin takes the taint off that the node came with."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING
from urllib.parse import quote

from blockdev import Deadline, WaitExpired
from guestmount.pods import PodUnknown

if TYPE_CHECKING:
    from guestmount.kubernetes_api import KubernetesApi

log = logging.getLogger("runvol.taint")

# Seconds for one try; between looks whether the driver is registered, and registered anew; between tries.
_ASKING, _LOOK, _LATER, _FIRST_PAUSE, _LONGEST_PAUSE = 10.0, 0.5, 5.0, 1.0, 60.0


class StartupTaint:
    """Takes the taint of this key off the node with each registration: a kubelet that starts may have made its node
    anew, with the taint."""

    def __init__(self, api: KubernetesApi, *, node_id: str, key: str, registered: Callable[[], int]) -> None:
        """`registered`: how often the driver was, 0 while it is not."""
        self._api, self._node_id, self._key, self._registered = api, node_id, key, registered
        self._stop = threading.Event()

    def start(self) -> None:
        """Behind; it never ends in an error, since the API may be away for days."""
        threading.Thread(target=self._run, name="startup taint", daemon=True).start()

    def stop(self) -> None:
        self._stop.set()

    def _run(self) -> None:
        pause, told, done = _FIRST_PAUSE, "", 0
        while not self._stop.is_set():
            times = self._registered()
            if times in (0, done):
                self._stop.wait(_LATER if done else _LOOK)
                continue
            try:
                self._take_off(Deadline.after(_ASKING))
                pause, told, done = _FIRST_PAUSE, "", times
                continue
            except Exception as error:
                if told != str(error):
                    told = str(error)
                    foreseen, facts = isinstance(error, (PodUnknown, WaitExpired)), {"taint": self._key, "why": told}
                    log.warning("the node keeps its taint; it is tried again", extra=facts, exc_info=not foreseen)
            self._stop.wait(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _take_off(self, deadline: Deadline) -> None:
        path = f"/api/v1/nodes/{quote(self._node_id, safe='')}"
        node = self._api.one(f"node {self._node_id}", path, deadline)
        spec = node.get("spec")
        taints = spec.get("taints") if isinstance(spec, dict) else None
        if not isinstance(spec, dict) or not isinstance(taints, list):
            return
        spec["taints"] = [one for one in taints if not (isinstance(one, dict) and one.get("key") == self._key)]
        if len(spec["taints"]) < len(taints):
            self._api.replace("the node", path, node, deadline)  # of this version, so nobody's change is lost
            log.info("the node takes pods", extra={"taint": self._key})
