"""`runvol nri`: the NRI plugin, until a signal says stop."""

from __future__ import annotations

import os
import threading

from guestmount import Claims
from runvol.config import Config
from runvol.serve import signals


def serve(config: Config) -> None:
    """Connect, and connect again, until SIGTERM or SIGINT."""
    from guestmount import nri

    run_dir = config.text("paths.run_dir")
    os.makedirs(run_dir, mode=0o700, exist_ok=True)
    told, stop = signals(), threading.Event()
    arguments = (Claims(run_dir), run_dir, config.text("nri.socket"), stop)
    plugin = threading.Thread(target=nri.serve, args=arguments, name="plugin")
    plugin.start()
    told.recv(1)
    stop.set()
    plugin.join(10)
