"""What `runvol` starts. A service that is named by a plain command line begins without the command line's library.

A node's services start while containerd waits for them. click costs a quarter of a start, and does nothing for
`runvol snapshotter --endpoint …` that a loop over the words does not; whatever else is written goes to `runvol.cli`.
"""

from __future__ import annotations

import gc
import io
import os
import sys
from collections.abc import Sequence

_WHOLE = {
    "--config": "file",
    "--state-dir": "paths.state_dir",
    "--run-dir": "paths.run_dir",
    "--log-level": "log.level",
}
_SNAPSHOTTER = {"--endpoint": "snapshotter.endpoint", "--pool": "pool"}


def plain(words: Sequence[str]) -> dict[str, str] | None:
    """The options of `runvol [options] snapshotter [options]`; None for every other command line, mistakes included."""
    known, found, rest = _WHOLE, dict[str, str](), list(words)
    named = False
    while rest:
        word = rest.pop(0)
        if word == "snapshotter" and not named:
            known, named = _WHOLE | _SNAPSHOTTER, True
            continue
        name, equals, value = word.partition("=")
        if name not in known or not (equals or rest):
            return None
        found[known[name]] = value if equals else rest.pop(0)
    return found if named else None


def open_descriptors() -> None:
    """Who began this process may have closed what it reads and writes: then the next file that is opened would be that,
    and what a program says would be written into it. What is said to nobody is an error, as it is for ls and cat, but
    for errors themselves."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDONLY if number == 1 else os.O_RDWR)  # the lowest number that is free


def _streams() -> None:
    """A name that the terminal's encoding has no signs for is told in escapes."""
    open_descriptors()
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, mode, closefd=False))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def main() -> None:
    """The console script."""
    _streams()
    flags = plain(sys.argv[1:])
    if flags is None:
        from runvol.cli import main as whole

        whole()
        return
    # What an import makes is kept; looking through it for garbage again and again only makes a start slower.
    gc.disable()
    from runvol import config, logs, serve_snapshots, troubles

    file, pool = flags.pop("file", None), flags.pop("pool", None)
    try:
        loaded = config.load(file=file, flags=flags)
        logs.start(loaded.text("log.level"), loaded.text("log.format"))
        serve_snapshots.serve(loaded, pool)
    except Exception as error:
        said = troubles.sentence(error)
        if said is None:
            raise
        from blockdev.printable import printable

        sys.stderr.write(f"Error: {printable(said, lines=True)}\n")
        sys.exit(troubles.status(error))
