"""The commands about images on shared storage."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import click
import grpc

from blockdev import Deadline, daemon
from runvol import tables
from runvol.cli import Loader, as_json_option
from runvol.config import Config
from runvol.serve_snapshots import state_dir
from runvol_proto import containerd_snapshots_pb2 as pb
from snapshotter import images as shared
from snapshotter import signatures
from snapshotter.errors import BadRequest, NotFound, SnapshotterError, Unavailable, WrongState
from snapshotter.images import Share
from snapshotter.model import LABEL_REF, Kind, Snapshot, chain_of
from snapshotter.node import STORE
from snapshotter.server import socket_path
from snapshotter.service import LENDING
from snapshotter.signatures import PrivateKey
from snapshotter.store import Store
from snapshotter.trust import Trust, Verdict, pin_of

_CALL = 60.0
# How often a layer is borrowed anew, as a server that ends between its answer and the opening takes it along.
_TRIES = 3
_key_option = click.option("--key", "key_file", metavar="FILE", help="The private key to sign with.")


def _share(config: Config) -> Share:
    directory = config.text("snapshotter.images")
    if not directory:
        raise BadRequest("snapshotter.images", "", "names no directory; set it in the configuration")
    return Share(directory)


def _trust(config: Config) -> Trust:
    return Trust(
        config.words("snapshotter.image_keys"), config.text("snapshotter.image_roots"),
        unsigned=bool(config.number("snapshotter.images_unsigned")),
    )  # fmt: skip


def _store(config: Config) -> Store | None:
    """The node's store; None on a machine where no snapshotter ever ran."""
    path = os.path.join(state_dir(config), STORE)
    return Store(path) if os.path.exists(path) else None


def _own_store(config: Config) -> Store:
    found = _store(config)
    if found is None:
        raise NotFound(os.path.join(state_dir(config), STORE), "the store")
    return found


@click.group(invoke_without_command=True)
@as_json_option
@click.pass_context
def images(context: click.Context, as_json: bool) -> None:
    """List images on shared storage; make, sign, check and remove them."""
    if context.invoked_subcommand is not None:
        return
    config = context.obj()
    share, trust, store = _share(config), _trust(config), _store(config)
    pins = shared.pins(store) if store else {}
    there = share.ask("listing the images", share.chains, Deadline.after(_CALL))
    rows = [_row(share, trust, store, chain, pins.get(chain)) for chain in there]
    rows += [{"chain": chain, "trust": "used here before, not there now", "pinned": True}
             for chain in sorted(pins.keys() - set(there))]  # fmt: skip
    for trouble in trust.troubles():
        click.echo(f"Warning: {trouble}", err=True)
    columns = ("chain", "size", "used", "fstype", "trust", "containers_here", "made")
    tables.show(rows, columns, as_json=as_json, empty="no images")


def _row(share: Share, trust: Trust, store: Store | None, chain: str, pin: str | None) -> dict[str, object]:
    said = share.said(chain, Deadline.after(_CALL))
    verdict = trust.judge(said, pin) if said is not None else Verdict(reason="gone")
    # For what is used here already it is told as well whether it would be used if it were not.
    fresh = trust.judge(said) if said is not None and verdict.manifest is not None else verdict
    by = fresh.by if fresh.manifest == verdict.manifest else verdict.by
    row: dict[str, object] = {"chain": chain, "trust": by or f"{verdict.reason}: not used", "why": verdict.why,
                              "advice": verdict.advice, "pinned": pin is not None}  # fmt: skip
    if said is None or not said.manifests:
        return row
    manifest = verdict.manifest or said.manifests[0]
    with contextlib.suppress(SnapshotterError):
        row["used"] = tables.size(share.ask("looking at an image", partial(share.used, chain), Deadline.after(_CALL)))
    here = [one for one in store.with_image(chain) if one.device] if store else []
    return row | {"size": tables.size(manifest.size), "fstype": manifest.fstype, "made": manifest.made,
                  "containers_here": len(here), "size_bytes": manifest.size, "root": manifest.root}  # fmt: skip


