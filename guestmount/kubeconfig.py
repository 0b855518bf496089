"""A kubeconfig as it resolves: read by the `kubernetes` package in a process of its own, which ends with the answer.

The many ways to authenticate are the package's own; it takes 45 MiB and up to seconds to import, which a process that
runs on every node, and a publish, cannot afford. `python -m guestmount.kubeconfig FILE PARENT` prints the answer as
JSON.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from blockdev import deadlines

# Seconds. Who is asked for credentials (`exec`) may ask a network.
_LONGEST = 30.0
# Bytes of each stream that are kept.
_MOST = 4 << 20
_PR_SET_PDEATHSIG = 1


class Unusable(Exception):
    """What is wrong with the file, in words."""


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """`server` with its scheme; `token` as the header takes it; `authority`, `certificate` and `key` in PEM."""

    server: str
    token: str = ""
    verify: bool = True
    server_name: str = ""
    proxy: str = ""
    authority: str = ""
    certificate: str = ""
    key: str = ""


class Kubeconfig:
    """The file, read again where it or a file that it names was changed: behind, since that takes a while."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._known: Resolved | None = None
        self._trouble = ""
        self._named: tuple[str, ...] = ()
        self._stamps: tuple[tuple[int, ...], ...] = ()
        self._reading: threading.Event | None = None

    def begin(self) -> threading.Event | None:
        """Have it read unless what is known is still so; set when that has ended. None where nothing is to do."""
        with self._lock:
            if self._reading is not None:
                return self._reading
            stamps = _stamps(self._path, self._named)
            if self._known is not None and stamps == self._stamps:
                return None
            return self._begun(stamps)

    def refused(self, used: Resolved) -> threading.Event | None:
        """The server refuses what was `used`: have it read anew, unless that was done since."""
        with self._lock:
            if self._reading is not None:
                return self._reading
            if self._known is not used:
                return None
            return self._begun(_stamps(self._path, self._named))

    def _begun(self, stamps: tuple[tuple[int, ...], ...]) -> threading.Event:
        done = threading.Event()
        reader = threading.Thread(target=self._read, args=(stamps, done), name="kubeconfig", daemon=True)
        try:
            deadlines.started("reading the kubeconfig", reader)
        except deadlines.NoThread as error:  # of this moment: the next who asks begins it
            self._trouble = str(error)
            done.set()
            return done
        self._reading = done
        return done

    def _read(self, stamps: tuple[tuple[int, ...], ...], done: threading.Event) -> None:
        try:
            found, named, trouble = *_asked(self._path), ""
        except Unusable as error:
            found, named, trouble = None, (), str(error)
        except Exception as error:
            found, named, trouble = None, (), f"{type(error).__name__}: {error}"
        with self._lock:
            if found is not None:
                # What changed while it was read shows as another stamp the next time.
                self._known, self._named = found, named
                self._stamps = stamps if len(stamps) == 1 + len(named) else _stamps(self._path, named)
            self._trouble, self._reading = trouble, None
        done.set()

    def resolved(self, seconds: float) -> Resolved:
        """As it is known; waits so long for the first reading, and for none after it. Unusable, with the reason."""
        reading = self.begin()
        if self._known is None and reading is not None:
            reading.wait(seconds)
        if self._known is None:
            raise Unusable(self._trouble or f"it is still being read after {seconds:.0f} s")
        return self._known


