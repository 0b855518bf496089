"""Files of settings in TOML: read with a bound, and what is none is one kind of error, whatever stops the parser."""

from __future__ import annotations

import errno
import os
import stat
import tomllib
from typing import Any

# Bytes of one file.
_LARGEST = 4 << 20


def read(path: str) -> tuple[str, dict[str, Any]]:
    """The text, and what it says. OSError, also for what is no file (a FIFO would be waited for) and for one that is
    larger than settings are; tomllib.TOMLDecodeError."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    with open(fd, "rb") as file:
        mode = os.fstat(fd).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISCHR(mode):  # /dev/null says that there are none
            why = os.strerror(errno.EISDIR) if stat.S_ISDIR(mode) else "it is no regular file"
            raise OSError(errno.EISDIR if stat.S_ISDIR(mode) else errno.EUCLEAN, why, path)
        content = file.read(_LARGEST + 1)
    if len(content) > _LARGEST:
        raise OSError(errno.EFBIG, f"it has more than {_LARGEST} bytes", path)
    return parsed(content)


def parsed(content: bytes) -> tuple[str, dict[str, Any]]:
    """As `read`, of a file's bytes."""
    try:
        text = content.decode()
        return text, tomllib.loads(text)
    except RecursionError:
        raise tomllib.TOMLDecodeError("it is nested too deeply") from None
    except ValueError as error:
        if isinstance(error, tomllib.TOMLDecodeError):
            raise
        raise tomllib.TOMLDecodeError(str(error)) from None
