"""What is said of an export that cannot be mounted."""

from __future__ import annotations

import errno
import os

import pytest

from blockdev import Deadline, MountFailed, isolated, nfs


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENODEV, "no NFS client; load its module"),
        (errno.ENOENT, "the server exports no such path"),
        (errno.EPROTONOSUPPORT, "set vers"),
        (errno.EIO, "Input/output error"),
    ],
)
def test_the_kernels_word_has_its_meaning(monkeypatch: pytest.MonkeyPatch, number: int, words: str) -> None:
    def refused(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(isolated, "mount", refused)
    monkeypatch.setattr(nfs, "probe", lambda *_, **__: "192.0.2.2")
    export = nfs.Export(server="192.0.2.1", path="/exp", version="4.1")
    with pytest.raises(MountFailed, match=words):
        nfs.mount(export, "/nowhere", Deadline.after(5))
