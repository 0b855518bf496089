"""Who owns a volume on this node: one record a volume, changed under a lock that holds between processes.

CSI, FlexVolume, NRI and `gc` are different processes; this record is their only way to know and to change an
owner. It lies among the records of this boot (`guestmount.boot`), so a reboot forgets it together with everything that
it speaks of. Hand-off files are made from it and never read back as the truth, but where it was lost or damaged.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator

import msgspec

from blockdev import Deadline, durable, flocks, nfs
from guestmount.device_index import DeviceIndex
from guestmount.errors import TROUBLE, BadRequest, Busy, ClaimDamaged, Refused
from guestmount.handed_marks import HandedMarks
from volumes import VOLUME_ID, AccessMode, Capability, VolumeKind

log = logging.getLogger("runvol.claims")

# What this process has too little of says nothing of a record.
_OF_THIS_MOMENT = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR)
# The kernels that may own a volume; one whose record was lost may be either.
HOST, SANDBOX, UNKNOWN = "host", "sandbox", "unknown"
# A record takes whole blocks, so that it can be changed where it stands.
_BLOCK = 4096
_FULL = (errno.ENOSPC, errno.EDQUOT)
# Seconds after which kubelet would have come again.
_COMES_AGAIN = 150.0
# Bytes of a record; of a volume with thousands of targets.
_LARGEST = 16 << 20
# Seconds in which one call after the other finds out whether there is a place: each reads the records.
_JUDGING = 10.0
_NO_WRITES = (*_FULL, errno.EROFS, errno.EIO)


class Use(msgspec.Struct, frozen=True, kw_only=True):
    """The capability that the volume was staged with."""

    mode: str
    raw: bool = False
    fstype: str = ""
    mount_flags: tuple[str, ...] = ()

    @classmethod
    def of(cls, capability: Capability, fstype: str) -> Use:
        return cls(mode=capability.mode.value, raw=capability.raw, fstype=fstype, mount_flags=capability.mount_flags)

    @property
    def access_mode(self) -> AccessMode:
        return AccessMode(self.mode)

    def serves(self, asked: Capability) -> bool:
        """Whether a volume that was staged so can be published as asked."""
        # A provisioner fills a filesystem's type in by itself, also for a volume that has none.
        same_fstype = not self.fstype or asked.fstype in ("", self.fstype)
        return asked.raw == self.raw and same_fstype and asked.mode.value == self.mode

    def __str__(self) -> str:
        kind = "raw block" if self.raw else f"filesystem {self.fstype}, options [{len(self.mount_flags)}]"
        return f"{self.access_mode}, {kind}"


class Owner(msgspec.Struct, frozen=True, kw_only=True):
    """The kernel that has the volume: the host's, or that of one pod's guest."""

    kind: str
    pod_uid: str = ""
    pod_namespace: str = ""
    pod_name: str = ""
    handler: str = ""
    dialect: str = ""

    def is_same_kernel(self, other: Owner) -> bool:
        """Whether both are the host's kernel, or that of one pod's guest."""
        return self.kind == other.kind and (self.kind == HOST or self.pod_uid == other.pod_uid)

    def __str__(self) -> str:
        if self.kind == HOST:
            return "the host's kernel (runc pods)"
        if self.kind == UNKNOWN:
            return f"a pod whose runtime is not known since its record was lost ({self.pod_name or self.pod_uid})"
        pod = f"pod {self.pod_namespace}/{self.pod_name}" if self.pod_name else f"pod {self.pod_uid}"
        return f"{pod} (runtime handler {self.handler or 'not known'})"


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """One publish, by the path that kubelet gave. `way`: how the volume reached it; empty in records that older
    releases wrote."""

    read_only: bool
    pod_uid: str
    pod_namespace: str = ""
    pod_name: str = ""
    mount_group: str = ""
    handler: str = ""
    dialect: str = ""
    way: str = ""
    # The record was lost: what kubelet's repeated publish says is filled in.
    made_again: bool = False
    # The guest's agent gives the files to the mount group, so that the host need not mount them.
    group_in_guest: bool = False
    # Which of Kata's shims serves the pod; empty where that is not known.
    shim: str = ""
    # The shim takes no file, so a loop device stands between.
    on_node: bool = False

    @property
    def pod(self) -> str:
        return f"{self.pod_namespace}/{self.pod_name}" if self.pod_name else self.pod_uid


class NfsMount(msgspec.Struct, frozen=True, kw_only=True):
    """What the kernel, the host's or a guest's, is told to mount."""

    server: str
    path: str
    version: str
    options: tuple[str, ...] = ()
    # What a guest cannot find out by itself: the server's address as a number, and for version 3 its mountd's port.
    address: str = ""
    mount_port: int = 0

    @property
    def export(self) -> nfs.Export:
        return nfs.Export(server=self.server, path=self.path, version=self.version, options=self.options)

    def is_same(self, other: NfsMount) -> bool:
        """Whether both are one export, in one version and with the same options."""
        return self.export == other.export

    def __str__(self) -> str:
        options = f", options {','.join(self.options)}" if self.options else ""
        return f"{self.export.source} (NFS {self.version}{options})"


class Claim(msgspec.Struct, frozen=True, kw_only=True):
    """The whole record.

    `staging_path` is empty from an unstage until the last user has let go.
    `prepared`: the owner's filesystem was checked, grown and given its group. `proved`: the kernel agreed to the
    last release. `device`: the loop device that stands between, where the owner needs a node. A volume of files
    (`kind`) has no owner, since any number of kernels may have it; each of its targets names its handler. `made_again`:
    the record was lost; where the volume is staged and as what is filled in by the next stage. `handed_out`: it is
    noted with the volume that a guest, or a pod itself, may write its bytes.
    """

    volume: str
    source: str
    staging_path: str
    use: Use
    owner: Owner | None = None
    targets: dict[str, Target] = {}
    prepared: bool = False
    proved: bool = False
    device: str = ""
    kind: VolumeKind = VolumeKind.BLOCK
    nfs: NfsMount | None = None
    made_again: bool = False
    handed_out: bool = False
    version: int = 1

    def but(self, **changes: object) -> Claim:
        """A copy with some fields changed."""
        return msgspec.structs.replace(self, **changes)

    def group_of(self, target: Target) -> str:
        """The group that the volume's files are given for a target; empty where it only reads."""
        return "" if target.read_only or "ro" in self.use.mount_flags else target.mount_group

    @property
    def lingers(self) -> bool:
        """Everything was taken back, but the last user (a guest's VMM, a process, another mount namespace) had not let
        go yet.
        """
        return self.owner is not None and not self.targets


