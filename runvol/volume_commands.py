"""The commands about volumes and hand-offs."""

from __future__ import annotations

import contextlib
import os
import sys

import click

from blockdev import Deadline
from blockdev.printable import printable
from guestmount import Node, PodRef, repair
from guestmount.claims import Claim, Target
from runvol import assembly, config, endpoints, schemas, tables, troubles
from runvol.cli import Loader, as_json_option
from runvol.options import SIZE
from runvol.sizes import words
from volumes import AccessMode, Capability, SizeRange, Volume, parameters, work

_json = as_json_option
_CALL = 60.0


def _node(load: Loader) -> Node:
    """The node's verbs. A state directory that is not made yet holds nothing; one that cannot be read is an OSError."""
    loaded = load()
    with contextlib.suppress(FileNotFoundError), os.scandir(loaded.text("paths.state_dir")):
        pass
    return assembly.build(loaded)


@click.command(short_help="Serve the drivers: the node plugin.")
@click.option("--endpoint", metavar="URL", help="The socket to serve, unix:///…/csi.sock.")
@click.option("--nfs-endpoint", metavar="URL", help="The same for the driver nfs.csi.runvol.io.")
@click.option("--node-id", metavar="NAME", help="The node's name in Kubernetes.")
@click.option("--services", metavar="LIST", help="Any of identity,controller,node.")
@click.pass_obj
def csi(
    load: Loader, endpoint: str | None, nfs_endpoint: str | None, node_id: str | None, services: str | None
) -> None:
    """Serve the drivers csi.runvol.io and nfs.csi.runvol.io: the node plugin, or a central controller."""
    from runvol import serve

    given = {"csi.endpoint": endpoint, "csi.nfs_endpoint": nfs_endpoint, "node.id": node_id, "csi.services": services}
    serve.csi_plugin(load(**given))


@click.command(short_help="Have guests mount NFS volumes themselves.")
@click.option("--socket", metavar="PATH", help="The container runtime's NRI socket.")
@click.pass_obj
def nri(load: Loader, socket: str | None) -> None:
    """Have guests mount NFS volumes themselves: the NRI plugin, which stays connected until it is stopped."""
    from runvol import serve_nri

    serve_nri.serve(load(**{"nri.socket": socket}))


@click.group(invoke_without_command=True, short_help="List volumes; make, adopt and delete them.")
@_json
@click.pass_context
def volumes(context: click.Context, as_json: bool) -> None:
    """List volumes; make, adopt and delete static ones, and list volume snapshots."""
    if context.invoked_subcommand is not None:
        return
    with troubles.looking(troubles.LOOKING):
        node = _node(context.obj)
        claims = {claim.volume: claim for claim in _claims(node)}
        items = [
            _volume(volume, claims.get(volume.volume_id)) for _seq, volume in node.catalog.list(trouble=tables.warn)
        ]
        going_on = [] if as_json else _work(context.obj)
    columns: tables.Columns[schemas.Volume] = [
        "volume",
        "name",
        ("size", lambda it: words(it.capacity_bytes)),
        ("used", lambda it: words(it.allocated_bytes)),
        "state",
        ("owner", lambda it: _owner(it.owner)),
        ("targets", lambda it: len(it.targets)),
    ]
    tables.show(schemas.Volume, items, columns, as_json=as_json, empty="no volumes")
    if going_on:
        click.echo()
        tables.show(schemas.Work, going_on, _WORK, as_json=False, empty="")


_WORK: tables.Columns[schemas.Work] = [
    "work",
    ("done", lambda it: words(it.done_bytes) if it.done_bytes else None),
    ("of", lambda it: words(it.total_bytes) if it.total_bytes else None),
    "percent",
    "seconds",
]


@volumes.command("work", short_help="Show what goes on behind calls.")
@_json
@click.pass_obj
def volumes_work(load: Loader, as_json: bool) -> None:
    """Show what goes on behind calls: copies, deletions, groups of files."""
    with troubles.looking(troubles.LOOKING):
        items = _work(load)
    tables.show(schemas.Work, items, _WORK, as_json=as_json, empty="nothing is under way")


