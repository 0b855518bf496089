"""The commands about volumes and hand-offs."""

from __future__ import annotations

import sys

import click
import msgspec

from blockdev import Deadline
from guestmount import Node, PodRef, repair
from guestmount.claims import Claim
from runvol import assembly, config, tables
from runvol.cli import Loader, as_json_option
from volumes import AccessMode, Capability, SizeRange, Volume, parameters, work

_json = as_json_option
_CALL = 60.0


def _node(load: Loader) -> Node:
    return assembly.build(load())


@click.command()
@click.option("--endpoint", metavar="URL", help="unix:///…/csi.sock")
@click.option("--nfs-endpoint", metavar="URL", help="The same for the driver nfs.csi.runvol.io.")
@click.option("--node-id", metavar="NAME", help="The node's name in Kubernetes.")
@click.option("--services", metavar="LIST", help="Any of identity,controller,node.")
@click.pass_obj
def csi(
    load: Loader, endpoint: str | None, nfs_endpoint: str | None, node_id: str | None, services: str | None
) -> None:
    """Serve the CSI plugin."""
    from runvol import serve

    given = {"csi.endpoint": endpoint, "csi.nfs_endpoint": nfs_endpoint, "node.id": node_id, "csi.services": services}
    serve.csi_plugin(load(**given))


@click.command()
@click.option("--socket", metavar="PATH", help="The container runtime's NRI socket.")
@click.pass_obj
def nri(load: Loader, socket: str | None) -> None:
    """Have guests mount NFS volumes themselves: the NRI plugin, which stays connected until it is stopped."""
    from runvol import serve_nri

    serve_nri.serve(load(**{"nri.socket": socket}))


@click.group(invoke_without_command=True)
@_json
@click.pass_context
def volumes(context: click.Context, as_json: bool) -> None:
    """List volumes; make, adopt and delete static ones."""
    if context.invoked_subcommand is not None:
        return
    node = _node(context.obj)
    claims = {claim.volume: claim for claim in _claims(node)}
    rows = [_volume_row(volume, claims.get(volume.volume_id)) for _seq, volume in node.catalog.list(trouble=_warn)]
    tables.show(rows, ("volume", "name", "size", "used", "owner", "targets"), as_json=as_json, empty="no volumes")
    if not as_json and (going_on := _work_rows(context.obj)):
        click.echo()
        tables.show(going_on, _WORK, as_json=False, empty="")


_WORK = ("work", "done", "of", "percent", "seconds")


@volumes.command("work")
@_json
@click.pass_obj
def volumes_work(load: Loader, as_json: bool) -> None:
    """Show what goes on behind calls: copies, deletions, groups of files."""
    tables.show(_work_rows(load), _WORK, as_json=as_json, empty="nothing is under way")


def _work_rows(load: Loader) -> list[dict[str, object]]:
    return [
        {"work": one.what, "done": tables.size(one.done) if one.done else "-", "done_bytes": one.done,
         "of": tables.size(one.total) if one.total else "-", "total_bytes": one.total,
         "percent": "-" if one.percent is None else one.percent, "seconds": one.seconds}
        for one in work.seen(load().text("paths.run_dir"))
    ]  # fmt: skip


def _warn(sentence: str) -> None:
    click.echo(f"warning: {sentence}", err=True)


def _volume_row(volume: Volume, claim: Claim | None) -> dict[str, object]:
    return {
        "volume": volume.volume_id,
        "name": volume.name,
        "backend": volume.backend,
        "size": tables.size(volume.capacity_bytes),
        "capacity_bytes": volume.capacity_bytes,
        "used": tables.size(volume.allocated_bytes),
        "allocated_bytes": volume.allocated_bytes,
        "parameters": dict(volume.parameters),
        "staged_at": claim.staging_path if claim else "",
        "owner": str(claim.owner) if claim and claim.owner else ("staged" if claim else "-"),
        "targets": len(claim.targets) if claim else 0,
    }


