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
import msgspec

from blockdev import Deadline, daemon
from runvol import endpoints, schemas, tables, troubles
from runvol.cli import Loader, as_json_option
from runvol.config import Config
from runvol.serve_snapshots import state_dir
from runvol.sizes import words
from runvol_proto import containerd_snapshots_pb2 as pb
from snapshotter import images as shared
from snapshotter import signatures
from snapshotter.errors import BadRequest, NotFound, SnapshotterError, Unavailable, WrongState
from snapshotter.images import Share
from snapshotter.model import LABEL_REF, Kind, Snapshot, chain_of
from snapshotter.service import LENDING
from snapshotter.signatures import PrivateKey
from snapshotter.store import Store, existing, found
from snapshotter.trust import Trust, Verdict, pin_of

_CALL = 60.0
# How often a layer is borrowed anew, as a server that ends between its answer and the opening takes it along.
_TRIES = 3
_key_option = click.option("--key", "key_file", metavar="FILE", help="The private key to sign with.")


def _share(config: Config) -> Share:
    directory = config.text("snapshotter.images")
    if not directory:
        raise BadRequest("snapshotter.images", "", "names no directory; set it to that of the shared images")
    return Share(directory)


def _trust(config: Config) -> Trust:
    return Trust(
        config.words("snapshotter.image_keys"), config.text("snapshotter.image_roots"),
        unsigned=bool(config.number("snapshotter.images_unsigned")),
    )  # fmt: skip


def _store(config: Config) -> Store | None:
    """The node's store; None on a machine where no snapshotter ever ran."""
    return found(state_dir(config))


def _own_store(config: Config) -> Store:
    return existing(state_dir(config))


@click.group(invoke_without_command=True, short_help="List shared images; make, sign and check them.")
@as_json_option
@click.pass_context
def images(context: click.Context, as_json: bool) -> None:
    """List images on shared storage; make, sign, check and remove them."""
    if context.invoked_subcommand is not None:
        return
    with troubles.looking(troubles.LOOKING):
        config = context.obj()
        share, trust, store = _share(config), _trust(config), _store(config)
        pins = shared.pins(store) if store else {}
        there = _all(share)
        items = [_item(share, trust, store, chain, pins.get(chain)) for chain in there]
    items += [_absent(chain) for chain in sorted(pins.keys() - set(there))]
    for trouble in trust.troubles():
        tables.warn(trouble)
    columns: tables.Columns[schemas.Image] = [
        "chain", ("size", lambda it: it.size_bytes and words(it.size_bytes)),
        ("used", lambda it: it.used_bytes and words(it.used_bytes)), "fstype", ("trust", _trust_of), "containers_here",
        "made",
    ]  # fmt: skip
    tables.show(schemas.Image, items, columns, as_json=as_json, empty="no images")


def _trust_of(it: schemas.Image) -> str:
    if not it.present:
        return "used here before, not there now"
    return it.trusted_by or f"{it.reason}: not used"


def _absent(chain: str) -> schemas.Image:
    return schemas.Image(
        chain=chain, present=False, size_bytes=None, used_bytes=None, fstype=None, made=None, root=None, trusted=False,
        trusted_by=None, reason=None, why=None, advice=None, pinned=True, containers_here=0,
    )  # fmt: skip


def _item(share: Share, trust: Trust, store: Store | None, chain: str, pin: str | None) -> schemas.Image:
    said = share.said(chain, Deadline.after(_CALL))
    verdict = trust.judge(said, pin) if said is not None else Verdict(reason="gone")
    # For what is used here already it is told as well whether it would be used if it were not.
    fresh = trust.judge(said) if said is not None and verdict.manifest is not None else verdict
    by = fresh.by if fresh.manifest == verdict.manifest else verdict.by
    found = msgspec.structs.replace(
        _absent(chain), present=said is not None, trusted=verdict.manifest is not None, trusted_by=by or None,
        reason=None if by else verdict.reason or None, why=verdict.why or None, advice=verdict.advice or None,
        pinned=pin is not None,
    )  # fmt: skip
    if said is None or not said.manifests:
        return found
    manifest, used = verdict.manifest or said.manifests[0], None
    with contextlib.suppress(SnapshotterError):
        used = share.ask("looking at an image", partial(share.used, chain), Deadline.after(_CALL))
    here = [one for one in store.with_image(chain) if one.device] if store else []
    return msgspec.structs.replace(
        found, size_bytes=manifest.size, used_bytes=used, fstype=manifest.fstype, made=manifest.made,
        root=manifest.root, containers_here=len(here),
    )  # fmt: skip


def _done(action: str, name: str, message: str, *, done: bool = True) -> schemas.Outcome:
    return schemas.Outcome(action=action, what="image", name=name, done=done, message=message)


@images.command("keygen", short_help="Make a key to sign images with.")
@click.argument("file")
@as_json_option
def images_keygen(file: str, as_json: bool) -> None:
    """Make a key to sign images with: FILE, which only its owner can read, and FILE.pub for every node."""
    key, public = signatures.make_key(file)
    said = (f"made the key {key.public.name}: {file} signs and stays where images are made; copy {public} to every "
            "node and name it in snapshotter.image_keys")  # fmt: skip
    one = schemas.Outcome(action="made", what="key", name=key.public.name, done=True, message=said)
    tables.tell([one], as_json=as_json)


