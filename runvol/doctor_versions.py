"""`runvol doctor` for versions and the clock: what runvol was tried with, whose release differs, what time it is."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from email.utils import parsedate_to_datetime

from blockdev import BlockdevError, Deadline
from blockdev.commands import run
from guestmount import KubernetesApi, containerd_version, drivers
from guestmount.errors import Refused
from guestmount.pods import PodUnknown
from guestmount.runtimes import in_root
from runvol import assembly, version
from runvol.config import Config
from runvol.diagnosis import Diagnosis, broken, good, unknown, warning

# What each has to be at least, and the last one that runvol was tried with; docs/doctor.md has them too.
KERNEL = (5, 12), (6, 18)
E2FSPROGS = (1, 45), (1, 47)
CONTAINERD = (1, 6), (2, 4)
KATA = (2, 4), (4, 1)
_KATA_SAYS = "/opt/kata/VERSION"
# Seconds: of one question, and by how much a clock may be off without and with harm (tokens and certificates).
_ASKING, _OFF, _HARMFUL = 3.0, 5.0, 60.0
_FUTURE = 60.0

_Range = tuple[tuple[int, int], tuple[int, int]]


def examine(config: Config, *, on_node: bool) -> Iterator[Diagnosis]:
    yield judged("kernel", os.uname().release, KERNEL)
    yield _e2fsprogs()
    if on_node:
        yield _containerd(config)
        yield from _kata(config)
    yield from _skew(config)


def judged(subject: str, said: str, known: _Range) -> Diagnosis:
    """By the first two numbers of what the program says."""
    found = re.search(r"(\d+)\.(\d+)", said)
    if found is None:
        return unknown("doctor.not-looked", f"version of {subject}", f"{said!r} is no version")
    number, (least, most) = (int(found[1]), int(found[2])), known
    of, text = f"version of {subject}", ".".join
    if number < least:
        finding = f"is {said}, and runvol takes {text(map(str, least))} or later"
        return broken("versions.too-old", of, finding, f"install {subject} {text(map(str, least))} or later")
    if number > most:
        return warning("versions.untried", of, f"is {said}; the last one that runvol was tried with is "
                       f"{text(map(str, most))}")  # fmt: skip
    return good("versions.known", of, said)


def _e2fsprogs() -> Diagnosis:
    try:
        _, said = run("mkfs.ext4", "-V", deadline=Deadline.after(_ASKING))
    except (BlockdevError, OSError) as error:
        return unknown("doctor.not-looked", "version of e2fsprogs", str(error))
    found = re.search(r"mke2fs (\S+)", said)
    return judged("e2fsprogs", found[1] if found else said.strip(), E2FSPROGS)


def _containerd(config: Config) -> Diagnosis:
    taken = assembly.places(config).taken()
    try:
        return judged("containerd", str(containerd_version.detect(taken, config.text("paths.host_root"))), CONTAINERD)
    except Refused as error:
        why = str(error).partition("; say --")[0]
        return unknown("doctor.not-looked", "version of containerd", why, "start containerd, then ask again")


def _kata(config: Config) -> Iterator[Diagnosis]:
    """Only of a release that was unpacked to /opt/kata: a package's version nobody else tells."""
    try:
        with open(in_root(_KATA_SAYS, config.text("paths.host_root"))) as file:
            said = file.read(100).strip()
    except OSError:
        return
    yield judged("Kata", said, KATA)


def _skew(config: Config) -> Iterator[Diagnosis]:
    """The services of this node that tell their release, against this command's."""
    from csi import server

    own, others = version(), {}
    for name, key in ((drivers.NODES, "csi.endpoint"), (drivers.NFS, "csi.nfs_endpoint")):
        if config.text(key) and (said := server.version_at(server.socket_path(config.text(key)))):
            others[name] = said
    wrong = {name: said for name, said in others.items() if said != own}
    if wrong:
        told = ", ".join(f"{name} is {said}" for name, said in wrong.items())
        yield warning("versions.skew", "releases of runvol", f"{told}, and this command {own}")
    elif others:
        yield good("versions.known", "releases of runvol", f"{', '.join(others)}: {own}, as this command")


def clock(config: Config, api: KubernetesApi | None) -> Iterator[Diagnosis]:
    if api is not None:
        yield from _against(api)
    yield from _stamps(config)


def _against(api: KubernetesApi) -> Iterator[Diagnosis]:
    """The server's Date has whole seconds; what the question took counts for the doubt."""
    try:
        access = api.account()
        connection = access.connection(_ASKING)
        try:
            before = time.time()
            connection.request("GET", "/version", headers=access.headers())
            said = connection.getresponse().getheader("Date")
            after = time.time()
        finally:
            connection.close()
        theirs = parsedate_to_datetime(said or "").timestamp()
    except (OSError, ValueError, TypeError, PodUnknown):
        return  # that it does not answer is told where it is asked
    early, late = before - (theirs + 1), theirs - after
    off = max(early, late)
    if off <= _OFF:
        yield good("clock.well", "clock", "agrees with the API server's")
        return
    which = f"{off:.0f} seconds {'ahead of' if early > late else 'behind'} the API server's"
    told = broken if off > _HARMFUL else warning
    yield told("clock.off", "clock", f"is {which}")


def _stamps(config: Config) -> Iterator[Diagnosis]:
    """What runvol itself wrote last on this node."""
    state, now = config.text("paths.state_dir"), time.time()
    for name in ("volumes.db", "volumes.db-wal", "directories.db", "answers"):
        try:
            ahead = os.stat(os.path.join(state, name)).st_mtime - now
        except OSError:
            continue
        if ahead > _FUTURE:
            yield warning("clock.future", "clock", f"{os.path.join(state, name)} was written "
                          f"{ahead / 3600:.1f} hours in the future", "set the clock right, then "
                          f"`touch {os.path.join(state, name)}`")  # fmt: skip
            return
