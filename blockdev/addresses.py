"""Where a process listens, as settings say it: `HOST:PORT`."""

from __future__ import annotations

import re

_ADDRESS = re.compile(r"(\S+):([0-9]{1,5})\Z")


def host_and_port(text: str) -> tuple[str, int]:
    """The host, without the brackets of an IPv6 address, and the port. ValueError, with what is wrong in words."""
    found = _ADDRESS.match(text)
    if not found or not 0 < int(found[2]) < 1 << 16:
        raise ValueError("takes HOST:PORT")
    return found[1].removeprefix("[").removesuffix("]"), int(found[2])