def _work(load: Loader) -> list[schemas.Work]:
    return [
        schemas.Work(work=one.what, done_bytes=one.done, total_bytes=one.total or None, percent=one.percent,
                     seconds=one.seconds)
        for one in work.seen(load().text("paths.run_dir"))
    ]  # fmt: skip


@volumes.command("snapshots", short_help="List volume snapshots (not containerd's).")
@click.option("--volume", "source", default="", metavar="ID", help="Only those of this volume.")
@_json
@click.pass_obj
def volumes_snapshots(load: Loader, source: str, as_json: bool) -> None:
    """List volume snapshots: the VolumeSnapshots of the cluster that lie on this node. What containerd calls snapshots,
    `runvol snapshots` lists."""
    with troubles.looking(troubles.LOOKING):
        items = [
            schemas.VolumeSnapshot(
                snapshot=one.snapshot_id, volume=one.source, size_bytes=one.size_bytes,
                created=schemas.time_of(one.created), group=one.group or None, ready=one.ready,
            )
            for _seq, one in _node(load).catalog.snapshots(source=source, trouble=tables.warn)
        ]  # fmt: skip
    columns: tables.Columns[schemas.VolumeSnapshot] = [
        "snapshot",
        "volume",
        ("size", lambda it: words(it.size_bytes)),
        "created",
        "group",
        "ready",
    ]
    tables.show(schemas.VolumeSnapshot, items, columns, as_json=as_json, empty="no volume snapshots")


def _volume(volume: Volume, claim: Claim | None) -> schemas.Volume:
    owner = claim.owner if claim else None
    state = "idle" if claim is None else "lingering" if claim.lingers else "owned" if owner else "staged"
    return schemas.Volume(
        volume=volume.volume_id,
        name=volume.name,
        backend=volume.backend,
        capacity_bytes=volume.capacity_bytes,
        allocated_bytes=volume.allocated_bytes,
        parameters=dict(volume.parameters),
        state=state,
        formatting=volume.formatting,
        source=volume.source or None,
        staging_path=(claim.staging_path or None) if claim else None,
        owner=schemas.Owner(
            kernel=owner.kind, pod_namespace=owner.pod_namespace or None, pod_name=owner.pod_name or None,
            pod_uid=owner.pod_uid or None, handler=owner.handler or None,
        ) if owner else None,
        targets=[schemas.Target(path=path, read_only=target.read_only, **_pod(target))
                 for path, target in claim.targets.items()] if claim else [],
    )  # fmt: skip


def _pod(target: Target | None) -> dict[str, str | None]:
    if target is None:
        return {"pod_namespace": None, "pod_name": None, "pod_uid": None}
    return {"pod_namespace": target.pod_namespace or None, "pod_name": target.pod_name or None,
            "pod_uid": target.pod_uid or None}  # fmt: skip


def _name_of_pod(it: schemas.HandOff | schemas.Owner) -> str | None:
    return f"{it.pod_namespace}/{it.pod_name}" if it.pod_name else it.pod_uid


def _owner(owner: schemas.Owner | None) -> str | None:
    if owner is None:
        return None
    if owner.kernel == "host":
        return "the host (runc pods)"
    pod = _name_of_pod(owner) or "a pod that is not known"
    return f"{pod} ({owner.handler or 'runtime not known'})"