@images.command("keygen")
@click.argument("file")
def images_keygen(file: str) -> None:
    """Make a key to sign images with: FILE, which only its owner can read, and FILE.pub for every node."""
    key, public = signatures.make_key(file)
    click.echo(f"made the key {key.public.name}: {file} signs and stays where images are made; copy {public} to every "
               "node and name it in snapshotter.image_keys")  # fmt: skip


@images.command("make")
@click.argument("chain", metavar="CHAIN|KEY")
@_key_option
@click.pass_obj
def images_make(load: Loader, chain: str, key_file: str | None) -> None:
    """Put an unpacked chain, and every chain below it, onto the shared storage. The snapshotter must run."""
    config = load()
    share, store = _share(config), _own_store(config)
    key = signatures.private_key(key_file) if key_file else None
    for row in reversed(_ancestry(store, chain)):
        reference = chain_of(row)
        if row.image == reference and not row.device:
            click.echo(f"{reference}: it comes from there")
        elif (found := share.present(reference, key)) is not None:
            click.echo(f"{reference}: it is there, root {found.root}")
        else:
            _make(config, share, row, reference, key)
    if key is None and not config.number("snapshotter.images_unsigned"):
        click.echo("not signed: nodes use these only if snapshotter.image_roots lists their roots, or once `runvol "
                   "images sign` has signed them", err=True)  # fmt: skip
    _tell_unknown(config, key)


def _tell_unknown(config: Config, key: PrivateKey | None) -> None:
    if key is not None and key.public.name not in _trust(config).names():
        click.echo(f"this node does not trust the key {key.public.name}: name its public key in "
                   "snapshotter.image_keys, here and on every node that is to use these images", err=True)  # fmt: skip


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


def _progress(reference: str, size: int | None = None) -> Callable[[str, int], None]:
    last = [time.monotonic()]

    def tell(what: str, done: int) -> None:
        if time.monotonic() - last[0] > 1:
            last[0] = time.monotonic()
            of = f" of {tables.size(size)}" if size else ""
            click.echo(f"{reference[:19]}: {what}, {tables.size(done)}{of}", err=True)

    return tell


def _make(config: Config, share: Share, row: Snapshot, reference: str, key: PrivateKey | None) -> None:
    with _borrowed(socket_path(config.text("snapshotter.endpoint")), row.key) as device:
        manifest = share.make(reference, device, row.fstype, progress=_progress(reference, row.size), key=key)
    signed = f", signed by {key.public.name}" if key else ""
    click.echo(f"{reference}: made, {tables.size(manifest.size)} of {manifest.fstype}{signed}, root {manifest.root}")


@contextlib.contextmanager
def _borrowed(path: str, layer: str) -> Iterator[str]:
    """What the layer holds, open: from then on it stays until it is closed, whatever becomes of the server."""
    if not daemon.is_taken(path):
        raise Unavailable(f"no snapshotter listens on {path}: start it (snapshotter.endpoint)")
    with grpc.insecure_channel(f"unix:{path}") as channel:
        source, fd = _lent(channel, path, layer)
        try:
            yield f"/proc/self/fd/{fd}"
        finally:
            os.close(fd)
            # Without this it goes by itself, a little later.
            with contextlib.suppress(SnapshotterError):
                _ask(channel, path, "GiveBack", pb.RemoveSnapshotRequest(key=source), None)


def _lent(channel: grpc.Channel, path: str, layer: str) -> tuple[str, int]:
    """The node that the server has made for us, and a descriptor of it."""
    for _ in range(_TRIES):
        (lent,) = _ask(channel, path, "Lend", pb.MountsRequest(key=layer), pb.MountsResponse).mounts
        with contextlib.suppress(FileNotFoundError):
            return lent.source, os.open(lent.source, os.O_RDONLY | os.O_CLOEXEC)
    raise Unavailable(f"the snapshotter on {path} ends again and again before what it lends can be opened")


