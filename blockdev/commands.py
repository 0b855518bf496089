"""The one place that runs programs: argument lists, never a shell, and always with an end."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import resource
import shutil
import signal
import subprocess
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from blockdev.deadlines import Deadline
from blockdev.errors import CommandFailed, CommandMissing, WaitExpired

if TYPE_CHECKING:
    import sh

_PR_SET_PDEATHSIG = 1
# Bytes that are read at a time, and more chunks of them than anything says.
_CHUNK, _ALL = 1 << 14, 1 << 20
_SEARCH = ["/usr/sbin", "/sbin", "/usr/bin", "/bin", "/usr/local/sbin", "/usr/local/bin"]
_ENVIRONMENT = {"PATH": ":".join(_SEARCH), "LC_ALL": "C"}
# Seconds in which a program that was killed has to go; one that hangs in the kernel is left behind.
_GOING = 2.0
# What ends with this process, and does not begin after it: $0 is this process. No value is ever part of these words.
_ONLY_WITH = '[ "$PPID" = "$0" ] && exec "$@"'
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a program may use, in bytes of address space and seconds of a processor; of what it says the last so many
    bytes are kept."""

    memory: int
    cpu: int
    output: int = 64 << 10


def _before(parent: int | None, limits: Limits | None, outlive: int | None) -> None:
    """In the child. A mkfs must not go on after the process that ordered it was killed, nor start after that."""
    if outlive is not None:
        os.set_inheritable(outlive, True)  # in the child: the program has it through its exec
    if limits is not None:
        resource.setrlimit(resource.RLIMIT_AS, (limits.memory, limits.memory))
        resource.setrlimit(resource.RLIMIT_CPU, (limits.cpu, limits.cpu + 1))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if parent is not None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


@functools.cache
def _path(program: str) -> str:
    found = shutil.which(program, path=":".join([*_SEARCH, *os.environ.get("PATH", "").split(":")]))
    if found is None:
        raise CommandMissing(program)
    return found


@functools.cache
def _begun_by() -> tuple[str, ...]:
    """util-linux's program that has a program end with who began it; empty where there is another of that name."""
    setpriv = shutil.which("setpriv", path=_ENVIRONMENT["PATH"])
    if setpriv is None:
        return ()
    known = subprocess.run([setpriv, "--help"], capture_output=True, text=True, check=False, env=_ENVIRONMENT)
    return (setpriv, "--pdeathsig", "KILL", "--", "/bin/sh", "-c", _ONLY_WITH) if "pdeathsig" in known.stdout else ()


def _spawned(program: str, arguments: tuple[str, ...], deadline: Deadline, ok: tuple[int, ...]) -> tuple[int, str]:
    """`run` without a copy of this process: a fork of it costs three times what such a program does (its page tables,
    and each page that is written to meanwhile), and a new volume takes several programs."""
    words = [*_begun_by(), str(os.getpid()), _path(program), *arguments]
    running = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               env=_ENVIRONMENT, start_new_session=True)  # fmt: skip
    try:
        output, _ = running.communicate(timeout=max(0.05, deadline.remaining()))
    except BaseException as error:
        running.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            running.wait(_GOING)
        if running.stdout is not None:
            running.stdout.close()
        if isinstance(error, subprocess.TimeoutExpired):
            raise WaitExpired(program, deadline.given) from None
        raise
    text, code = output.decode("utf-8", "replace"), running.returncode
    if code not in ok:
        raise CommandFailed(program, code, text)
    return code, text


@functools.cache
def _command(program: str) -> sh.Command:
    import sh

    return sh.Command(_path(program))


def run(
    program: str,
    *arguments: str,
    deadline: Deadline,
    ok: tuple[int, ...] = (0,),
    outlive: int | None = None,
    limits: Limits | None = None,
) -> tuple[int, str]:
    """Run `program`; the exit status and its output, both streams in one text.

    It dies with this process, except with `outlive`, for what must not be interrupted in the middle: an open
    descriptor of the device, which the program inherits, so that it is seen to hold the device from its fork to its
    end, whatever becomes of this process.

    Raises CommandFailed for a status that is not in `ok`, CommandMissing, or WaitExpired after the
    program was killed.
    """
    deadline.check(program)
    if outlive is None and limits is None and _begun_by():
        return _spawned(program, arguments, deadline, ok)
    # Loaded when the first such program is run: most processes never run one.
    import sh

    expired = threading.Event()
    running = _command(program)(
        *arguments,
        _bg=True,
        _bg_exc=False,
        _ok_code=list(range(256)),
        _err_to_out=True,
        _tty_out=False,
        _env=_ENVIRONMENT,
        _preexec_fn=functools.partial(_before, os.getpid() if outlive is None else None, limits, outlive),
        _pass_fds=set() if outlive is None else {outlive},
        _new_session=True,
        _out_bufsize=_CHUNK,
        # How many chunks are kept, the last ones: of who reads what others have written, no more than that.
        _internal_bufsize=_ALL if limits is None else max(1, limits.output // _CHUNK),
        _no_pipe=True,
    )

    def stop() -> None:
        expired.set()
        running.kill()

    # sh's own _timeout looks only every 100 ms, which each short program would pay.
    watchdog = threading.Timer(max(0.05, deadline.remaining()), stop)
    watchdog.daemon = True
    watchdog.start()
    try:
        running.wait()
    except sh.SignalException as error:
        if expired.is_set():
            raise WaitExpired(program, deadline.given) from None
        raise CommandFailed(program, error.exit_code, str(error.stdout, "utf-8", "replace")) from None
    finally:
        watchdog.cancel()
    output = str(running.stdout, "utf-8", "replace")
    if running.exit_code not in ok:
        raise CommandFailed(program, running.exit_code, output)
    return int(running.exit_code), output