@volumes.command("create", short_help="Make a volume that no provisioner makes.")
@click.argument("name")
@click.option("--size", "size_bytes", type=SIZE, required=True, help="Bytes, or a quantity such as 10Gi.")
@click.option("--parameter", "-p", multiple=True, metavar="KEY=VALUE", help="A StorageClass parameter.")
@_json
@click.pass_obj
def volumes_create(load: Loader, name: str, size_bytes: int, parameter: tuple[str, ...], as_json: bool) -> None:
    """Make a volume that no provisioner makes, for FlexVolume or a static PersistentVolume. NAME is one that no other
    volume of this node has; the id that it gets is printed."""
    if size_bytes == 0:
        raise click.BadParameter("0: a volume has a size", param_hint="--size")
    given = dict(_key_and_value(one) for one in parameter)
    node = _node(load)
    chosen = parameters.check(given, default=node.catalog.default)
    use = Capability(mode=AccessMode.SINGLE_NODE_WRITER, fstype=chosen.get(parameters.FSTYPE, ""))
    made = node.catalog.for_parameters(chosen).create(name, SizeRange(required=size_bytes), chosen, [use])
    _show_made(made, as_json)


def _key_and_value(word: str) -> tuple[str, str]:
    key, equals, value = word.partition("=")
    if not equals or not key:
        raise click.BadParameter(f"{word!r}: takes KEY=VALUE", param_hint="--parameter")
    return key, value


def _show_made(made: Volume, as_json: bool) -> None:
    columns: tables.Columns[schemas.Volume] = ["volume", "name", ("size", lambda it: words(it.capacity_bytes))]
    tables.show(schemas.Volume, [_volume(made, None)], columns, as_json=as_json, empty="")


@volumes.command("adopt", short_help="Take over an image file, with its data.")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, resolve_path=True))
@click.option("--name", required=True, help="One that no other volume of this node has.")
@_json
@click.pass_obj
def volumes_adopt(load: Loader, file: str, name: str, as_json: bool) -> None:
    """Take over an existing image, with its data. FILE must lie on the filesystem of the state directory, as it is
    moved there."""
    _show_made(_node(load).catalog.adopt(file, name), as_json)


@volumes.command("forget", short_help="End what a lost store has made.")
@click.argument("one_id", metavar="ID")
@click.option("--yes", is_flag=True, help="Do not ask.")
@_json
@click.pass_obj
def volumes_forget(load: Loader, one_id: str, yes: bool, as_json: bool) -> None:
    """End a PersistentVolume, or a volume snapshot, whose store is lost for good. ID is its volumeHandle or
    snapshotHandle.

    Its deletion succeeds from now on, on this node; nothing is removed anywhere.
    """
    node = _node(load)
    if not yes:
        click.confirm(f"Is the store that made {printable(one_id)} lost, with its data?", abort=True, err=as_json)
    name = node.catalog.forget(one_id)
    tables.tell([schemas.Outcome(action="forgotten", what="volume", name=one_id, done=True,
                                 message=f"{one_id} counts as deleted (backend {name})")], as_json=as_json)  # fmt: skip


@volumes.command("delete", short_help="Delete a volume and its data.")
@click.argument("volume_id", metavar="ID")
@click.option("--yes", is_flag=True, help="Do not ask.")
@_json
@click.pass_obj
def volumes_delete(load: Loader, volume_id: str, yes: bool, as_json: bool) -> None:
    """Delete a volume and its data. ID is as `runvol volumes` lists it."""
    node = _node(load)
    volume = node.catalog.get(volume_id)
    if not yes:
        called = printable(f"{volume_id} ({volume.name}, {words(volume.capacity_bytes)})")
        click.confirm(f"Delete volume {called} and its data?", abort=True, err=as_json)
    with node.unused(volume_id, Deadline.after(_CALL)):
        node.catalog.of(volume_id).delete(volume_id)
    tables.tell([schemas.Outcome(action="deleted", what="volume", name=volume_id, done=True,
                                 message=f"deleted {volume_id}")], as_json=as_json)  # fmt: skip


def _claims(node: Node) -> list[Claim]:
    """Those that can be read; what is wrong with the others is said."""
    found, damaged = node.claims.readable()
    for error in damaged:
        tables.warn(error)
    return found


