"""What the kernel answers for the world's sake: a full disk, a dead server, a filesystem that refuses."""

from __future__ import annotations

import enum
import errno
import os


class Kind(enum.Enum):
    """SCARCE: the node has no more of it. AWAY: a disk or a server does not do it now. REFUSED: a filesystem does not
    let it be done, or has not what it should have."""

    SCARCE = enum.auto()
    AWAY = enum.auto()
    REFUSED = enum.auto()


_SCARCE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EMFILE, errno.ENFILE, errno.ENOMEM})
_AWAY = frozenset(
    {
        errno.EROFS, errno.EIO, errno.ENODEV, errno.ENXIO, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH,
        errno.ENETUNREACH, errno.ENETDOWN, errno.ENOTCONN, errno.ENOLCK, errno.ECONNREFUSED, errno.ECONNRESET,
        errno.ECONNABORTED, errno.ESHUTDOWN, errno.EREMOTEIO, errno.EAGAIN,
    }
)  # fmt: skip
_REFUSED = frozenset(
    {
        errno.EPERM, errno.EACCES, errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST, errno.EBUSY, errno.ESTALE,
        errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EMLINK, errno.EXDEV, errno.EUCLEAN,
        errno.EBADMSG, errno.EOPNOTSUPP, errno.ETXTBSY, errno.ENOKEY, errno.EKEYEXPIRED,
    }
)  # fmt: skip
_KINDS = {Kind.SCARCE: _SCARCE, Kind.AWAY: _AWAY, Kind.REFUSED: _REFUSED}


def kind_of(error: BaseException) -> Kind | None:
    """None for what nobody foresaw."""
    if not isinstance(error, OSError):
        return None
    return next((kind for kind, numbers in _KINDS.items() if error.errno in numbers), None)


def in_words(error: BaseException) -> str | None:
    """The same sentence for the same trouble; None where `kind_of` says None."""
    kind = kind_of(error)
    if kind is None or not isinstance(error, OSError):
        return None
    named = isinstance(error.filename, str) and not error.filename.startswith("/proc/self/fd/")
    where = error.filename if named else "a file of the volume, or of the node"
    ends = "is put right" if kind is Kind.REFUSED else "ends"
    return f"{where}: {os.strerror(error.errno or 0)}; the call can be repeated once that {ends}"
