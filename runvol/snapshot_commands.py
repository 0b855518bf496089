"""The commands about root filesystems: the snapshotter, its snapshots, its pool."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import click
import msgspec

from blockdev import Deadline, daemon
from blockdev.deadlines import bounded
from blockdev.devicemapper import Mapper
from runvol import endpoints, pool_absence, schemas, tables, troubles
from runvol.cli import Loader, as_json_option
from runvol.config import Config
from runvol.containerd_commands import containerd_config
from runvol.diagnosis import BROKEN, OK, WARNING
from runvol.gauge_place import gauge_path
from runvol.options import SIZE
from runvol.serve_snapshots import limits, state_dir
from runvol.sizes import words
from snapshotter import assembly, backing, names, quarantine
from snapshotter.assembly import Wish
from snapshotter.backing import Backing
from snapshotter.errors import PoolRefused, Unavailable, WrongState
from snapshotter.extending import Extender
from snapshotter.gauge import Gauge
from snapshotter.model import Kind, Snapshot
from snapshotter.pool import Pool
from snapshotter.store import Store, existing, found

if TYPE_CHECKING:
    from snapshotter.repairing import Report

_CALL = 300.0
_LOOKING = 3.0


@click.group(invoke_without_command=True, short_help="Serve containerd's snapshots service.")
@click.option("--endpoint", metavar="URL", help="The socket to serve, unix:///…/snapshotter.sock.")
@click.option("--pool", "pool_name", metavar="NAME", help="Refuse to start on another pool than this.")
@click.pass_context
def snapshotter(context: click.Context, endpoint: str | None, pool_name: str | None) -> None:
    """Serve containerd's snapshots service; containerd-config puts it into containerd's file."""
    load: Loader = context.obj
    if context.invoked_subcommand is not None:
        context.obj = lambda **more: load(**({"snapshotter.endpoint": endpoint} | more))
        return
    from runvol import serve_snapshots

    serve_snapshots.serve(load(**{"snapshotter.endpoint": endpoint}), pool_name)


snapshotter.add_command(containerd_config)


def _store(config: Config) -> Store:
    return existing(state_dir(config))


@click.command(short_help="List container snapshots (containerd's).")
@as_json_option
@click.pass_obj
def snapshots(load: Loader, as_json: bool) -> None:
    """List container snapshots, which containerd keeps images and root filesystems in, and their devices. Volume
    snapshots are listed by `runvol volumes snapshots`."""
    with troubles.looking(troubles.LOOKING):
        items = [_snapshot(row) for page in _store(load()).pages() for row in page]
    columns: tables.Columns[schemas.ContainerSnapshot] = [
        "key", "kind", ("size", lambda it: words(it.size_bytes)), "fstype", "device", "parent",
    ]  # fmt: skip
    tables.show(schemas.ContainerSnapshot, items, columns, as_json=as_json, empty="no container snapshots")


def _snapshot(row: Snapshot) -> schemas.ContainerSnapshot:
    return schemas.ContainerSnapshot(
        key=row.key,
        kind=row.kind.name.lower(),
        state=row.state.name.lower(),
        size_bytes=row.size,
        fstype=row.fstype,
        device=row.device or None,
        image=row.image or None,
        parent=row.parent or None,
        created=schemas.time_of(row.created / 1e9),
        labels=dict(row.labels),
    )


@click.group(short_help="Make, watch and mend the thin pool.")
def pool() -> None:
    """Make, watch and mend the thin pool that root filesystems lie in."""


@pool.command("init", short_help="Make a pool, and describe it.")
@click.option("--pool", "name", default="runvol", show_default=True, metavar="NAME", help="The pool's name.")
@click.option("--device", default="", metavar="PATH", help="A whole block device; it must be blank.")
@click.option(
    "--metadata-device",
    default="",
    metavar="PATH",
    help="A blank one for the metadata; without it --device is split, at a little cost of each request.",
)
@click.option("--vg", "group", default="", metavar="GROUP", help="An LVM volume group that has --size free.")
@click.option("--loop", "directory", default="", metavar="DIR", help="Two files in this directory, for trials.")
@click.option("--size", type=SIZE, default=0, metavar="SIZE", help="Of the data, for --vg and --loop: bytes, or 10Gi.")
@click.option("--metadata-size", type=SIZE, default=0, metavar="SIZE",
              help="Of the metadata; without it, chosen from --size.")  # fmt: skip
@click.option("--block-size", "block", type=SIZE, default="64Ki", show_default=True, metavar="SIZE",
              help="What the pool gives out at once.")  # fmt: skip
@click.option(
    "--force-wipe",
    multiple=True,
    metavar="NAME",
    help="Wipe this, whatever it holds: the name of --device or --metadata-device as it is given, GROUP/VOLUME, or the "
    "path of a file. Not while it is used.",
)
@as_json_option
@click.pass_obj
def pool_init(load: Loader, /, block: int, force_wipe: tuple[str, ...], as_json: bool, **wish: str) -> None:
    """Make a pool and describe it; it is assembled from that at each start."""
    config = load()
    asked = Wish(name=wish["name"], device=wish["device"], metadata_device=wish["metadata_device"],
                 group=wish["group"], directory=wish["directory"],
                 size=int(wish["size"]), metadata_size=int(wish["metadata_size"]), block=block,
                 force_wipe=force_wipe)  # fmt: skip
    with Mapper() as mapper:
        made = assembly.init(mapper, state_dir(config), asked, Deadline.after(_CALL))
        item = _assembled(config, made, block)
    if as_json:
        tables.print_json(schemas.Pool, [item])
        return
    tables.line(f"made pool {item.pool}: {_size(item.data_total_bytes)} of data, "
                f"{_size(item.metadata_total_bytes)} of metadata")  # fmt: skip


def _size(count: int | None) -> str | None:
    return None if count is None else words(count)


@pool.command("adopt", short_help="Take over a thin pool that is there.")
@click.option(
    "--pool", "name", default="", metavar="NAME", help="Its name; without it, what the pool tells, or runvol."
)
@click.option("--device", default="", metavar="PATH", help="The device of the data, or of both.")
@click.option("--metadata-device", default="", metavar="PATH", help="The device of the metadata.")
@click.option("--vg", "group", default="", metavar="GROUP", help="The volume group, with --data and --metadata.")
@click.option("--data", "data_volume", default="", metavar="LV", help="The logical volume of the data, a plain one.")
@click.option("--metadata", "metadata_volume", default="", metavar="LV", help="That of the metadata.")
@click.option("--loop", "directory", default="", metavar="DIR", help="Where `pool init --loop` made a pool's files.")
@click.option("--data-file", default="", metavar="FILE", help="The file of the data, with --metadata-file.")
@click.option("--metadata-file", default="", metavar="FILE", help="That of the metadata.")
@click.option("--metadata-size", type=SIZE, default=0, metavar="SIZE",
              help="Of the metadata, where --device is split.")  # fmt: skip
@as_json_option
@click.pass_obj
def pool_adopt(load: Loader, /, metadata_size: int, as_json: bool, **given: str) -> None:
    """Take over a thin pool that is there: runvol's own whose description is lost, or one that others made."""
    from snapshotter import adopting

    config = load()
    name, data, metadata = given["name"], given["data_volume"], given["metadata_volume"]
    if given["directory"]:
        data, metadata = (os.path.join(given["directory"], f"{name or 'runvol'}.{one}") for one in ("data", "metadata"))
    elif given["group"] and not data and not metadata:
        data, metadata = (f"{name or 'runvol'}_{one}" for one in ("data", "meta"))
    claim = adopting.Claim(name=name, device=given["device"], metadata_device=given["metadata_device"],
                           group=given["group"], data=data or given["data_file"],
                           metadata=metadata or given["metadata_file"], metadata_size=metadata_size)  # fmt: skip
    with Mapper() as mapper:
        done = adopting.adopt(mapper, state_dir(config), claim, Deadline.after(3600))
    if done.own:
        said = (f"pool {done.name} is described again, under its own identity; if its store is lost too: "
                "`runvol pool repair-store`")  # fmt: skip
    else:
        said = (f"adopted pool {done.name}; {done.quarantined} devices that others made are quarantined "
                "(`runvol pool quarantine`)")  # fmt: skip
    _tell("adopted", "pool", done.name, said, as_json)