@images.command("make", short_help="Put an unpacked image on the shared storage.")
@click.argument("chain", metavar="CHAIN|KEY")
@_key_option
@as_json_option
@click.pass_obj
def images_make(load: Loader, chain: str, key_file: str | None, as_json: bool) -> None:
    """Put an unpacked chain, and every chain below it, onto the shared storage. The snapshotter must run.

    CHAIN is the chain id of an image's topmost layer, KEY what `runvol snapshots` shows for it.
    """
    config = load()
    share, store = _share(config), _own_store(config)
    key = signatures.private_key(key_file) if key_file else None
    made = []
    for row in reversed(_ancestry(store, chain)):
        reference = chain_of(row)
        if row.image == reference and not row.device:
            said = "it comes from there"
        elif (found := share.present(reference, key)) is not None:
            said = f"it is there, root {found.root}"
        else:
            said = _make(config, share, row, reference, key)
        made.append(_done("made", reference, f"{reference}: {said}"))
        if not as_json:
            tables.line(made[-1].message)
    if as_json:
        tables.tell(made, as_json=True)
    if key is None and not config.number("snapshotter.images_unsigned"):
        tables.line("not signed: nodes use these only if snapshotter.image_roots lists their roots, or once `runvol "
                    "images sign` has signed them", err=True)  # fmt: skip
    _tell_unknown(config, key)


def _tell_unknown(config: Config, key: PrivateKey | None) -> None:
    if key is not None and key.public.name not in _trust(config).names():
        tables.line(f"this node does not trust the key {key.public.name}: name its public key in "
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
            of = f" of {words(size)}" if size else ""
            tables.line(f"{reference[:19]}: {what}, {words(done)}{of}", err=True)

    return tell


def _make(config: Config, share: Share, row: Snapshot, reference: str, key: PrivateKey | None) -> str:
    with _borrowed(endpoints.path(config, "snapshotter.endpoint"), row.key) as device:
        manifest = share.make(reference, device, row.fstype, progress=_progress(reference, row.size), key=key)
    signed = f", signed by {key.public.name}" if key else ""
    return f"made, {words(manifest.size)} of {manifest.fstype}{signed}, root {manifest.root}"


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


@images.command("sign", short_help="Sign an image that is what its hashes say.")
@click.argument("chain", required=False)
@click.option("--all", "all_of_them", is_flag=True, help="Every image on the share.")
@click.option("--key", "key_file", metavar="FILE", required=True, help="The private key to sign with.")
@as_json_option
@click.pass_obj
def images_sign(load: Loader, chain: str | None, all_of_them: bool, key_file: str, as_json: bool) -> None:
    """Read the image of a CHAIN whole and sign what was read, if it is what its manifest says. Sign only what you
    trust."""
    config = load()
    share, store, key = _share(config), _store(config), signatures.private_key(key_file)
    if bool(chain) == all_of_them:
        raise click.UsageError("name a CHAIN or --all, one of the two")
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

    _each("signed", chosen, sign, as_json=as_json)
    _tell_unknown(config, key)


def _all(share: Share) -> list[str]:
    return share.ask("listing the images", share.chains, Deadline.after(_CALL))


def _each(action: str, chains: list[str], work: Callable[[str], str], *, as_json: bool) -> None:
    """Every one of them, whatever becomes of another; status 1 if one went wrong."""
    told: list[schemas.Outcome] = []
    for chain in chains:
        try:
            told.append(_done(action, chain, f"{chain}: {work(chain)}"))
        except SnapshotterError as error:
            told.append(_done(action, chain, f"{chain}: {error}", done=False))
        if not as_json:
            tables.line(told[-1].message, err=len(chains) == 1 and not told[-1].done)
    if as_json:
        tables.tell(told, as_json=True)
    elif not chains:
        tables.line("no images")
    if not all(one.done for one in told):
        raise SystemExit(troubles.FOUND)


@images.command("check", short_help="Read images whole and compare the hashes.")
@click.argument("chains", metavar="[CHAIN]...", nargs=-1)
@as_json_option
@click.pass_obj
def images_check(load: Loader, chains: tuple[str, ...], as_json: bool) -> None:
    """Read images whole and compare them with their hashes; all of them where no CHAIN is named. Status 1 for one that
    is not sound."""
    config = load()
    with troubles.looking():
        share, trust = _share(config), _trust(config)
        chosen = list(chains) or _all(share)

    def check(chain: str) -> str:
        problem = share.check(chain, _progress(chain))
        if problem:
            raise SnapshotterError(problem)
        said = share.said(chain, Deadline.after(_CALL))
        verdict = trust.judge(said) if said is not None else Verdict(why="it is gone")
        return f"sound, {verdict.by or verdict.why}"

    _each("checked", chosen, check, as_json=as_json)


@images.command("remove", short_help="Remove an image for all nodes.")
@click.argument("chain")
@click.option("--yes", is_flag=True, help="Do not ask.")
@as_json_option
@click.pass_obj
def images_remove(load: Loader, chain: str, yes: bool, as_json: bool) -> None:
    """Remove the image of a CHAIN. Nodes on which containers run from it keep it until they end, or until a reboot."""
    share = _share(load())
    if not yes:
        click.confirm(f"Remove the image of {chain} for all nodes?", abort=True, err=as_json)
    share.remove(chain)
    tables.tell([_done("removed", chain, f"removed {chain}")], as_json=as_json)


@images.command("forget", short_help="Let this node use an image made anew.")
@click.argument("chains", metavar="CHAIN...", nargs=-1, required=True)
@as_json_option
@click.pass_obj
def images_forget(load: Loader, chains: tuple[str, ...], as_json: bool) -> None:
    """Let this node use another image of a CHAIN than it did: one that was made anew. Nothing may stand on it."""
    store = _own_store(load())

    def forget(chain: str) -> str:
        shared.forget(store, chain)
        return "forgotten on this node"

    _each("forgotten", list(chains), forget, as_json=as_json)