@click.command(short_help="List hand-offs: what sandboxes were given.")
@_json
@click.pass_obj
def handoffs(load: Loader, as_json: bool) -> None:
    """List hand-offs: what was given to sandboxes, this driver's and others'."""
    with troubles.looking(troubles.LOOKING):
        node = _node(load)
        claims = {path: claim for claim in _claims(node) for path in claim.targets}
        items = [
            schemas.HandOff(
                volume=claims[one.target].volume if one.target in claims else None,
                **_pod(claims[one.target].targets[one.target] if one.target in claims else None),
                dialect=one.dialect,
                device=one.device or None,
                fstype=one.fstype or None,
                options=list(one.options),
                target=one.target,
                place=one.place,
                closed=one.closed,
                problem=one.problem or None,
            )
            for dialect in node.dialects
            for one in dialect.delivered()
        ]
    columns: tables.Columns[schemas.HandOff] = [
        "volume",
        ("pod", _name_of_pod),
        "dialect",
        "fstype",
        "options",
        "target",
        "problem",
    ]
    tables.show(schemas.HandOff, items, columns, as_json=as_json, empty="no hand-offs")


@click.command(short_help="Tell which runtime will run a pod.")
@click.argument("namespace_name", metavar="NAMESPACE/NAME")
@click.option("--runtime", "--attribute", "said", default="", metavar="RUNTIME",
              help="What the volume's parameter `runtime` says.")  # fmt: skip
@_json
@click.pass_obj
def detect(load: Loader, namespace_name: str, said: str, as_json: bool) -> None:
    """Tell which runtime will run a pod, and how that is known."""
    namespace, _, name = namespace_name.partition("/")
    if not namespace or not name or "/" in name:
        raise click.BadParameter(f"{namespace_name!r}: takes NAMESPACE/NAME", param_hint="NAMESPACE/NAME")
    with troubles.looking(troubles.LOOKING):
        answer = _node(load).detector.detect(PodRef(namespace=namespace, name=name), said, Deadline.after(5))
    if as_json:
        found = schemas.Detection(pod_namespace=namespace, pod_name=name, kernel=answer.kind,
                                  handler=answer.handler or None, source=answer.source)  # fmt: skip
        tables.print_json(schemas.Detection, [found])
        return
    tables.line(f"{answer.kind} (handler {answer.handler}), from {answer.source}")


@click.command(short_help="Say what is wrong here, and what to change.")
@_json
@click.pass_obj
def doctor(load: Loader, as_json: bool) -> None:
    """Say what this node can do and what to change. Status 1 if something is broken, 3 if not all could be seen."""
    from runvol import doctor as examination
    from runvol import doctor_shown
    from runvol.diagnosis import status

    with troubles.looking():
        found = list(examination.examine_all(load()))
    doctor_shown.show(found, as_json=as_json)
    sys.exit(status(found))


@click.command(short_help="Take back what belongs to nobody.")
@click.option("--dry-run", is_flag=True, help="Only say what would be taken back; status 1 if there is something.")
@_json
@click.pass_obj
def gc(load: Loader, dry_run: bool, as_json: bool) -> None:
    """Take back what belongs to no volume and to no pod. Status 1 if something of it is left over.

    A file among the volumes that no volume has is only named: `runvol volumes adopt` takes it, `rm` removes it.
    """
    with troubles.looking():
        with troubles.ending(troubles.LOOKING):
            node = _node(load)
        found = repair.taken_back(node, Deadline.after(_CALL), dry_run=dry_run)
    items = [schemas.LeftOver(what=one.kind, place=one.place or None, why=one.why, done=one.done, by_hand=one.by_hand)
             for one in found]  # fmt: skip
    columns: tables.Columns[schemas.LeftOver] = ["what", "place", "done", "why"]
    tables.show(schemas.LeftOver, items, columns, as_json=as_json, empty="nothing is left over")
    left = {one.what for one in items if not one.done}
    sys.exit(troubles.FOUND if left - {"trouble"} else troubles.NOT_SEEN if left else troubles.FINE)


