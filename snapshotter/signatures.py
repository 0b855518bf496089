"""Ed25519 signatures over what a shared image is: the keys' files, and the file that carries content and signatures.

`manifest.signed` is lines: one that names the format, one that is the content, and one for each signature (`ed25519`,
the key's short name, the signature in base64). A signature covers the first two lines as they stand in the file, and
the second one is what is parsed then. Nothing else in the file is believed.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import errno
import hashlib
import os
import re
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from blockdev import durable
from snapshotter.errors import BadRequest

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

_FORMAT = b"runvol image manifest 1"
_ALGORITHM = "ed25519"
# More than so many signatures are not looked at.
_MOST = 16
_LARGEST_KEY = 16 << 10
_NAME = re.compile(rb"[0-9a-f]{16}\Z")


@dataclass(frozen=True, kw_only=True)
class PublicKey:
    """32 bytes, with the short name that stands beside its signatures."""

    raw: bytes

    @property
    def name(self) -> str:
        return hashlib.sha256(self.raw).hexdigest()[:16]

    def verifies(self, signature: bytes, signed: bytes) -> bool:
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

        try:
            Ed25519PublicKey.from_public_bytes(self.raw).verify(signature, signed)
        except InvalidSignature:
            return False
        return True


class PrivateKey:
    """What signs."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.public = PublicKey(raw=key.public_key().public_bytes_raw())

    def sign(self, signed: bytes) -> bytes:
        return self._key.sign(signed)


@dataclass(frozen=True, kw_only=True)
class Envelope:
    """A file of signatures as it was read: the content's bytes, and (key's name, signature) pairs."""

    content: bytes
    signatures: tuple[tuple[str, bytes], ...]

    @property
    def signed(self) -> bytes:
        return _signed(self.content)

    def signer(self, keys: Iterable[PublicKey]) -> PublicKey | None:
        """Which of the keys has signed it."""
        for key in keys:
            for name, signature in self.signatures:
                if name == key.name and key.verifies(signature, self.signed):
                    return key
        return None


def seal(content: bytes, key: PrivateKey, others: Sequence[tuple[str, bytes]] = ()) -> bytes:
    """The file with this content, signed by `key` and by others who signed this very content before."""
    kept = [(name, signature) for name, signature in others if name != key.public.name]
    lines = [_FORMAT, content]
    for name, signature in [(key.public.name, key.sign(_signed(content))), *kept][:_MOST]:
        lines.append(f"{_ALGORITHM} {name} {base64.b64encode(signature).decode()}".encode())
    return b"\n".join(lines) + b"\n"


def _signed(content: bytes) -> bytes:
    return _FORMAT + b"\n" + content + b"\n"


def unseal(raw: bytes) -> Envelope:
    """Content and signatures; neither is verified. ValueError for anything else."""
    lines = raw.split(b"\n")
    if len(lines) < 2 or lines[0] != _FORMAT:
        raise ValueError(f"it does not begin with {_FORMAT.decode()!r}")
    found = []
    for line in lines[2 : 2 + _MOST]:
        words = line.split(b" ")
        if len(words) == 3 and words[0] == _ALGORITHM.encode() and _NAME.match(words[1]):
            with contextlib.suppress(binascii.Error):
                found.append((words[1].decode(), base64.b64decode(words[2], validate=True)))
    return Envelope(content=lines[1], signatures=tuple(found))


# -- keys' files ------------------------------------------------------------------------------------------------------


def make_key(path: str) -> tuple[PrivateKey, str]:
    """A new private key in the file `path` (mode 0600) and its public one beside, and the latter's path.

    A private key that is there already is never replaced: BadRequest, unless its public one is missing (an earlier call
    was interrupted), which is written then.
    """
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    public = f"{path}.pub"
    if os.path.lexists(public):
        raise BadRequest("FILE", path, f"{public} exists already, and no key is replaced; choose another name")
    if os.path.lexists(path):
        key = private_key(path)
    else:
        made = Ed25519PrivateKey.generate()
        pem = made.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
                                 serialization.NoEncryption())  # fmt: skip
        _write_new(path, pem, 0o600)
        key = PrivateKey(made)
    _write_new(public, _pem(key.public), 0o644)
    return key, public


def _write_new(path: str, content: bytes, mode: int) -> None:
    try:
        durable.write(path, content, mode=mode)
        durable.sync_directory(os.path.dirname(path) or ".")
    except OSError as error:
        raise BadRequest("FILE", path, f"cannot be written: {error.strerror}") from None


def _pem(key: PublicKey) -> bytes:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    public = Ed25519PublicKey.from_public_bytes(key.raw)
    return public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def private_key(path: str) -> PrivateKey:
    """The key in this file (PEM, PKCS 8). BadRequest for none, and for one that others than its owner can read."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    try:
        facts = os.stat(path)
        if stat.S_ISREG(facts.st_mode) and facts.st_mode & 0o077:
            raise BadRequest("--key", path, "others than its owner can read it; chmod 600, or make a new key")
        raw = durable.read(os.path.realpath(path), _LARGEST_KEY)
    except OSError as error:
        raise BadRequest("--key", path, f"cannot be read: {_why(error)}") from None
    try:
        key = serialization.load_pem_private_key(raw, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise BadRequest("--key", path, "holds no Ed25519 private key without a password; `runvol images keygen FILE`")
    return PrivateKey(key)


def public_key(path: str) -> PublicKey:
    """The key in this file (PEM). ValueError says what is wrong with it."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        if os.stat(path).st_mode & 0o022:
            raise ValueError("others than its owner can write it; chmod go-w")
        raw = durable.read(os.path.realpath(path), _LARGEST_KEY)
    except OSError as error:
        raise ValueError(f"cannot be read: {_why(error)}") from None
    try:
        key = serialization.load_pem_public_key(raw)
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PublicKey):
        raise ValueError("holds no Ed25519 public key")
    return PublicKey(raw=key.public_bytes_raw())


def _why(error: OSError) -> str:
    return "it is no regular file" if error.errno in durable.NO_RECORD else error.strerror or errno.errorcode[errno.EIO]
