"""`runvol`: the command line. Commands are loaded when they are called, as a start should cost what it needs."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

import click

from runvol import config, logs, version

as_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")

_MODULES = {
    "runvol.volume_commands": (
        "csi", "nri", "volumes", "handoffs", "detect", "doctor", "gc", "bench", "show_config",
        "show_parameters",
    ),
    "runvol.where_command": ("where",),
    "runvol.snapshot_commands": ("snapshotter", "snapshots", "pool"),
    "runvol.image_commands": ("images",),
    "runvol.flexvolume_commands": ("flexvolume",),
    "runvol.migrate_commands": ("migrate",),
    "runvol.bundle_commands": ("support_bundle",),
}  # fmt: skip
_NAMES = {"show_config": "config", "show_parameters": "parameters", "support_bundle": "support-bundle"}
_COMMANDS = {_NAMES.get(name, name): (module, name) for module, names in _MODULES.items() for name in names}
# The base classes of the rooms' errors; only rooms that are loaded can have raised one.
_ERRORS = {
    "blockdev.errors": "BlockdevError",
    "volumes.errors": "VolumeError",
    "guestmount.errors": "GuestmountError",
    "snapshotter.errors": "SnapshotterError",
    "runvol.config": "ConfigError",
}


class _Program(click.Group):
    """Turns every error of the rooms into one sentence and a status, whatever the command."""

    def list_commands(self, _context: click.Context) -> list[str]:
        return sorted(_COMMANDS)

    def get_command(self, _context: click.Context, name: str) -> click.Command | None:
        if name not in _COMMANDS:
            return None
        module, attribute = _COMMANDS[name]
        found: click.Command = getattr(importlib.import_module(module), attribute)
        return found

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except PermissionError as error:
            raise click.ClickException(f"{error.filename}: permission denied; run runvol as root") from error
        except Exception as error:
            if isinstance(error, _expected()):
                raise click.ClickException(str(error)) from error
            raise


def _expected() -> tuple[type[Exception], ...]:
    return tuple(getattr(sys.modules[module], name) for module, name in _ERRORS.items() if module in sys.modules)


@click.group(cls=_Program, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--version", is_flag=True, expose_value=False, is_eager=True, help="Show the version and exit.",
              callback=lambda context, _, wanted: _version(context) if wanted else None)  # fmt: skip
@click.option("--config", "file", metavar="FILE", help=f"Settings (default {config.DEFAULT_FILE}, if it exists).")
@click.option("--state-dir", metavar="DIR", help="Volumes and their store.")
@click.option("--run-dir", metavar="DIR", help="Claims and locks.")
@click.option("--log-level", metavar="LEVEL", help="debug, info, warning or error.")
@click.pass_context
def main(
    context: click.Context, file: str | None, state_dir: str | None, run_dir: str | None, log_level: str | None
) -> None:
    """Storage for pods in lightweight VMs: the guest gets the block device, not a share."""
    flags = {"paths.state_dir": state_dir, "paths.run_dir": run_dir, "log.level": log_level}
    context.obj = lambda **more: _load(file, flags | more)


def _version(context: click.Context) -> None:
    click.echo(f"runvol, version {version()}")
    context.exit()


def _load(file: str | None, flags: dict[str, Any]) -> config.Config:
    loaded = config.load(file=file, flags=flags)
    logs.start(loaded.text("log.level"), loaded.text("log.format"))
    return loaded


Loader = Callable[..., config.Config]
