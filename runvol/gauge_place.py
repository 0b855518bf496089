"""Where the filesystem is that shows the pool's fill, and what kubelet was told before there was one."""

from __future__ import annotations

import os

from runvol.config import Config


def gauge_path(config: Config) -> str:
    """Where it is mounted; empty for nowhere."""
    said = config.text("snapshotter.gauge")
    return os.path.join(config.text("snapshotter.state_dir"), "gauge") if said == "auto" else said


def former_roots(config: Config) -> tuple[str, ...]:
    """What other settings, and earlier releases, have had written as `exports.root` of containerd's entry."""
    default = os.path.join(config.text("snapshotter.state_dir"), "gauge")
    return (config.text("paths.state_dir"), default)
