"""What node-driver-registrar does, for a plugin that does not introduce itself: `python -m tests.cluster.registrar NAME
SOCKET REGISTRY`."""

from __future__ import annotations

import signal
import sys

from csi.kubelet import Registration
from csi.server import answers


def main() -> None:
    name, socket, registry = sys.argv[1:]
    registration = Registration(name, endpoint=socket, registry=registry, alive=lambda: answers(socket, name))
    registration.start()
    signal.sigwait([signal.SIGTERM])
    registration.stop()


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    main()