def _stamps(path: str, named: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
    return tuple(_stamp(one) for one in (path, *named))


def _stamp(path: str) -> tuple[int, ...]:
    try:
        facts = os.stat(path)
    except OSError:
        return ()
    return facts.st_ino, facts.st_mtime_ns, facts.st_size


def _asked(path: str) -> tuple[Resolved, tuple[str, ...]]:
    """In a process of its own; nothing secret stands among its arguments."""
    command = [sys.executable, "-P", "-m", "guestmount.kubeconfig", os.path.abspath(path), str(os.getpid())]
    # Nothing of the caller's directory is looked at, and what the file starts (`exec`) ends with its reader.
    reader = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd="/",
        start_new_session=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(os.path.isabs, sys.path))},
    )  # fmt: skip
    killer = threading.Timer(_LONGEST, _kill, [reader.pid])
    killer.daemon = True
    killer.start()
    try:
        # Its end is waited for without taking it: until then its group's number is nobody else's.
        said, complaint = _both(reader)
        os.waitid(os.P_PID, reader.pid, os.WEXITED | os.WNOWAIT)
    finally:
        late = not killer.is_alive()
        killer.cancel()
        _kill(reader.pid)
        reader.wait()
    if late:
        raise Unusable(f"reading it took longer than {_LONGEST:.0f} s")
    if reader.returncode != 0:
        lines = complaint.decode("utf-8", "replace").strip().splitlines()
        raise Unusable(lines[-1] if lines else f"its reader ended with status {reader.returncode}")
    answer = json.loads(said)
    return Resolved(**answer["resolved"]), tuple(answer["named"])


def _both(reader: subprocess.Popen[bytes]) -> tuple[bytes, bytes]:
    """What it says on both of its streams, until it, and all that it has started, have closed them."""
    said: dict[int, bytes] = {}
    with selectors.DefaultSelector() as open_streams:
        for stream in filter(None, (reader.stdout, reader.stderr)):
            open_streams.register(stream, selectors.EVENT_READ)
            said[stream.fileno()] = b""
        while open_streams.get_map():
            for key, _ in open_streams.select():
                some = os.read(key.fd, 65536)
                said[key.fd] += some[: max(0, _MOST - len(said[key.fd]))]
                if not some:
                    open_streams.unregister(key.fileobj)
    first, second = said.values()
    for stream in filter(None, (reader.stdout, reader.stderr)):
        stream.close()
    return first, second


def _kill(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def _end_with_parent() -> None:
    """In the reader: it ends, with what it has started, when the process that asked is gone, and at the latest soon."""
    libc = ctypes.CDLL(None, use_errno=True)
    signal.signal(signal.SIGTERM, lambda *_: os.killpg(0, signal.SIGKILL))
    signal.signal(signal.SIGALRM, lambda *_: os.killpg(0, signal.SIGKILL))
    signal.alarm(int(_LONGEST) + 5)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(sys.argv[2]):
        sys.exit("the process that asked is gone")


def _named_files(path: str) -> Iterator[str]:
    """Files that the kubeconfig names, whose content is replaced beside it (kubelet's certificates, tokens)."""
    import yaml

    with open(path, encoding="utf-8") as file:
        document = yaml.safe_load(file)
    if not isinstance(document, dict):
        return
    for kind, inner in (("clusters", "cluster"), ("users", "user")):
        for entry in document.get(kind) or ():
            facts = entry.get(inner) if isinstance(entry, dict) else None
            for key in ("certificate-authority", "client-certificate", "client-key", "tokenFile"):
                name = facts.get(key) if isinstance(facts, dict) else None
                if isinstance(name, str) and name:
                    yield os.path.join(os.path.dirname(os.path.abspath(path)), name)


def _resolve(path: str) -> dict[str, Any]:
    import yaml
    from kubernetes import client, config

    settings: Any = client.Configuration()
    try:
        config.load_kube_config(path, client_configuration=settings)  # type: ignore[no-untyped-call]
        named = list(_named_files(path))
    except (config.ConfigException, yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        sys.exit(" ".join(str(error).split()))
    token = next((one["value"] for one in settings.auth_settings().values() if one["key"] == "authorization"), "")
    if not token and settings.username:
        token = settings.get_basic_auth_token()
    found = Resolved(
        server=settings.host,
        token=token or "",
        verify=bool(settings.verify_ssl),
        server_name=settings.tls_server_name or "",
        proxy=settings.proxy or "",
        authority=_text(settings.ssl_ca_cert),
        certificate=_text(settings.cert_file),
        key=_text(settings.key_file),
    )
    return {"resolved": asdict(found), "named": named}


def _text(path: str | None) -> str:
    if not path:
        return ""
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        sys.exit(f"{path}: {error}")


if __name__ == "__main__":
    _end_with_parent()
    json.dump(_resolve(sys.argv[1]), sys.stdout)
