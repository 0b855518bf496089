"""`runvol nri`: the NRI plugin, until a signal says stop."""

from __future__ import annotations

import functools
import os
import select
import threading

from blockdev import daemon
from runvol import assembly, version
from runvol.config import Config

# Seconds between two looks at whether the plugin's thread still runs.
_LOOK = 5.0


def serve(config: Config) -> None:
    """Connect, and connect again, until SIGTERM or SIGINT."""
    from guestmount import nri, nri_metrics, registration

    run_dir = config.text("paths.run_dir")
    os.makedirs(run_dir, mode=0o700, exist_ok=True)
    told, stop = daemon.signals(), threading.Event()
    book = nri_metrics.Book()
    events = assembly.events(config, assembly.api(config))
    plugin = nri.Plugin(assembly.claims(config), assembly.detector(config).of_handler, book, events)
    if config.text("nri.metrics"):
        nri_metrics.serve(
            config.text("nri.metrics"), version=version(), book=book,
            connected=functools.partial(registration.is_alive, run_dir),
        )  # fmt: skip
    serving = threading.Thread(target=nri.serve, args=(plugin, run_dir, config.text("nri.socket"), stop), name="plugin")
    serving.start()
    while not select.select([told], [], [], _LOOK)[0]:
        if not serving.is_alive():
            raise SystemExit("the NRI plugin's thread has ended; its last words are in the log")
    stop.set()
    serving.join(10)