@click.command(short_help="Measure the running driver on this node.")
@click.argument("name", type=click.Choice(["publish"]), metavar="publish")
@click.option("--endpoint", metavar="URL", help="The running driver's socket.")
@click.option("--samples", type=click.IntRange(1, 100_000), default=200, show_default=True, metavar="NUMBER",
              help="How many publishes.")  # fmt: skip
@_json
@click.pass_obj
def bench(load: Loader, name: str, endpoint: str | None, samples: int, as_json: bool) -> None:
    """Measure the running driver on this node, with a small volume of its own that goes again. `publish` is a publish
    to a sandbox, so it takes a node with one."""
    import grpc

    from csi import server
    from guestmount import drivers
    from runvol import bench as benchmarks

    loaded = load(**{"csi.endpoint": endpoint})
    root, path = loaded.words("node.roots")[0], endpoints.path(loaded, "csi.endpoint")
    if not server.answers(path, drivers.NODES):
        raise troubles.NotSeen(f"{name}: nobody answers at {path}; start `runvol csi`, or name its --endpoint")
    try:
        figures = benchmarks.publish(path, root, samples)
    except grpc.RpcError as error:
        raise troubles.NotSeen(f"{name}: {error.code().name}: {error.details()}") from error
    items = [schemas.Figure(call=one.call, p50_ms=one.p50, p99_ms=one.p99, samples=one.samples) for one in figures]
    columns: tables.Columns[schemas.Figure] = ["call", "p50_ms", "p99_ms", "samples"]
    tables.show(schemas.Figure, items, columns, as_json=as_json, empty="")


@click.command("config", short_help="Print the settings in force.")
@_json
@click.pass_obj
def show_config(load: Loader, as_json: bool) -> None:
    """Print the settings in force, and who set each of those that are changed."""
    loaded = load()
    items = [
        schemas.Setting(
            key=key, value=_plain(loaded.values[key]), default=_plain(setting.default),
            source=config.source_kind(loaded.sources[key]),
            said_by=None if loaded.sources[key] == config.DEFAULT else loaded.sources[key],
            variable=config.variable_of(key), meaning=setting.meaning,
        )
        for key, setting in config.TABLE.items()
    ]  # fmt: skip
    if as_json:
        tables.print_json(schemas.Setting, items)
        return
    tables.definitions([(f"{one.key} = {_toml(one.value)}", [*_changed(one), one.meaning]) for one in items])


def _plain(value: str | int | tuple[str, ...]) -> str | int | list[str]:
    return list(value) if isinstance(value, tuple) else value


def _toml(value: str | int | list[str]) -> str:
    from runvol import toml_text

    return toml_text.written_value(value)


def _changed(one: schemas.Setting) -> list[str]:
    if one.source == "default":
        return []
    by = "follows" if one.source == "derived" else "from"
    return [f"{by} {one.said_by}; the default is {_toml(one.default)}"]


@click.command("parameters", short_help="Print the StorageClass parameters.")
@_json
@click.pass_obj
def show_parameters(load: Loader, as_json: bool) -> None:
    """Print the StorageClass parameters, what they take and what they mean."""
    first = load().words("volumes.backends")[0]
    items = [_parameter(one, first if one.key == parameters.BACKEND else one.default) for one in parameters.TABLE]
    if as_json:
        tables.print_json(schemas.Parameter, items)
        return
    tables.definitions([
        (one.key if one.default is None else f"{one.key} = {one.default}",
         [f"takes {one.values}" + (f"; without it: {one.without_it}" if one.without_it else ""), one.meaning])
        for one in items
    ])  # fmt: skip


def _parameter(one: parameters.Parameter, default: str) -> schemas.Parameter:
    """What stands in brackets is no value: it says what holds without one."""
    told = default.strip("()") if default.startswith("(") else ""
    return schemas.Parameter(key=one.key, values=one.values, default=None if told else default,
                             without_it=told if told not in ("", "none") else None, meaning=one.meaning)  # fmt: skip
