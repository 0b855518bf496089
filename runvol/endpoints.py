"""Settings that are sockets of runvol's own."""

from __future__ import annotations

from blockdev import daemon
from runvol.config import Config, ConfigError


def path(config: Config, key: str) -> str:
    """The path of `unix:///run/runvol/csi.sock`; ConfigError, with who said it, for anything else."""
    try:
        return daemon.socket_path(config.text(key))
    except ValueError as error:
        raise ConfigError(f"{config.said(key)}: {error}") from None
