"""The commands about root filesystems: the snapshotter, its snapshots, its pool."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from blockdev import Deadline
from blockdev.devicemapper import Mapper
from runvol import pool_absence, tables
from runvol.cli import Loader, as_json_option
from runvol.config import Config
from runvol.containerd_commands import containerd_config
from runvol.serve_snapshots import limits, state_dir
from snapshotter import assembly, backing, names
from snapshotter.assembly import Extender, Wish
from snapshotter.backing import Backing
from snapshotter.errors import NotFound, PoolRefused, Unavailable, WrongState
from snapshotter.model import Kind
from snapshotter.pool import Pool
from snapshotter.store import STORE, Store

if TYPE_CHECKING:
    from snapshotter.repairing import Report

_CALL = 300.0


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
    path = os.path.join(state_dir(config), STORE)
    if not os.path.exists(path):
        raise NotFound(path, "the store")
    return Store(path)


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
@click.option("--size", type=int, default=0, metavar="BYTES", help="Of the data, for --vg and --loop.")
@click.option("--metadata-size", type=int, default=0, metavar="BYTES", help="Chosen from --size without it.")
@click.option("--block-size", "block", type=int, default=64 << 10, show_default=True, metavar="BYTES")
@click.pass_obj
def pool_init(load: Loader, /, block: int, **wish: str) -> None:
    """Make a pool and describe it; it is assembled from that at each start."""
    config = load()
    asked = Wish(name=wish["name"], device=wish["device"], metadata_device=wish["metadata_device"],
                 group=wish["group"], directory=wish["directory"],
                 size=int(wish["size"]), metadata_size=int(wish["metadata_size"]), block=block)  # fmt: skip
    with Mapper() as mapper:
        made = assembly.init(mapper, state_dir(config), asked, Deadline.after(_CALL))
        status = made.status()
    click.echo(f"made pool {made.name}: {tables.size(status.data_total * block)} of data, "
               f"{tables.size(status.metadata_total * 4096)} of metadata")  # fmt: skip


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
@click.option("--by", "more", type=int, required=True, metavar="BYTES")
@click.option("--metadata", is_flag=True, help="The metadata instead of the data.")
@click.pass_obj
def pool_extend(load: Loader, more: int, metadata: bool) -> None:
    """Make the pool larger while it is in use."""
    config = load()
    with Mapper() as mapper:
        one, below = assembly.assemble(mapper, state_dir(config), Deadline.after(_CALL), limits(config))
        extender = Extender(mapper, one, below)
        status = extender.extend("metadata" if metadata else "data", more, Deadline.after(_CALL))
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


@pool.command("quarantine")
@click.option("--free", multiple=True, type=int, metavar="ID", help="Delete this device and its data.")
@click.option("--free-all", is_flag=True, help="Delete all of them.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@as_json_option
@click.pass_obj
def pool_quarantine(load: Loader, free: tuple[int, ...], free_all: bool, yes: bool, as_json: bool) -> None:
    """List devices of the pool that no snapshot belongs to (the store was lost, or they are foreign), and free them."""
    config = load()
    store = _store(config)
    there = store.quarantined()
    chosen = there if free_all else list(free)
    unknown = sorted(set(chosen) - set(there))
    if unknown:
        raise NotFound(str(unknown[0]), "quarantined device")
    for device in chosen:
        if owners := store.owners(device):
            raise WrongState(f"device {device} is that of snapshot {owners[0]!r}; remove the snapshot first")
    if chosen:
        if not yes:
            click.confirm(f"Delete {len(chosen)} devices and their data?", abort=True)
        with store.transaction():
            for device in chosen:
                store.doom(device, time.time_ns())
            store.release(chosen)
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


__all__ = ["Kind", "pool", "snapshots", "snapshotter"]
