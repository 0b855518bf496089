"""`runvol snapshotter`: serve containerd until a signal says stop."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import logging
import os
import stat

from blockdev import Deadline
from runvol import endpoints, sizes, version
from runvol.config import Config, ConfigError
from runvol.gauge_place import gauge_path
from snapshotter.errors import PoolRefused, Unavailable
from snapshotter.node import Node, Settings
from snapshotter.pool import Limits

# Seconds.
_LOOKING = 3.0


def state_dir(config: Config) -> str:
    return config.text("snapshotter.state_dir")


def limits(config: Config) -> Limits:
    """The pool's thresholds, as configured."""
    return Limits(
        data_reserve=config.number("pool.data_reserve_percent"),
        extend_above=config.number("pool.autoextend_threshold"),
        extend_by=config.number("pool.autoextend_percent"),
    )


def settings_of(config: Config) -> Settings:
    """The snapshotter's own settings."""
    idle, call = config.number("snapshotter.unmap_idle_seconds"), config.number("snapshotter.call_seconds")
    pairs = (one.partition("=") for one in config.words("snapshotter.namespace_sizes"))
    return Settings(
        state_dir=state_dir(config),
        fstype=config.text("snapshotter.fstype"),
        size=config.number("snapshotter.size_bytes"),
        by_namespace={name: sizes.parse(size) for name, _, size in pairs},
        limits=limits(config),
        images=config.text("snapshotter.images"),
        image_keys=config.words("snapshotter.image_keys"),
        image_roots=config.text("snapshotter.image_roots"),
        images_unsigned=bool(config.number("snapshotter.images_unsigned")),
        verity=bool(config.number("snapshotter.verity")),
        share_layers=bool(config.number("snapshotter.share_layers")),
        unmap_idle=max(idle, call) if idle else 0,
        discard=bool(config.number("snapshotter.discard")),
        gauge=gauge_path(config),
    )


def _check_images(config: Config) -> None:
    """ConfigError for a directory that is not there. One that does not answer may come back."""
    directory = config.text("snapshotter.images")
    if not directory:
        return
    from snapshotter.images import Share

    def wrong() -> str:
        try:
            return "" if stat.S_ISDIR(os.stat(directory).st_mode) else "is no directory"
        except (FileNotFoundError, NotADirectoryError):
            return "does not exist; mount the storage first, or leave the setting out"
        except OSError:
            return ""

    with contextlib.suppress(Unavailable):
        found = Share(directory).ask(f"looking at {directory}", wrong, Deadline.after(_LOOKING))
        if found:
            raise ConfigError(f"{config.said('snapshotter.images')}: {found}")


def serve(config: Config, pool_name: str | None) -> None:
    """Listen at once, assemble and recover behind, end gracefully on SIGTERM or SIGINT."""
    # thin_ls is forked; gRPC's own fork handlers would stop every call for that.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    from snapshotter import server

    # SQLite maps a file of the store into memory: a filesystem that shuts down ends the process by SIGBUS. It is said.
    faulthandler.enable()
    endpoints.path(config, "snapshotter.endpoint")
    _check_images(config)
    node = Node(settings_of(config))
    if pool_name is not None and node.pool.name != pool_name:
        raise PoolRefused(f"--pool {pool_name}: {state_dir(config)} describes pool {node.pool.name}")
    # Kept open as long as the process lives.
    server.alone(config.text("snapshotter.endpoint"), state_dir(config), node.pool.identity)
    observe = None
    if config.text("snapshotter.metrics"):
        from snapshotter import metrics

        observe = metrics.serve(node, config.text("snapshotter.metrics"), version=version())
    limit = config.number("snapshotter.call_seconds")
    # What a start has made stays; the collector need not look at it again.
    gc.freeze()
    gc.enable()
    if not server.serve(node, endpoint=config.text("snapshotter.endpoint"), limit=limit, observe=observe):
        # The interpreter's own end would close the store, which hangs.
        logging.shutdown()
        os._exit(0)