def _tell(action: str, what: str, name: str, message: str, as_json: bool, *, done: bool = True) -> None:
    one = schemas.Outcome(action=action, what=what, name=name, done=done, message=message)
    tables.tell([one], as_json=as_json)


def _description(config: Config) -> backing.Description:
    found = backing.load(state_dir(config))
    if found is None:
        raise PoolRefused(f"no pool is described in {state_dir(config)}; make one with `runvol pool init`")
    return found


@pool.command("status", short_help="Tell how full the pool is, and if it is well.")
@as_json_option
@click.pass_obj
def pool_status(load: Loader, as_json: bool) -> None:
    """Tell how full the pool is, and whether it is well. Status 1 if it is broken, or not assembled."""
    with troubles.looking():
        config = load()
        it = _description(config)
        with Mapper() as mapper:
            if pool_absence.is_assembled(mapper, it):
                one = Pool(mapper, it.name, it.identity, it.metadata, limits(config))
                one.remedies = backing.remedies(it)
                item = _assembled(config, one, it.block)
                if pool_absence.stays_suspended(mapper, it.name):
                    said = (f"pool {it.name} {pool_absence.SUSPENDED}; `systemctl restart runvol-snapshotter` resumes "
                            "it")  # fmt: skip
                    found = [schemas.PoolFinding(state=BROKEN, finding=said), *item.findings]
                    item = msgspec.structs.replace(item, state=BROKEN, findings=found)
            else:
                why = pool_absence.why(mapper, state_dir(config), it)
                item = _of_store(config, it.name, f"pool {it.name} is not assembled: {why}")
    if as_json:
        tables.print_json(schemas.Pool, [item])
    else:
        _print_pool(item)
    if item.state == BROKEN:
        raise SystemExit(troubles.FOUND)


