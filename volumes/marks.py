"""What a volume's, or a snapshot's, file says of itself, beside its row: a store may be restored to what it was before.

Extended attributes of the file. On a filesystem that takes none the row alone speaks.
"""

from __future__ import annotations

import contextlib
import os

# Its mkfs ended; a foreign kernel may have written it.
FORMATTED, FOREIGN = "trusted.runvol.formatted", "trusted.runvol.foreign"


def be_marked(file: str | int, name: str) -> None:
    """`file`: its path, or a descriptor."""
    with contextlib.suppress(OSError):
        os.setxattr(file, name, b"1")


def be_unmarked(path: str, name: str) -> None:
    """Whether it was marked or not."""
    with contextlib.suppress(OSError):
        os.removexattr(path, name)


def is_marked(path: str, name: str) -> bool:
    """No for a file that is not there."""
    try:
        os.getxattr(path, name)
    except OSError:
        return False
    return True
