"""A machine with nfs-ganesha that nodes reach by links of their own, which stay when a node's network is cut: a NAS beside
an edge node."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from tests import ganesha
from tests.cluster.machines import Machine
from tests.cluster.network import link

ADDRESS = "10.79.0.1"


class FileServer:
    """A context manager. `export` is the directory that is exported as `/exp`, by version 4."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.export = directory, directory / "export"
        self.machine = Machine("nas")
        self._stack = ExitStack()

    def __enter__(self) -> FileServer:
        state = self.directory / "ganesha"
        for place in (self.export, state):
            place.mkdir(parents=True)
        with ExitStack() as stack:
            stack.callback(self.machine.off)
            self.machine.on()
            # In the machine's network only: what is signalled has to be the server itself.
            prefix = ("nsenter", f"--net=/proc/{self.machine.pid}/ns/net", "--")
            stack.enter_context(ganesha.Ganesha(state, self.export, tree=ganesha.tree(), prefix=prefix))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def join(self, node: Machine, index: int) -> None:
        """A node's machine, newly on, gets its link, which is gone with it."""
        link(self.machine, ADDRESS, f"node{index}", node, f"10.79.0.{10 + index}", "lan0")
