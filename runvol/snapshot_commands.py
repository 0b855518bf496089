"""The commands about root filesystems: the snapshotter, its snapshots, its pool."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from blockdev import Deadline, daemon
from blockdev.deadlines import bounded
from blockdev.devicemapper import Mapper
from runvol import pool_absence, tables
from runvol.cli import Loader, as_json_option
from runvol.config import Config
from runvol.containerd_commands import containerd_config
from runvol.gauge_place import gauge_path
from runvol.serve_snapshots import limits, state_dir
from runvol.sizes import SIZE
from snapshotter import assembly, backing, names, quarantine
from snapshotter.assembly import Wish
from snapshotter.backing import Backing
from snapshotter.errors import BadRequest, PoolRefused, Unavailable, WrongState
from snapshotter.extending import Extender
from snapshotter.gauge import Gauge
from snapshotter.model import Kind
from snapshotter.pool import Pool
from snapshotter.store import STORE, Store, existing

if TYPE_CHECKING:
    from snapshotter.repairing import Report

_CALL = 300.0
_LOOKING = 3.0


@click.group(invoke_without_command=True)
@click.option("--endpoint", metavar="URL", help="unix:///…/snapshotter.sock")
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


@click.command()
@as_json_option
@click.pass_obj
def snapshots(load: Loader, as_json: bool) -> None:
    """List the snapshots and their devices."""
    store = _store(load())
    rows = [
        {
            "key": row.key,
            "kind": row.kind.name.lower(),
            "state": row.state.name.lower(),
            "size": tables.size(row.size),
            "size_bytes": row.size,
            "fstype": row.fstype,
            "device": row.device or "",
            "image": row.image,
            "parent": row.parent,
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(row.created / 1e9)),
            "labels": dict(row.labels),
        }
        for page in store.pages()
        for row in page
    ]
    tables.show(rows, ("key", "kind", "size", "fstype", "device", "parent"), as_json=as_json, empty="no snapshots")


@click.group()
def pool() -> None:
    """The thin pool that root filesystems lie in."""


@pool.command("init")
@click.option("--pool", "name", default="runvol", show_default=True, metavar="NAME")
@click.option("--device", default="", metavar="PATH", help="A whole block device; it must be blank.")
@click.option(
    "--metadata-device",
    default="",
    metavar="PATH",
    help="A blank one for the metadata; without it --device is split, at a little cost of each request.",
)
@click.option("--vg", "group", default="", metavar="GROUP", help="An LVM volume group with --size bytes free.")
@click.option("--loop", "directory", default="", metavar="DIR", help="Two files in this directory, for trials.")
@click.option("--size", type=SIZE, default=0, metavar="SIZE", help="Of the data, for --vg and --loop: 10Gi, or bytes.")
@click.option("--metadata-size", type=SIZE, default=0, metavar="SIZE", help="Chosen from --size without it.")
@click.option("--block-size", "block", type=SIZE, default=64 << 10, show_default=True, metavar="SIZE")
@click.option(
    "--force-wipe",
    multiple=True,
    metavar="NAME",
    help="Wipe this, whatever it holds: the name of --device or --metadata-device as it is given, GROUP/VOLUME, or the "
    "path of a file. Not while it is used.",
)
@click.pass_obj
def pool_init(load: Loader, /, block: int, force_wipe: tuple[str, ...], **wish: str) -> None:
    """Make a pool and describe it; it is assembled from that at each start."""
    config = load()
    asked = Wish(name=wish["name"], device=wish["device"], metadata_device=wish["metadata_device"],
                 group=wish["group"], directory=wish["directory"],
                 size=int(wish["size"]), metadata_size=int(wish["metadata_size"]), block=block,
                 force_wipe=force_wipe)  # fmt: skip
    with Mapper() as mapper:
        made = assembly.init(mapper, state_dir(config), asked, Deadline.after(_CALL))
        status = made.status()
    click.echo(f"made pool {made.name}: {tables.size(status.data_total * block)} of data, "
               f"{tables.size(status.metadata_total * 4096)} of metadata")  # fmt: skip


@pool.command("adopt")
@click.option("--pool", "name", default="", metavar="NAME", help="The pool's own, if it tells; else runvol.")
@click.option("--device", default="", metavar="PATH", help="The device of the data, or of both.")
@click.option("--metadata-device", default="", metavar="PATH", help="That of the metadata.")
@click.option("--vg", "group", default="", metavar="GROUP", help="The volume group, with --data and --metadata.")
@click.option("--data", "data_volume", default="", metavar="LV", help="A plain logical volume.")
@click.option("--metadata", "metadata_volume", default="", metavar="LV", help="Another one.")
@click.option("--loop", "directory", default="", metavar="DIR", help="Where `pool init --loop` made a pool's files.")
@click.option("--data-file", default="", metavar="FILE", help="A file, with --metadata-file.")
@click.option("--metadata-file", default="", metavar="FILE", help="Another one.")
@click.option("--metadata-size", type=SIZE, default=0, metavar="SIZE", help="Where --device is split.")
@click.pass_obj
def pool_adopt(load: Loader, /, metadata_size: int, **given: str) -> None:
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
        click.echo(f"pool {done.name} is described again, under its own identity; if its store is lost too: "
                   "`runvol pool repair-store`")  # fmt: skip
    else:
        click.echo(f"adopted pool {done.name}; {done.quarantined} devices that others made are quarantined "
                   "(`runvol pool quarantine`)")  # fmt: skip


def _description(config: Config) -> backing.Description:
    found = backing.load(state_dir(config))
    if found is None:
        raise PoolRefused(f"no pool is described in {state_dir(config)}; make one with `runvol pool init`")
    return found


@pool.command("status")
@as_json_option
@click.pass_obj
def pool_status(load: Loader, as_json: bool) -> None:
    """How full the pool is, and whether it is well; status 1 if it is not."""
    config = load()
    it = _description(config)
    with Mapper() as mapper:
        if not pool_absence.is_assembled(mapper, it):
            raise Unavailable(f"pool {it.name} is not assembled: {pool_absence.why(mapper, state_dir(config), it)}")
        one = Pool(mapper, it.name, it.identity, it.metadata, limits(config))
        one.remedies = backing.remedies(it)
        status = one.status()
        findings = one.health(status)
        mapped = len(one.active())
    there = os.path.exists(os.path.join(state_dir(config), STORE))
    quarantined = _store(config).quarantined() if there else []
    doomed = len(_store(config).doomed()) if there else 0
    rows = [
        {
            "pool": it.name,
            "state": finding.state,
            "mode": finding.mode,
            "data": f"{tables.size(status.data_used * it.block)} of {tables.size(status.data_total * it.block)}",
            "metadata": f"{tables.size(status.metadata_used * 4096)} of {tables.size(status.metadata_total * 4096)}",
            "mapped": mapped,
            "quarantined": len(quarantined),
            "doomed": doomed,
            "finding": finding.message,
            "data_used_bytes": status.data_used * it.block,
            "data_total_bytes": status.data_total * it.block,
            "metadata_used_bytes": status.metadata_used * 4096,
            "metadata_total_bytes": status.metadata_total * 4096,
            "generation": status.transaction,
            "quarantined_devices": quarantined,
        }
        for finding in findings
    ]
    columns = ("pool", "state", "data", "metadata", "mapped", "quarantined", "finding")
    tables.show(rows, columns, as_json=as_json, empty="")
    if any(finding.state == "broken" for finding in findings):
        raise SystemExit(1)


@pool.command("extend")
@click.option(
    "--by",
    "more",
    type=SIZE,
    metavar="SIZE",
    help="10Gi, or bytes. Without it: what its device has grown by; else pool.autoextend_percent more.",
)
@click.option("--metadata", is_flag=True, help="The metadata instead of the data.")
@click.pass_obj
def pool_extend(load: Loader, more: int | None, metadata: bool) -> None:
    """Make the pool larger while it is in use. A device takes all that it has grown by."""
    config = load()
    if more is not None and more <= 0:
        raise BadRequest("--by", more, "a pool only grows")
    with Mapper() as mapper:
        one, below = assembly.assemble(mapper, state_dir(config), Deadline.after(_CALL), limits(config))
        extender = Extender(mapper, one, below)
        part, deadline = "metadata" if metadata else "data", Deadline.after(_CALL)
        status = extender.extend_somehow(part, deadline) if more is None else extender.extend(part, more, deadline)
    total = status.metadata_total * 4096 if metadata else status.data_total * below.description.block
    click.echo(f"pool {one.name}: {tables.size(total)} of {'metadata' if metadata else 'data'} now, {status.mode}")


@pool.command("check")
@click.option("--repair", is_flag=True, help="Clear the mark, or rebuild the metadata; nothing may use the pool.")
@click.pass_obj
def pool_check(load: Loader, repair: bool) -> None:
    """Check the pool's metadata; with --repair, put it right."""
    config = load()
    with Mapper() as mapper:
        if repair:
            click.echo(assembly.repair(mapper, state_dir(config), Deadline.after(3600)))
            return
        it = _description(config)
        if mapper.find(it.name) is None:
            metadata, _ = Backing(mapper, state_dir(config), it).attach(Deadline.after(_CALL))
            assembly.check_metadata(it.name, metadata, Deadline.after(_CALL))
        else:
            one, _ = assembly.assemble(mapper, state_dir(config), Deadline.after(_CALL))
            one.check_live(Deadline.after(_CALL))
    click.echo(f"pool {it.name}: the metadata is sound")


