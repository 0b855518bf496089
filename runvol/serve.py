"""`runvol csi`: serve until a signal says stop."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from blockdev import daemon
from guestmount import BadRequest, Node, boot, repair
from runvol import assembly, endpoints, observed, version
from runvol.config import Config
from volumes import work

if TYPE_CHECKING:
    from csi import Server
    from csi.kubelet import Registration

log = logging.getLogger("runvol")

# Seconds that threads without work have to end.
_MOMENT, _STEP = 1.0, 0.01


def leave() -> None:
    """End the process, whatever hangs in its threads: nothing of what they do is believed before it is on the disk."""
    until = time.monotonic() + _MOMENT
    while left := [one.name for one in threading.enumerate() if not one.daemon and one is not threading.main_thread()]:
        if time.monotonic() > until:
            log.warning("calls that hang are left behind", extra={"threads": left})
            logging.shutdown()
            os._exit(0)
        time.sleep(_STEP)


def _repair(node: Node, state_dir: str) -> None:
    """Beside the calls, since it may take long."""
    for step in (functools.partial(boot.forget_others, state_dir), functools.partial(repair.behind, node)):
        try:
            _tell(step())
        except Exception:
            log.exception("a repair failed; it is tried again at the next start and by gc")
    log.info("repairs done")


def _tell(done: Sequence[str]) -> None:
    for one in done:
        log.warning("repaired", extra={"what": one})


def _registrations(config: Config, servers: Sequence[Server]) -> Iterator[Registration]:
    from csi import kubelet

    registry = kubelet.registry(config.text("csi.plugins_registry"), config.words("node.roots"))
    for server in servers if registry else ():
        told = kubelet.told_at(config.text("paths.run_dir"), server.name)
        yield kubelet.Registration(
            server.name, endpoint=server.path, registry=registry, alive=server.answers, told=told
        )


def _registered(registrations: Sequence[Registration]) -> int:
    """How often, of all of them; 0 while one is not."""
    times = [one.registered for one in registrations]
    return sum(times) if all(times) else 0


@contextlib.contextmanager
def _introduced(config: Config, servers: Sequence[Server]) -> Iterator[None]:
    """kubelet is told of each driver, and the node takes pods then."""
    registrations = [*_registrations(config, servers)]
    for registration in registrations:
        registration.start()
    taint = assembly.startup_taint(config, lambda: _registered(registrations))
    if taint is not None and registrations:
        taint.start()
    yield
    if taint is not None:
        taint.stop()
    for registration in registrations:
        registration.end()  # of each while others are waited for
    for registration in registrations:
        registration.stop()


def _alone(config: Config, *keys: str) -> Iterator[int]:
    """What keeps a second plugin from this node's volumes, before the first of them is looked at. BadRequest."""
    for key in keys:
        directory = config.text(key)
        if key == "paths.run_dir":
            os.makedirs(directory, mode=0o700, exist_ok=True)
        try:
            yield daemon.hold(os.path.join(directory, "plugin.lock"))
        except daemon.Held as held:
            words = f"process {held.pid} serves it" if held.pid else "another process serves it"
            raise BadRequest(key, directory, f"{words} already; stop that one first") from None
        except FileNotFoundError:
            continue  # not made yet
        except OSError as error:  # it takes no writes
            log.info("a second plugin would not be seen by this directory",
                     extra={"directory": directory, "why": str(error)})  # fmt: skip


def csi_plugin(config: Config) -> None:
    """Listen, repair what the last process left, and end gracefully on SIGTERM or SIGINT."""
    # mkfs and fsck are forked; gRPC's own fork handlers would stop every call for that.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    from csi import Server, drivers
    from csi.call_book import CallBook
    from flexvolume.service import Service

    told = daemon.signals()
    assembly.check_mounted(config)
    for key in ("csi.endpoint", "csi.nfs_endpoint"):
        if config.text(key):
            endpoints.path(config, key)
    held = [*_alone(config, "paths.run_dir", "paths.state_dir")]
    sign = daemon.sign_of(config.text("paths.run_dir"))
    with contextlib.suppress(FileNotFoundError):
        os.unlink(sign)  # of the last process
    node = assembly.build(config)
    book = CallBook()
    servers = [
        Server(
            node,
            node_id=config.node_id,
            endpoint=config.text(key),
            version=version(),
            services=config.words("csi.services"),
            driver=driver(node, central="node" not in config.words("csi.services")),
            sources=assembly.claim_sources(config),
            book=book,
        )
        for key, driver in (("csi.endpoint", drivers.of_nodes), ("csi.nfs_endpoint", drivers.of_nfs))
        if config.text(key)
    ]
    # Only a node's plugin mounts for kubelet.
    doubt = node.reach.doubt() if node.reach is not None and "node" in config.words("csi.services") else None
    if doubt is not None:
        log.error("mounts may not reach kubelet", extra={"why": doubt.why, "certain": doubt.certain})
    assembly.warm(node)
    work.tell(config.text("paths.run_dir"))
    watching = observed.csi_plugin(config, node, book, servers)
    node.catalog.prepare()
    held += _alone(config, *(() if len(held) > 1 else ("paths.state_dir",)))  # there by now
    _tell(repair.before_serving(node))
    for server in servers:
        server.start()
    flexvolume = (
        Service(node, config.text("paths.run_dir"), assembly.records(config))
        if "node" in config.words("csi.services")
        else None
    )
    if flexvolume is not None:
        flexvolume.start()
        daemon.tell_process(config.text("paths.run_dir"))
    known = contextlib.ExitStack()
    if "node" in config.words("csi.services"):
        known.enter_context(_introduced(config, servers))
    daemon.notify("READY=1")
    daemon.watched(lambda: all(server.answers() for server in servers), sign)
    served = [config.text(key) for key in ("csi.endpoint", "csi.nfs_endpoint") if config.text(key)]
    log.info("serving", extra={"endpoint": ", ".join(served), "node": config.node_id,
                               "services": list(config.words("csi.services")), "version": version()})  # fmt: skip
    threading.Thread(target=_repair, args=(node, config.text("paths.state_dir")), name="repair", daemon=True).start()
    for one in watching:
        one.start()
    told.recv(1)
    log.info("stopping")
    daemon.notify("STOPPING=1")
    for one in watching:
        one.stop()
    known.close()
    if flexvolume is not None:
        flexvolume.stop()
    for server in servers:
        server.stop()
    for fd in held:  # what hangs in the kernel keeps nobody from the node
        os.close(fd)
    node.catalog.close()
    leave()