class Cell:
    """One volume's record while its lock is held."""

    def __init__(self, path: str, temporary: str, claim: Claim | None, *, held: Callable[[], bool]) -> None:
        """`temporary`: what the names begin with under which it is written. `claim`: as it is in the record, or counts
        as. `held`: whether the lock is still ours."""
        self._path, self._temporary, self._held = path, temporary, held
        self._volume = os.path.basename(path).removesuffix(".json")
        self._devices = DeviceIndex(os.path.dirname(os.path.dirname(path)))
        self.claim = claim

    def has_another(self, device: str) -> bool:
        """Whether another volume's claim names this loop device, for targets that it still has.

        Somebody has then unbound it, and its number is anybody's, while a hand-off or a bound node speaks of it.
        """
        volume = self._devices.volume_of(device)
        if not volume:
            return False
        path = os.path.join(os.path.dirname(self._path), f"{volume}.json")
        if path == self._path:
            return False
        try:
            other = _read(path)
        except (ClaimDamaged, OSError):
            return True
        return other is not None and other.device == device and bool(other.targets)

    @property
    def present(self) -> Claim:
        """The claim of a volume that must have one."""
        if self.claim is None:
            raise Refused("the volume's claim has vanished; stage the volume again")
        return self.claim

    def write(self, claim: Claim) -> Claim:
        """Replace the record, whole or not at all. What is no longer than it was can be written to a full disk too."""
        self._be_alone()
        content = _encoded(claim)
        # First: a device that its index does not know could be given to another volume's pod.
        old = self.claim.device if self.claim is not None else ""
        if claim.device != old:
            self._devices.note(self._volume, claim.device)
        try:
            self._replace(content)
        except OSError as error:
            if error.errno not in _FULL or not _overwritten(self._path, content):
                raise
        if claim.device != old:
            self._devices.forget(self._volume, old)
        self.claim = claim
        return claim

    def _be_alone(self) -> None:
        """Busy where the lock's file was taken away (an emptied `/run`): somebody else may have a new one."""
        if not self._held():
            raise Busy(self._volume)

    def less(self, claim: Claim) -> Claim:
        """As `write`, for a claim that says less than the record. A disk that takes no writes holds up no pod's end:
        what the record says too much then is proved anew, and forgotten, by whoever needs to know."""
        try:
            return self.write(claim)
        except OSError as error:
            self._bear(error)
            self.claim = claim
            return claim

    def _bear(self, error: OSError) -> None:
        if error.errno not in _NO_WRITES:
            raise error
        log.warning("a claim says more than is true, until its disk takes writes", extra={"why": str(error)})

    def _replace(self, content: bytes) -> None:
        try:
            durable.replace(self._path, content, beside=self._temporary, synced=False)
        except FileNotFoundError:
            for place in (self._path, self._temporary):
                os.makedirs(os.path.dirname(place), mode=0o700, exist_ok=True)
            durable.replace(self._path, content, beside=self._temporary, synced=False)

    def remove(self) -> None:
        """No record, nor what a killed process was writing of it: that was the lock's holder before us. As for `less`,
        a disk that takes no writes is borne."""
        self._be_alone()
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path)
            with contextlib.suppress(FileNotFoundError):
                durable.sweep(self._temporary, abandoned=True)
        except OSError as error:
            self._bear(error)
        if self.claim is not None:
            self._devices.forget(self._volume, self.claim.device)
        self.claim = None