def _print_pool(item: schemas.Pool) -> None:
    facts: list[tuple[str, object]] = [("pool", item.pool), ("state", item.state)]
    if item.assembled:
        facts += [
            ("mode", item.mode),
            ("data", f"{_size(item.data_used_bytes)} of {_size(item.data_total_bytes)}"),
            ("metadata", f"{_size(item.metadata_used_bytes)} of {_size(item.metadata_total_bytes)}"),
            ("mapped devices", item.mapped_devices),
        ]
    facts += [("quarantined devices", len(item.quarantined_devices)), ("doomed devices", item.doomed_devices)]
    tables.definitions([(f"{key} = {tables.text(value)}", []) for key, value in facts])
    for one in item.findings:
        tables.say(f"{one.state}: {one.finding}")


def _of_store(config: Config, name: str, finding: str) -> schemas.Pool:
    """A pool that the kernel does not have: what its store knows."""
    store = found(state_dir(config))
    return schemas.Pool(
        pool=name, state=BROKEN, assembled=False, mode=None, data_used_bytes=None, data_total_bytes=None,
        metadata_used_bytes=None, metadata_total_bytes=None, generation=None, mapped_devices=None,
        quarantined_devices=list(store.quarantined()) if store else [],
        doomed_devices=store.count_doomed() if store else 0,
        findings=[schemas.PoolFinding(state=BROKEN, finding=finding)],
    )  # fmt: skip


def _assembled(config: Config, one: Pool, block: int) -> schemas.Pool:
    status = one.status()
    findings = [schemas.PoolFinding(state=it.state, finding=it.message) for it in one.health(status)]
    states = [it.state for it in findings]
    return msgspec.structs.replace(
        _of_store(config, one.name, ""),
        state=next((state for state in (BROKEN, WARNING) if state in states), OK),
        assembled=True,
        mode=status.mode,
        data_used_bytes=status.data_used * block,
        data_total_bytes=status.data_total * block,
        metadata_used_bytes=status.metadata_used * 4096,
        metadata_total_bytes=status.metadata_total * 4096,
        generation=str(status.transaction),
        mapped_devices=len(one.active()),
        findings=findings,
    )


@pool.command("extend", short_help="Make the pool larger while it is in use.")
@click.option(
    "--by",
    "more",
    type=SIZE,
    metavar="SIZE",
    help="Bytes, or 10Gi. Without it: what its device has grown by; else pool.autoextend_percent more.",
)
@click.option("--metadata", is_flag=True, help="The metadata instead of the data.")
@as_json_option
@click.pass_obj
def pool_extend(load: Loader, more: int | None, metadata: bool, as_json: bool) -> None:
    """Make the pool larger while it is in use. A device takes all that it has grown by."""
    config = load()
    if more is not None and more <= 0:
        raise click.BadParameter(f"{more}: a pool only grows", param_hint="--by")
    with Mapper() as mapper:
        one, below = assembly.assemble(mapper, state_dir(config), Deadline.after(_CALL), limits(config))
        extender = Extender(mapper, one, below)
        part, deadline = "metadata" if metadata else "data", Deadline.after(_CALL)
        if more is None:
            extender.extend_somehow(part, deadline)
        else:
            extender.extend(part, more, deadline)
        item = _assembled(config, one, below.description.block)
    if as_json:
        tables.print_json(schemas.Pool, [item])
        return
    total = _size(item.metadata_total_bytes if metadata else item.data_total_bytes)
    tables.line(f"pool {item.pool}: {total} of {part} now, {item.mode}")