@pool.command("repair-store")
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
        rows = [{"key": key, "state": state} for state, keys in (("restored", done.restored), ("lost", done.lost))
                for key in keys]  # fmt: skip
        tables.show(rows, ("key", "state"), as_json=True, empty="")
        return
    for line in _repaired(done, keep=keep):
        click.echo(line)


def _repaired(done: Report, *, keep: bool) -> Iterator[str]:
    """What an operator reads, with the commands to be typed."""
    made = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(done.made / 1e9)) if done.made else ""
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


@pool.command("gauge")
@click.option("--remove", is_flag=True, help="Take it away, file and all; the snapshotter must be stopped.")
@as_json_option
@click.pass_obj
def pool_gauge(load: Loader, remove: bool, as_json: bool) -> None:
    """What the filesystem shows that is as full as the pool, for kubelet and what watches the node."""
    config = load()
    path, state = gauge_path(config), state_dir(config)
    gauge = Gauge(path, state)
    if remove:
        if daemon.is_taken(config.text("snapshotter.endpoint").removeprefix("unix://")):
            raise WrongState("the snapshotter runs, and would make the gauge again: stop it first, or set "
                             "snapshotter.gauge to an empty text and restart it")  # fmt: skip
        gauge.be_absent()
        if not as_json:
            click.echo("no gauge is there")
        return
    rows = []
    if path:
        shown = bounded(f"looking at {path}", Deadline.after(_LOOKING), gauge.shown)
        rows = [{"path": path, "size": tables.size(shown.total), "available": tables.size(shown.available),
                 "size_bytes": shown.total, "available_bytes": shown.available}]  # fmt: skip
    tables.show(rows, ("path", "size", "available"), as_json=as_json, empty="snapshotter.gauge is empty: there is none")