def _ask(channel: grpc.Channel, path: str, method: str, request: Any, response: Any) -> Any:
    """One of the server's answers. NotFound, BadRequest and the like are told in its own sentence."""
    call = channel.unary_unary(
        f"/{LENDING}/{method}", request_serializer=type(request).SerializeToString,
        response_deserializer=response.FromString if response else lambda raw: raw,
    )  # fmt: skip
    try:
        return call(request, timeout=_CALL)
    except grpc.RpcError as error:
        if error.code() is grpc.StatusCode.UNIMPLEMENTED:
            raise Unavailable(f"the snapshotter on {path} is of an older release: restart it") from None
        raise SnapshotterError(f"the snapshotter on {path}: {error.code().name}: {error.details()}") from None


@images.command("sign")
@click.argument("chain", required=False)
@click.option("--all", "all_of_them", is_flag=True, help="Every image on the share.")
@click.option("--key", "key_file", metavar="FILE", required=True, help="The private key to sign with.")
@click.pass_obj
def images_sign(load: Loader, chain: str | None, all_of_them: bool, key_file: str) -> None:
    """Read an image whole and sign what was read, if it is what its manifest says. Sign only what you trust."""
    config = load()
    share, store, key = _share(config), _store(config), signatures.private_key(key_file)
    if bool(chain) == all_of_them:
        raise BadRequest("CHAIN, --all", chain or "", "takes exactly one of them")
    pins = shared.pins(store) if store else {}
    chosen = _all(share) if chain is None else [chain]

    def sign(one: str) -> str:
        with contextlib.suppress(SnapshotterError):
            if share.present(one, key) is not None and not share.differ(one):
                return f"it is signed by {key.public.name} already"
        found = share.manifest(one, Deadline.after(_CALL))
        if found is not None and pins.get(one, pin_of(found)) != pin_of(found):
            raise WrongState(f"the image of {one} is not the one that this node has used before; remove it")
        signed = share.sign(one, key, _progress(one))
        return f"signed by {key.public.name}, root {signed.root}"

    _each(chosen, sign)
    _tell_unknown(config, key)


def _all(share: Share) -> list[str]:
    return share.ask("listing the images", share.chains, Deadline.after(_CALL))


def _each(chains: list[str], work: Callable[[str], str]) -> None:
    """Every one of them, whatever becomes of another; status 1 if one went wrong."""
    wrong = 0
    for chain in chains:
        try:
            click.echo(f"{chain}: {work(chain)}")
        except SnapshotterError as error:
            wrong += 1
            click.echo(f"{chain}: {error}", err=len(chains) == 1)
    if wrong:
        raise SystemExit(1)


@images.command("check")
@click.argument("chains", nargs=-1)
@click.pass_obj
def images_check(load: Loader, chains: tuple[str, ...]) -> None:
    """Read images whole and compare them with their hashes; all of them without arguments. Status 1 for a wrong one."""
    config = load()
    share, trust = _share(config), _trust(config)

    def check(chain: str) -> str:
        problem = share.check(chain, _progress(chain))
        if problem:
            raise SnapshotterError(problem)
        said = share.said(chain, Deadline.after(_CALL))
        verdict = trust.judge(said) if said is not None else Verdict(why="it is gone")
        return f"sound, {verdict.by or verdict.why}"

    _each(list(chains) or _all(share), check)


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


@images.command("forget")
@click.argument("chains", nargs=-1, required=True)
@click.pass_obj
def images_forget(load: Loader, chains: tuple[str, ...]) -> None:
    """Let this node use another image of a chain than it did: one that was made anew. Nothing may stand on it."""
    store = _own_store(load())

    def forget(chain: str) -> str:
        shared.forget(store, chain)
        return "forgotten on this node"

    _each(list(chains), forget)