def _encoded(claim: Claim) -> bytes:
    content = msgspec.json.encode(claim)
    return content.ljust(-(-len(content) // _BLOCK) * _BLOCK)


def _overwritten(path: str, content: bytes) -> bool:
    """Whether the record could be written where it stands: that takes no block of a disk that has no more."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        if os.fstat(fd).st_size != len(content):
            return False
        return os.pwrite(fd, content, 0) == len(content)  # one call, which no signal ends in the middle
    except OSError:
        return False
    finally:
        os.close(fd)


def _read(path: str) -> Claim | None:
    try:
        return msgspec.json.decode(durable.read(path, _LARGEST), type=Claim)
    except FileNotFoundError:
        return None
    except (msgspec.MsgspecError, UnicodeDecodeError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in durable.NO_RECORD:
            raise  # that a disk, or this process, cannot read it now says nothing of the record
        raise ClaimDamaged(
            f"the claim {path} cannot be read ({error}); it is made again with the next call for its volume"
        ) from error


class Claims:
    """The records of a node, under `<records>/claims`, with their locks under `run_dir`.

    `patience`: seconds to wait for one that another call has. `records` is `run_dir` where it is not given.
    """

    def __init__(self, run_dir: str, records: str = "", *, patience: float = 0.0) -> None:
        self._run_dir, self._records, self._patience = run_dir, records or run_dir, patience
        self._directory = os.path.join(self._records, "claims")
        self._locks, self._turns = os.path.join(run_dir, "locks"), os.path.join(run_dir, "turns")
        self._places_given = os.path.join(run_dir, "places")
        self._temporary = os.path.join(self._records, "tmp")
        # What is known of a volume without its claim; who can look sets it.
        self.remake: Callable[[str], Claim | None] | None = None
        self._seen: dict[str, tuple[tuple[int, ...], Claim | Refused | None]] = {}
        self._waiting = Waiting()
        self.handed = HandedMarks(run_dir)

    @property
    def directory(self) -> str:
        """Where the records lie."""
        return self._directory

    def patient(self, seconds: float) -> Claims:
        """The same records for callers that cannot be told to come again soon."""
        other = Claims(self._run_dir, self._records, patience=seconds)
        other.remake, other._waiting = self.remake, self._waiting
        return other

    def waited(self, volume_id: str) -> float:
        """Seconds for which somebody else has come again and again for the volume's record, in this process."""
        return self._waiting.seconds(volume_id)

    @contextlib.contextmanager
    def locked(self, volume_id: str, deadline: Deadline, *, ending: bool = False) -> Iterator[Cell]:
        """The volume's record, ours alone until the block ends; Busy if another has it for longer than our patience.

        `ending`: for who takes a pod's volume back; a record that can neither be read nor made again is none to him.

        The lock is a flock, so that a process that is killed lets go. The lock's file goes with the record.
        """
        with self._held(self._locks, volume_id, deadline) as (path, fd):
            held = functools.partial(flocks.is_still, fd, path)
            cell = self._cell(volume_id, held, ending=ending)
            try:
                yield cell
            finally:
                if cell.claim is None:
                    _unlink_if(held, path)

    def remember(self, cell: Cell, volume_id: str) -> Claim | None:
        """The claim; where there is none, or one that nobody owns although a hand-off stands (an older one of itself),
        made again from what stands. For calls that would take a volume that nobody has."""
        old = cell.claim
        doubtful = old is None or (old.owner is None and self.handed.may_be(volume_id))
        made = self.remake(volume_id) if doubtful and self.remake is not None else None
        if made is not None and (old is None or made.targets.keys() - old.targets.keys()):
            log.warning("a lost claim is made again", extra={"volume": volume_id, "owner": str(made.owner)})
            cell.write(made if old is None else told(old, made))
        return cell.claim

    def _places(self, volume_id: str) -> tuple[str, str]:
        return (
            os.path.join(self._directory, f"{volume_id}.json"),
            os.path.join(self._temporary, f"{volume_id}."),
        )

    def _cell(self, volume_id: str, held: Callable[[], bool], *, ending: bool) -> Cell:
        path, temporary = self._places(volume_id)
        try:
            return Cell(path, temporary, _read(path), held=held)
        except (ClaimDamaged, OSError) as error:
            if isinstance(error, OSError) and (not ending or error.errno in _OF_THIS_MOMENT):
                raise
            made = None
            aside = os.path.join(self._records, "damaged", volume_id)
            try:
                if self.remake is None:
                    raise
                made = self.remake(volume_id)
                if isinstance(error, OSError):
                    raise  # the record may be whole: it stays
                _lay_aside(path, aside)
                if made is not None:
                    durable.replace(path, _encoded(made), beside=temporary, synced=False)
            except TROUBLE as trouble:
                if not ending:
                    raise
                log.error("a claim that can be neither read nor made again is passed over at a pod's end",
                          extra={"why": str(trouble)})  # fmt: skip
                return Cell(path, temporary, made, held=held)
            said = {"volume": volume_id, "why": str(error), "aside": aside, "made_again": made is not None}
            log.error("a damaged claim is laid aside", extra=said)
        return Cell(path, temporary, _read(path), held=held)

    @contextlib.contextmanager
    def turn(self, volume_id: str, deadline: Deadline) -> Iterator[None]:
        """The only call of several verbs for the volume until the block ends; Busy as in `locked`, which goes inside.

        Between stage and publish another call would find the volume unused, and let it go.
        """
        with self._held(self._turns, volume_id, deadline) as (path, fd):
            try:
                yield
            finally:
                _unlink_if(functools.partial(flocks.is_still, fd, path), path)

    @contextlib.contextmanager
    def placed(
        self, group: str, volume_id: str, judge: Callable[[frozenset[str]], None], deadline: Deadline
    ) -> Iterator[None]:  # fmt: skip
        """The volume has a place in the group until the block ends, by when its record says so. Busy as in `locked`.

        `judge` is told the other volumes that are about to have one, reads the records of those that do, and raises if
        there is none left; one call at a time is judged. A process that is killed has no place any more.
        """
        _check(volume_id)
        short = hashlib.sha256(group.encode(errors="surrogateescape")).hexdigest()[:16]
        judging, own = (os.path.join(self._places_given, name) for name in (short, f"{short}-{volume_id}"))
        os.makedirs(self._places_given, mode=0o700, exist_ok=True)
        with _taken(judging, volume_id, min(deadline.remaining(), _JUDGING)):
            names = (name.partition("-") for name in os.listdir(self._places_given))
            others = {other for first, _, other in names if first == short} - {volume_id, ""}
            judge(frozenset(one for one in others if self._is_placed(short, one)))
            given = contextlib.ExitStack()
            given.enter_context(_taken(own, volume_id, 0.0))
        with given:
            yield

    def _is_placed(self, short: str, volume_id: str) -> bool:
        path = os.path.join(self._places_given, f"{short}-{volume_id}")
        if flocks.taken(path):
            return True
        with contextlib.suppress(OSError):
            os.unlink(path)  # a killed process's: only who is judged makes one, and that is us
        return False

    @contextlib.contextmanager
    def _held(self, directory: str, volume_id: str, deadline: Deadline) -> Iterator[tuple[str, int]]:
        _check(volume_id)
        path = os.path.join(directory, volume_id)
        try:
            fd = flocks.take(path, min(deadline.remaining(), self._patience))
        except FileNotFoundError:
            os.makedirs(directory, mode=0o700, exist_ok=True)
            fd = flocks.take(path, min(deadline.remaining(), self._patience))
        if fd is None:
            self._waiting.came(volume_id)
            raise Busy(volume_id)
        self._waiting.served(volume_id)
        try:
            yield path, fd
        finally:
            flocks.release(fd)

    def peek(self, volume_id: str) -> Claim | None:
        """The record as it is now, without the lock: for showing, never for deciding."""
        _check(volume_id)
        return _read(os.path.join(self._directory, f"{volume_id}.json"))

    def unworked(self, volume_id: str) -> Claim | None:
        """As `peek`, but Busy while somebody works on the volume: for a look that makes and holds nothing. OSError."""
        claim = self.peek(volume_id)
        if flocks.taken(os.path.join(self._locks, volume_id)):
            raise Busy(volume_id)
        return claim

    def all(self) -> list[Claim]:
        """Every record, by volume. Refused, naming the file, if one cannot be read."""
        found, damaged = self.readable()
        if damaged:
            raise damaged[0]
        return found

    def known(self) -> tuple[list[Claim], list[Refused]]:
        """As `readable`, but only what has changed since the last call is read: for who is asked often, among many."""
        seen: dict[str, tuple[tuple[int, ...], Claim | Refused | None]] = {}
        for name in _names(self._directory):
            if not name.endswith(".json"):
                continue
            path = os.path.join(self._directory, name)
            try:
                facts = os.stat(path)
            except FileNotFoundError:
                continue
            except OSError:
                seen[name] = (), _tried(path)
                continue
            stamp = facts.st_ino, facts.st_mtime_ns, facts.st_ctime_ns
            before = self._seen.get(name)
            if before is None or before[0] != stamp:
                one = _tried(path)
                # That it could not be read in that moment is no property of the record.
                lasting = not isinstance(one, Refused) or isinstance(one, ClaimDamaged)
                before = (stamp if lasting else ()), one
            seen[name] = before
        self._seen = seen
        return _parted(one for _stamp, one in seen.values())

    def readable(self) -> tuple[list[Claim], list[Refused]]:
        """Every record that can be read, by volume, and what is wrong with the others."""
        names = sorted(name for name in _names(self._directory) if name.endswith(".json"))
        return _parted(_tried(os.path.join(self._directory, name)) for name in names)

    def sweep(self) -> None:
        """Remove what a killed process was writing; and find claims by their loop devices, older ones too."""
        devices = DeviceIndex(self._records)
        for claim in self.readable()[0]:
            if claim.targets and claim.device and devices.volume_of(claim.device) != claim.volume:
                with contextlib.suppress(OSError):
                    devices.note(claim.volume, claim.device)
        for name in _names(self._temporary):
            path = os.path.join(self._temporary, name)
            with contextlib.suppress(FileNotFoundError):
                if time.time() - os.stat(path).st_mtime > 60:
                    os.unlink(path)


def told(old: Claim, made: Claim) -> Claim:
    """A claim that is older than what stands, of which `made` was made."""
    return old.but(
        owner=made.owner,
        targets={**made.targets, **old.targets},
        device=made.device,
        prepared=old.prepared or made.prepared,
        made_again=True,
    )


class Waiting:
    """Who has come for a record that somebody else had, and comes again."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # When each volume was first asked for in vain, and last.
        self._asked: dict[str, tuple[float, float]] = {}

    def came(self, volume_id: str) -> None:
        now = time.monotonic()
        with self._lock:
            first, last = self._asked.get(volume_id, (now, now))
            self._asked[volume_id] = (first if now - last < _COMES_AGAIN else now), now

    def served(self, volume_id: str) -> None:
        with self._lock:
            self._asked.pop(volume_id, None)

    def seconds(self, volume_id: str) -> float:
        now = time.monotonic()
        with self._lock:
            first, last = self._asked.get(volume_id, (now, now))
        return now - first if now - last < _COMES_AGAIN else 0.0


@contextlib.contextmanager
def _taken(path: str, volume_id: str, seconds: float) -> Iterator[None]:
    """A lock whose file goes with it. Busy."""
    fd = flocks.take(path, seconds)
    if fd is None:
        raise Busy(volume_id)
    try:
        yield
    finally:
        _unlink_if(functools.partial(flocks.is_still, fd, path), path)
        flocks.release(fd)


def _unlink_if(held: Callable[[], bool], path: str) -> None:
    """A lock's file goes with its holder; one that was taken away from it may be another's by now."""
    with contextlib.suppress(FileNotFoundError):
        if held():
            os.unlink(path)


def _lay_aside(path: str, aside: str) -> None:
    """What lies at `path` lies at `aside`, whatever either was; one of each volume is kept."""
    for old in (aside, path):
        try:
            os.makedirs(os.path.dirname(aside), mode=0o700, exist_ok=True)
            os.rename(path, aside)
            return
        except OSError as error:
            log.warning("a damaged record is in the way", extra={"path": old, "why": str(error.strerror)})
            durable.clear(old)
    if os.path.lexists(path):
        raise ClaimDamaged(f"the claim {path} cannot be read, and can be neither moved nor removed")


def _tried(path: str) -> Claim | Refused | None:
    try:
        return _read(path)
    except Refused as error:
        return error
    except OSError as error:
        return Refused(f"the claim {path} cannot be read: {error.strerror}")


def _parted(tried: Iterable[Claim | Refused | None]) -> tuple[list[Claim], list[Refused]]:
    found, damaged = list[Claim](), list[Refused]()
    for one in tried:
        if isinstance(one, Claim):
            found.append(one)
        elif one is not None:
            damaged.append(one)
    return found, damaged


def _names(directory: str) -> list[str]:
    """Nothing is made by who only looks."""
    try:
        return os.listdir(directory)
    except FileNotFoundError:
        return []


def _check(volume_id: str) -> None:
    if not VOLUME_ID.match(volume_id):
        raise BadRequest("volume_id", volume_id, "must be 1 to 128 of a-z, 0-9, '-' and '.', as CreateVolume gave it")
