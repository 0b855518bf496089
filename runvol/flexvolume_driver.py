"""`runvol-flexvolume`: what kubelet executes for each call.

kubelet reads standard output and error as one JSON object, and waits for ever. So both go to the log from the first
line on, the work is done in a child, and when its time is over the parent answers and leaves it behind: a thread that
hangs in the kernel would keep a process from ending.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import select
import signal
import sys
import time
from collections.abc import Sequence

from runvol.entry import open_descriptors

_LOG = "/var/log/runvol/flexvolume.log"
_LOG_LIMIT = 2 << 20
_GRACE = 5.0
_LARGEST_REPLY = 64 << 10
_LONGEST_CALL = 3600.0
_USUAL = "100"
INIT = ('{"status": "Success", "capabilities": {"attach": false, "fsGroup": false, "selinuxRelabel": false, '
         '"supportsMetrics": false, "requiresFSResize": true}}')  # fmt: skip


def main() -> None:
    """The console script."""
    open_descriptors()
    out = os.dup(1)
    os.set_inheritable(out, False)
    log = _open_log(os.environ.get("RUNVOL_FLEXVOLUME_LOG", _LOG))
    os.dup2(log, 1)
    os.dup2(log, 2)
    words = sys.argv[1:]
    started = time.monotonic()
    # init is asked at every change of the plugin directory, also by the controller manager, which has no node.
    text = INIT if words == ["init"] else _in_child(words, out)
    heard = True
    try:
        _write_all(out, text.encode() + b"\n")
    except OSError as error:
        heard = False
        with contextlib.suppress(OSError):
            os.write(log, f"nobody heard the reply: {error.strerror}\n".encode())
    _note(log, words, text, time.monotonic() - started)
    os._exit(0 if heard and json.loads(text)["status"] == "Success" else 1)


def _in_child(words: Sequence[str], out: int) -> str:
    reading, writing = os.pipe()
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        # kubelet reads until nobody has its pipe open any more.
        os.close(out)
        os.close(reading)
        os.setsid()
        _write_all(writing, _work(words, parent).encode())
        os._exit(0)
    os.close(writing)
    try:
        until = time.monotonic() + _limit() + _GRACE
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: _interrupted())
        text = b""
        while len(text) < _LARGEST_REPLY:
            ready, _, _ = select.select([reading], [], [], max(0.0, until - time.monotonic()))
            if not ready:
                return _failure(f"the call did not end within {_limit() + _GRACE:.0f} s; it goes on in process {child}")
            part = os.read(reading, _LARGEST_REPLY)
            if not part:
                break
            text += part
    except InterruptedError as error:
        return _failure(str(error))
    finally:
        os.close(reading)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(child, 0)
    return text.decode() if _is_reply(text) else _failure("the driver ended without a whole reply; see its log")


def _is_reply(text: bytes) -> bool:
    try:
        return json.loads(text)["status"] in ("Success", "Failure", "Not supported")
    except (ValueError, TypeError, KeyError):
        return False


def _interrupted() -> None:
    raise InterruptedError("the call was interrupted by a signal; it may still end by itself")


def _limit() -> float:
    try:
        said = float(os.environ.get("RUNVOL_FLEXVOLUME_CALL_SECONDS", _USUAL))
    except ValueError:
        said = float(_USUAL)
    return max(1.0, min(said, _LONGEST_CALL)) if math.isfinite(said) else float(_USUAL)


def _write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]


def _failure(message: str) -> str:
    return json.dumps({"status": "Failure", "message": message})


def _work(words: Sequence[str], parent: int) -> str:
    """The reply's text, whatever happens. Nothing is begun for a caller that has gone: it may have come again since."""
    # The process ends with the call: what its imports make is not worth looking through for garbage.
    gc.disable()
    try:
        from runvol import config

        loaded = config.load()
        name = os.environ.get("RUNVOL_FLEXVOLUME_NAME") or os.path.basename(sys.argv[0])
        run_dir = loaded.text("paths.run_dir")
        if os.getppid() != parent:
            return _failure("the caller has gone")
        answer = _of_plugin(words, name, os.path.join(run_dir, "flexvolume.sock"))
        if answer:
            return answer
        from blockdev import Deadline
        from flexvolume import Driver
        from runvol import assembly

        directory = os.path.join(assembly.records(loaded), "flexvolume")
        driver = Driver(assembly.build(loaded, check_patience=_limit()), directory=directory, name=name)
        reply = driver.answer(words, Deadline.after(_limit()))
        return json.dumps(reply.document())
    except Exception as error:
        import traceback

        from runvol import troubles

        if (said := troubles.sentence(error)) is not None:
            return _failure(said[:4096])
        # Only where it happened: the values in it may hold a secret.
        where = traceback.extract_tb(error.__traceback__)[-1]
        what = str(error)[:4096]
        return _failure(f"{type(error).__name__} in {os.path.basename(where.filename)}:{where.lineno}: {what}")


def _of_plugin(words: Sequence[str], name: str, path: str) -> str:
    """The reply of the node plugin, which has everything loaded; empty if it is not there or ends in the middle.

    Every call may be repeated, so what it began is then finished alone.
    """
    import socket

    request = json.dumps({"version": 1, "words": list(words), "name": name, "seconds": _limit()})
    text = b""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.connect(path)
            connection.settimeout(_limit() + _GRACE)
            connection.sendall(request.encode())
            connection.shutdown(socket.SHUT_WR)
            while part := connection.recv(_LARGEST_REPLY):
                text += part
        return text.decode() if isinstance(json.loads(text), dict) else ""
    except (OSError, ValueError):
        return ""


def _open_log(path: str) -> int:
    """The log, or nowhere if it cannot be written: kubelet must not read a word of it."""
    try:
        os.makedirs(os.path.dirname(path), mode=0o750, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            if os.stat(path).st_size > _LOG_LIMIT:
                os.rename(path, f"{path}.1")
        # A FIFO that nobody reads is an error then, and not a wait.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
        return os.open(path, flags, 0o640)
    except OSError:
        return os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)


def _note(log: int, words: Sequence[str], text: str, seconds: float) -> None:
    """One line: the call, its target, what came of it. Options are left out, as they may hold secrets."""
    call = words[0][:40] if words else "(none)"
    target = words[1] if call in ("mount", "unmount") and len(words) > 1 else ""
    when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    facts = {"time": when, "call": call, "target": target[:4096], "ms": round(seconds * 1000)}
    line = json.dumps(facts | json.loads(text))
    with contextlib.suppress(OSError):
        os.write(log, line.encode() + b"\n")


if __name__ == "__main__":
    main()