@volumes.command("create")
@click.argument("name")
@click.option("--size", "size_bytes", type=int, required=True, metavar="BYTES")
@click.option("--parameter", "-p", multiple=True, metavar="KEY=VALUE", help="A StorageClass parameter.")
@_json
@click.pass_obj
def volumes_create(load: Loader, name: str, size_bytes: int, parameter: tuple[str, ...], as_json: bool) -> None:
    """Make a volume that no provisioner makes (FlexVolume, static PersistentVolumes)."""
    given = {key: value for key, _, value in (one.partition("=") for one in parameter)}
    node = _node(load)
    chosen = parameters.check(given, default=node.catalog.default)
    use = Capability(mode=AccessMode.SINGLE_NODE_WRITER, fstype=chosen.get(parameters.FSTYPE, ""))
    made = node.catalog.for_parameters(chosen).create(name, SizeRange(required=size_bytes), chosen, [use])
    tables.show([_volume_row(made, None)], ("volume", "name", "size"), as_json=as_json, empty="")


@volumes.command("adopt")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, resolve_path=True))
@click.option("--name", required=True)
@_json
@click.pass_obj
def volumes_adopt(load: Loader, file: str, name: str, as_json: bool) -> None:
    """Take over an existing image file, with its data; it is moved into the state directory."""
    node = _node(load)
    made = node.catalog.adopt(file, name)
    tables.show([_volume_row(made, None)], ("volume", "name", "size"), as_json=as_json, empty="")


@volumes.command("forget")
@click.argument("one_id", metavar="ID")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.pass_obj
def volumes_forget(load: Loader, one_id: str, yes: bool) -> None:
    """End a PersistentVolume, or a snapshot, whose store is lost for good.

    Its deletion succeeds from now on, on this node; nothing is removed anywhere.
    """
    node = _node(load)
    if not yes:
        click.confirm(f"Is the store that made {one_id} lost, with its data?", abort=True)
    name = node.catalog.forget(one_id)
    click.echo(f"{one_id} counts as deleted (backend {name})")


@volumes.command("delete")
@click.argument("volume_id")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.pass_obj
def volumes_delete(load: Loader, volume_id: str, yes: bool) -> None:
    """Delete a volume and its data."""
    node = _node(load)
    volume = node.catalog.get(volume_id)
    if not yes:
        click.confirm(
            f"Delete volume {volume_id} ({volume.name}, {tables.size(volume.capacity_bytes)}) and its data?", abort=True
        )
    with node.unused(volume_id, Deadline.after(_CALL)):
        node.catalog.of(volume_id).delete(volume_id)
    click.echo(f"deleted {volume_id}")


def _claims(node: Node) -> list[Claim]:
    """Those that can be read; what is wrong with the others is said."""
    found, damaged = node.claims.readable()
    for error in damaged:
        _warn(str(error))
    return found


@click.command()
@_json
@click.pass_obj
def handoffs(load: Loader, as_json: bool) -> None:
    """List what was handed to sandboxes, this driver's and others'."""
    node = _node(load)
    claims = {path: claim for claim in _claims(node) for path in claim.targets}
    rows = []
    for dialect in node.dialects:
        for one in dialect.delivered():
            claim = claims.get(one.target)
            rows.append(
                {
                    "volume": claim.volume if claim else "(no claim)",
                    "pod": claim.targets[one.target].pod if claim else "",
                    "dialect": one.dialect,
                    "device": one.device,
                    "fstype": one.fstype,
                    "options": ",".join(one.options),
                    "target": one.target,
                    "place": one.place,
                    "problem": one.problem,
                }
            )
    columns = ("volume", "pod", "dialect", "fstype", "options", "target", "problem")
    tables.show(rows, columns, as_json=as_json, empty="no hand-offs")