@pool.command("check", short_help="Check the pool's metadata, or repair it.")
@click.option("--repair", is_flag=True, help="Clear the mark, or rebuild the metadata; nothing may use the pool.")
@as_json_option
@click.pass_obj
def pool_check(load: Loader, repair: bool, as_json: bool) -> None:
    """Check the pool's metadata; with --repair, put them right. Status 1 if they are damaged."""
    config = load()
    with troubles.looking():
        it = _description(config)
    if repair:
        with Mapper() as mapper:
            said = assembly.repair(mapper, state_dir(config), Deadline.after(3600))
        _tell("repaired", "pool", it.name, said, as_json)
        return
    wrong = _wrong_with(config, it)
    if wrong and not as_json:
        raise click.ClickException(wrong)
    _tell("checked", "pool", it.name, wrong or f"pool {it.name}: the metadata is sound", as_json, done=not wrong)
    raise SystemExit(troubles.FOUND if wrong else troubles.FINE)


def _wrong_with(config: Config, it: backing.Description) -> str:
    """What its metadata is like, if not sound; NotSeen where it cannot be looked at."""
    with troubles.looking(), Mapper() as mapper:
        try:
            if mapper.find(it.name) is None:
                metadata, _ = Backing(mapper, state_dir(config), it).attach(Deadline.after(_CALL))
                assembly.check_metadata(it.name, metadata, Deadline.after(_CALL))
            else:
                one, _ = assembly.assemble(mapper, state_dir(config), Deadline.after(_CALL))
                one.check_live(Deadline.after(_CALL))
        except Unavailable as error:
            return str(error)
    return ""


@pool.command("repair-store", short_help="Make a lost or old store again.")
@click.option("--keep", is_flag=True, help="The store is right as it stands; nothing is taken from the copy.")
@as_json_option
@click.pass_obj
def pool_repair_store(load: Loader, keep: bool, as_json: bool) -> None:
    """Make a store that is lost, or an old copy, one with its pool again; the snapshotter must be stopped."""
    from snapshotter import repairing

    config = load()
    with Mapper() as mapper:
        done = repairing.repair_store(mapper, state_dir(config), Deadline.after(_CALL), keep=keep)
    if as_json:
        items = [
            schemas.RepairedSnapshot(key=key, state=state)
            for state, keys in (("restored", done.restored), ("lost", done.lost))
            for key in keys
        ]
        tables.print_json(schemas.RepairedSnapshot, items)
        return
    for line in _repaired(done, keep=keep):
        tables.line(line)


def _repaired(done: Report, *, keep: bool) -> Iterator[str]:
    """What an operator reads, with the commands to be typed."""
    made = schemas.time_of(done.made / 1e9) if done.made else ""
    yield (f"{len(done.restored)} snapshots came back" + (f" from the copy of {made}" if made else "")
           + (f", {done.kept} are kept as they were" if keep else "")
           + f"; {len(done.quarantined)} devices stay quarantined (`runvol pool quarantine`)")  # fmt: skip
    if done.lost:
        yield ("Gone with their devices. Where containerd still knows one (others it removed itself), remove the "
               "containers on it, then make containerd forget it, in this order, and pull its image anew:")  # fmt: skip
        yield from (f"  {names.forgetting(key) or key}" for key in done.lost)
    if made:
        yield (f"What was made after {made} is not in the copy: its containers run on, but none starts from images of "
               "that time. For each namespace `ctr -n NAMESPACE images check --snapshotter runvol` says which are not "
               "unpacked any more: remove their containers, then them, and pull them again")  # fmt: skip


