"""The commands about images on shared storage."""

from __future__ import annotations

import os
import time
from functools import partial

import click
import grpc

from blockdev import Deadline
from runvol import tables
from runvol.cli import Loader, as_json_option
from runvol.config import Config
from runvol.serve_snapshots import state_dir
from runvol_proto import containerd_snapshots_pb2 as pb
from snapshotter.errors import BadRequest, NotFound, Unavailable
from snapshotter.images import Share
from snapshotter.model import LABEL_REF, Kind, Snapshot, chain_of
from snapshotter.node import STORE
from snapshotter.server import socket_path
from snapshotter.service import NAME
from snapshotter.store import Store

_CALL = 60.0


def _share(config: Config) -> Share:
    directory = config.text("snapshotter.images")
    if not directory:
        raise BadRequest("snapshotter.images", "", "names no directory; set it in the configuration")
    return Share(directory)


@click.group(invoke_without_command=True)
@as_json_option
@click.pass_context
def images(context: click.Context, as_json: bool) -> None:
    """List images on shared storage; make, check and remove them."""
    if context.invoked_subcommand is not None:
        return
    config = context.obj()
    share = _share(config)
    path = os.path.join(state_dir(config), STORE)
    store = Store(path) if os.path.exists(path) else None
    rows = []
    for chain in share.ask("listing the images", share.chains, Deadline.after(_CALL)):
        manifest = share.manifest(chain, Deadline.after(_CALL))
        if manifest is None:
            continue
        image = os.path.join(share.place(chain), "image")
        blocks = share.ask("looking at an image", partial(os.stat, image), Deadline.after(_CALL)).st_blocks
        here = [row for row in store.with_image(chain) if row.device] if store else []
        rows.append({"chain": chain, "size": tables.size(manifest.size), "used": tables.size(blocks * 512),
                     "fstype": manifest.fstype, "made": manifest.made, "containers_here": len(here),
                     "size_bytes": manifest.size, "root": manifest.root})  # fmt: skip
    tables.show(
        rows, ("chain", "size", "used", "fstype", "containers_here", "made"), as_json=as_json, empty="no images"
    )


@images.command("make")
@click.argument("chain", metavar="CHAIN|KEY")
@click.pass_obj
def images_make(load: Loader, chain: str) -> None:
    """Put an unpacked chain, and every chain below it, onto the shared storage. The snapshotter must run."""
    config = load()
    share = _share(config)
    store = Store(os.path.join(state_dir(config), STORE))
    for row in reversed(_ancestry(store, chain)):
        reference = chain_of(row)
        if row.image == reference and not row.device:
            click.echo(f"{reference}: it comes from there")
            continue
        _make(config, share, row, reference)


def _ancestry(store: Store, wanted: str) -> list[Snapshot]:
    """The chain and its parents, topmost first; each of them must be known by a chain id."""
    found = [row for page in store.pages() for row in page
             if row.kind is Kind.COMMITTED and wanted in (row.key, chain_of(row))]  # fmt: skip
    if not found:
        raise NotFound(wanted, "committed snapshot")
    chain = [found[0]]
    while chain[-1].parent:
        above = store.get(chain[-1].parent)
        if above is None:
            raise NotFound(chain[-1].parent, "parent")
        chain.append(above)
    for row in chain:
        if not chain_of(row):
            raise BadRequest("chain", row.key, f"has no chain id, in its name or its label {LABEL_REF}: it was not "
                             "unpacked from an image")  # fmt: skip
    return chain


def _make(config: Config, share: Share, row: Snapshot, reference: str) -> None:
    path = socket_path(config.text("snapshotter.endpoint"))
    view = f"runvol-images/{os.getpid()}-{time.monotonic_ns()}"
    last = [0.0]

    def progress(what: str, done: int) -> None:
        if time.monotonic() - last[0] > 1:
            last[0] = time.monotonic()
            click.echo(f"{reference[:19]}: {what}, {tables.size(done)} of {tables.size(row.size)}", err=True)

    with grpc.insecure_channel(f"unix:{path}") as channel:
        try:
            answer = channel.unary_unary(
                f"/{NAME}/View", request_serializer=pb.ViewSnapshotRequest.SerializeToString,
                response_deserializer=pb.ViewSnapshotResponse.FromString,
            )(pb.ViewSnapshotRequest(key=view, parent=row.key), timeout=_CALL)  # fmt: skip
        except grpc.RpcError as error:
            raise Unavailable(f"the snapshotter on {path}: {error.code().name}: {error.details()}") from None
        try:
            mount = answer.mounts[0]
            manifest = share.make(reference, mount.source, mount.type, progress=progress)
        finally:
            channel.unary_unary(
                f"/{NAME}/Remove", request_serializer=pb.RemoveSnapshotRequest.SerializeToString,
                response_deserializer=lambda raw: raw,
            )(pb.RemoveSnapshotRequest(key=view), timeout=_CALL)  # fmt: skip
    click.echo(f"{reference}: made, {tables.size(manifest.size)} of {manifest.fstype}, root {manifest.root[:16]}…")


@images.command("check")
@click.argument("chains", nargs=-1)
@click.pass_obj
def images_check(load: Loader, chains: tuple[str, ...]) -> None:
    """Read images whole and compare them with their hashes; all of them without arguments. Status 1 for a wrong one."""
    share = _share(load())
    wrong = 0
    for chain in chains or share.chains():
        problem = share.check(chain)
        wrong += bool(problem)
        click.echo(f"{chain}: {problem or 'sound'}")
    if wrong:
        raise SystemExit(1)


@images.command("remove")
@click.argument("chain")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.pass_obj
def images_remove(load: Loader, chain: str, yes: bool) -> None:
    """Remove an image. Nodes on which containers run from it keep it until they end, or until a reboot."""
    share = _share(load())
    if not yes:
        click.confirm(f"Remove the image of {chain} for all nodes?", abort=True)
    share.remove(chain)
    click.echo(f"removed {chain}")
