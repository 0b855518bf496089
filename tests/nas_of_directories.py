"""A double of NFS for what is no matter of the protocol: the server `nas` exports directories of this machine."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from blockdev import nfs
from blockdev.errors import MountFailed
from volumes import exports


def serve(monkeypatch: pytest.MonkeyPatch, find: Callable[[nfs.Export], Path | None]) -> None:
    """From now on the backend mounts what `find` names for an export; nobody answers where that is nothing."""

    @contextlib.contextmanager
    def opened(export: nfs.Export) -> Iterator[int]:
        found = find(export)
        if found is None or not found.is_dir():
            raise MountFailed(export.source, "nowhere", "nobody answers")
        fd = os.open(found, os.O_RDONLY | os.O_DIRECTORY)
        try:
            yield fd
        finally:
            os.close(fd)

    monkeypatch.setattr(exports, "opened", opened)


def below(top: Path) -> Callable[[nfs.Export], Path | None]:
    """Every path of `nas` lies below `top`."""
    return lambda export: top / export.path.lstrip("/") if export.server == "nas" else None