@pool.command("quarantine")
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
    """List devices of the pool that no snapshot belongs to (the store was lost, or they are foreign), free or adopt
    them."""
    config = load()
    if adopt is not None:
        if free or free_all:
            raise BadRequest("--adopt", adopt, "goes without --free")
        _adopt_device(config, adopt, given["key"], given["parent"], committed=bool(given["committed"]))
        return
    if given["key"] or given["parent"] or given["committed"]:
        raise BadRequest("--key, --parent, --committed", "", "go with --adopt only")
    store = _store(config)
    there = store.quarantined()
    chosen = there if free_all else list(free)
    quarantine.check(store, chosen)
    if chosen:
        if not yes:
            click.confirm(f"Delete {len(chosen)} devices and their data?", abort=True)
        quarantine.free(state_dir(config), chosen, Deadline.after(_CALL))
        click.echo(f"{len(chosen)} devices are deleted by the running snapshotter, or by its next start")
        return
    rows = []
    if there:
        with Mapper() as mapper:
            one, _ = assembly.assemble(mapper, state_dir(config), Deadline.after(_CALL))
            used = one.mapped_bytes(Deadline.after(_CALL))
        rows = [{"device": one_id, "exclusive": tables.size(used.get(one_id, (0, 0))[0]),
                 "shared": tables.size(used.get(one_id, (0, 0))[1])} for one_id in there]  # fmt: skip
    tables.show(rows, ("device", "exclusive", "shared"), as_json=as_json, empty="nothing is quarantined")


def _adopt_device(config: Config, device: int, key: str, parent: str, *, committed: bool) -> None:
    wanted = quarantine.Wanted(device=device, key=key, parent=parent, committed=committed)
    with Mapper() as mapper:
        row = quarantine.adopt(mapper, state_dir(config), wanted, Deadline.after(_CALL))
    click.echo(f"device {device} is the {row.kind.name.lower()} snapshot {row.key!r}: {row.fstype}, "
               f"{tables.size(row.size)}")  # fmt: skip


__all__ = ["Kind", "pool", "snapshots", "snapshotter"]