@pool.command("gauge", short_help="Show what kubelet sees of the pool's fill.")
@click.option("--remove", is_flag=True, help="Take it away, file and all; the snapshotter must be stopped.")
@as_json_option
@click.pass_obj
def pool_gauge(load: Loader, remove: bool, as_json: bool) -> None:
    """Show what the filesystem says that is as full as the pool, for kubelet and what watches the node."""
    config = load()
    path, state = gauge_path(config), state_dir(config)
    gauge = Gauge(path, state)
    if remove:
        if daemon.is_taken(endpoints.path(config, "snapshotter.endpoint")):
            raise WrongState("the snapshotter runs, and would make the gauge again: stop it first, or set "
                             "snapshotter.gauge to an empty text and restart it")  # fmt: skip
        gauge.be_absent()
        _tell("removed", "gauge", path, "no gauge is there", as_json)
        return
    items = []
    if path:
        with troubles.looking():
            shown = bounded(f"looking at {path}", Deadline.after(_LOOKING), gauge.shown)
        items = [schemas.Gauge(path=path, size_bytes=shown.total, available_bytes=shown.available)]
    columns: tables.Columns[schemas.Gauge] = [
        "path", ("size", lambda it: words(it.size_bytes)), ("available", lambda it: words(it.available_bytes)),
    ]  # fmt: skip
    empty = "snapshotter.gauge is empty: there is none"
    tables.show(schemas.Gauge, items, columns, as_json=as_json, empty=empty)


@pool.command("quarantine", short_help="List, free or adopt devices of nobody.")
@click.option("--free", multiple=True, type=int, metavar="ID", help="Delete this device and its data.")
@click.option("--free-all", is_flag=True, help="Delete all of them.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--adopt", type=int, metavar="ID", help="Make this device a snapshot; the snapshotter must be stopped.")
@click.option("--key", default="", metavar="KEY", help="Of --adopt: as `runvol snapshots` shows keys.")
@click.option("--parent", default="", metavar="KEY", help="Of --adopt: the snapshot that it was made of.")
@click.option("--committed", is_flag=True, help="Of --adopt: a layer that others may stand on, not an active one.")
@as_json_option
@click.pass_obj
def pool_quarantine(
    load: Loader, /, free: tuple[int, ...], free_all: bool, yes: bool, adopt: int | None, as_json: bool, **given: str
) -> None:
    """List devices of the pool that no container snapshot belongs to (the store was lost, or they are foreign), free
    or adopt them."""
    config = load()
    if adopt is not None:
        if free or free_all:
            raise click.UsageError("--adopt goes without --free")
        _adopt_device(config, adopt, given["key"], given["parent"], committed=bool(given["committed"]), as_json=as_json)
        return
    if given["key"] or given["parent"] or given["committed"]:
        raise click.UsageError("--key, --parent and --committed go with --adopt only")
    with troubles.looking():
        store = _store(config)
        there = store.quarantined()
    chosen = there if free_all else list(free)
    quarantine.check(store, chosen)
    if chosen:
        if not yes:
            click.confirm(f"Delete {len(chosen)} devices and their data?", abort=True, err=as_json)
        quarantine.free(state_dir(config), chosen, Deadline.after(_CALL))
        said = f"{len(chosen)} devices are deleted by the running snapshotter, or by its next start"
        if as_json:
            tables.tell([schemas.Outcome(action="doomed", what="device", name=str(one), done=True, message=said)
                         for one in chosen], as_json=True)  # fmt: skip
        else:
            tables.line(said)
        return
    with troubles.looking():
        items = _quarantined(config, there) if there else []
    columns: tables.Columns[schemas.PoolDevice] = [
        "device", ("exclusive", lambda it: _size(it.exclusive_bytes)), ("shared", lambda it: _size(it.shared_bytes)),
    ]  # fmt: skip
    tables.show(schemas.PoolDevice, items, columns, as_json=as_json, empty="nothing is quarantined")


def _quarantined(config: Config, devices: Sequence[int]) -> list[schemas.PoolDevice]:
    with Mapper() as mapper:
        one, _ = assembly.assemble(mapper, state_dir(config), Deadline.after(_CALL))
        used = one.mapped_bytes(Deadline.after(_CALL))
    found = [(it, *used.get(it, (None, None))) for it in devices]
    return [schemas.PoolDevice(device=it, exclusive_bytes=own, shared_bytes=shared) for it, own, shared in found]


def _adopt_device(config: Config, device: int, key: str, parent: str, *, committed: bool, as_json: bool) -> None:
    wanted = quarantine.Wanted(device=device, key=key, parent=parent, committed=committed)
    with Mapper() as mapper:
        row = quarantine.adopt(mapper, state_dir(config), wanted, Deadline.after(_CALL))
    said = f"device {device} is the {row.kind.name.lower()} snapshot {row.key!r}: {row.fstype}, {words(row.size)}"
    _tell("adopted", "device", str(device), said, as_json)


__all__ = ["Kind", "pool", "snapshots", "snapshotter"]