@click.command()
@click.argument("namespace_name", metavar="NAMESPACE/NAME")
@click.option("--attribute", default="", help="The volume's attribute `runtime`.")
@click.pass_obj
def detect(load: Loader, namespace_name: str, attribute: str) -> None:
    """Tell which runtime will run a pod, and how that is known."""
    namespace, _, name = namespace_name.partition("/")
    if not namespace or not name:
        raise click.BadParameter(f"{namespace_name!r}: takes NAMESPACE/NAME", param_hint="NAMESPACE/NAME")
    answer = _node(load).detector.detect(PodRef(namespace=namespace, name=name), attribute, Deadline.after(5))
    click.echo(f"{answer.kind} (handler {answer.handler}), from {answer.source}")


@click.command()
@_json
@click.pass_obj
def doctor(load: Loader, as_json: bool) -> None:
    """Say what this node can do and what to change; status 1 if something is broken, 3 if not all could be seen."""
    from runvol import doctor as examination
    from runvol import doctor_shown
    from runvol.diagnosis import status

    loaded = load()
    found = list(examination.examine(loaded, assembly.build(loaded, looking=True)))
    doctor_shown.show(found, as_json=as_json)
    sys.exit(status(found))


@click.command()
@click.option("--dry-run", is_flag=True, help="Only say what would be taken back.")
@_json
@click.pass_obj
def gc(load: Loader, dry_run: bool, as_json: bool) -> None:
    """Take back what belongs to no volume and to no pod."""
    node = _node(load)
    done = (
        []
        if dry_run
        else [
            repair.Finding(kind="volume", place="store", why=said, done=True)
            for said in [*repair.before_serving(node), *repair.behind(node)]
        ]
    )
    done += [repair.Finding(kind="volume", place=one.name, why=one.why) for one in node.catalog.unfinished()]
    found = done + repair.collect(node, Deadline.after(_CALL), dry_run=dry_run)
    rows = [{"kind": one.kind, "place": one.place, "why": one.why, "done": one.done} for one in found]
    tables.show(rows, ("kind", "place", "why", "done"), as_json=as_json, empty="nothing is left over")


@click.command()
@click.argument("name", type=click.Choice(["publish"]))
@click.option("--endpoint", metavar="URL", help="The running driver's socket.")
@click.option("--samples", type=click.IntRange(1, 100_000), default=200, show_default=True)
@_json
@click.pass_obj
def bench(load: Loader, name: str, endpoint: str | None, samples: int, as_json: bool) -> None:
    """Measure the running driver on this node with a small volume of its own."""
    import grpc

    from csi.server import socket_path
    from runvol import bench as benchmarks

    loaded = load(**{"csi.endpoint": endpoint})
    root = loaded.words("node.roots")[0]
    try:
        figures = benchmarks.publish(socket_path(loaded.text("csi.endpoint")), root, samples)
    except grpc.RpcError as error:
        raise click.ClickException(f"{name}: {error.code().name}: {error.details()}") from error
    rows = [{"call": one.call, "p50_ms": one.p50, "p99_ms": one.p99, "samples": one.samples} for one in figures]
    tables.show(rows, ("call", "p50_ms", "p99_ms", "samples"), as_json=as_json, empty="")


@click.command("config")
@_json
@click.pass_obj
def show_config(load: Loader, as_json: bool) -> None:
    """Print the settings in force and where each came from."""
    loaded = load()
    rows = [
        {"key": key, "value": msgspec.json.encode(loaded.values[key]).decode(), "source": loaded.sources[key],
         "variable": config.variable_of(key), "meaning": setting.meaning}
        for key, setting in config.TABLE.items()
    ]  # fmt: skip
    tables.show(rows, ("key", "value", "source", "meaning"), as_json=as_json, empty="")


@click.command("parameters")
@_json
def show_parameters(as_json: bool) -> None:
    """Print the StorageClass parameters."""
    rows = [
        {"key": one.key, "values": one.values, "default": one.default, "meaning": one.meaning}
        for one in parameters.TABLE
    ]
    tables.show(rows, ("key", "values", "default", "meaning"), as_json=as_json, empty="")
