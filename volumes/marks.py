"""What a volume's, or a snapshot's, file says of itself, beside its row: a store may be restored to what it was before.

Extended attributes of the file. On a filesystem that takes none the row alone speaks.
"""

from __future__ import annotations

import errno
import logging
import os

log = logging.getLogger("runvol.marks")

# Its mkfs ended; a foreign kernel may have written it.
FORMATTED, FOREIGN = "trusted.runvol.formatted", "trusted.runvol.foreign"
_NONE = (errno.ENODATA, errno.ENOENT, errno.EOPNOTSUPP)
# What stops no work that its row notes as well.
_BORNE = (errno.ENOENT, errno.EOPNOTSUPP, errno.ENOSPC, errno.EDQUOT, errno.E2BIG)


def be_marked(file: str | int, name: str) -> None:
    """`file`: its path, or a descriptor. OSError, but not where the filesystem takes no mark."""
    try:
        os.setxattr(file, name, b"1")
    except OSError as error:
        if error.errno not in _BORNE:
            raise
        log.info("a file bears no mark; its row says the same", extra={"mark": name, "why": str(error.strerror)})


def be_unmarked(path: str, name: str) -> None:
    """Whether it was marked or not."""
    try:
        os.removexattr(path, name)
    except OSError as error:
        if error.errno not in _NONE:
            raise


def is_marked(path: str, name: str) -> bool:
    """No for a file that is not there. OSError where it cannot be told."""
    try:
        os.getxattr(path, name)
    except OSError as error:
        if error.errno not in _NONE:
            raise
        return False
    return True


def are_kept(directory: str) -> bool:
    """Whether files of the directory can be marked at all."""
    try:
        os.getxattr(directory, FORMATTED)
    except OSError as error:
        return error.errno != errno.EOPNOTSUPP
    return True
