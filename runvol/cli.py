"""`runvol`: the command line. Commands are loaded when they are called, as a start should cost what it needs."""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import click

from blockdev.printable import printable
from runvol import config, logs, options, troubles, version
from runvol.options import as_json_option

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
_SERVICES = ("csi", "nri", "snapshotter")
_NAMES = {"show_config": "config", "show_parameters": "parameters", "support_bundle": "support-bundle"}
_COMMANDS = {_NAMES.get(name, name): (module, name) for module, names in _MODULES.items() for name in names}


def _failed(said: str, status: int) -> click.ClickException:
    found = click.ClickException(printable(said, lines=True))
    vars(found)["exit_code"] = status
    return found


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """ClickException, which is told as an error, for whatever else is expected."""
    try:
        yield
    except click.ClickException as error:
        vars(error)["message"] = printable(error.message, lines=True)
        raise
    except Exception as error:
        # Who read the output has gone, which click knows how to take.
        if isinstance(error, OSError) and error.errno == errno.EPIPE:
            raise
        said = troubles.sentence(error)
        if said is None:
            raise
        _unsaid()
        raise _failed(said, troubles.status(error)) from error


def _unsaid() -> None:
    """What could not be written out is not tried once more at the end, where nobody would take the error."""
    try:
        sys.stdout.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        os.dup2(nowhere, 1)
        os.close(nowhere)


class _Program(click.Group):
    """Turns every error that is expected into one sentence and a status, whatever the command."""

    def list_commands(self, _context: click.Context) -> list[str]:
        return sorted(_COMMANDS)

    def get_command(self, _context: click.Context, name: str) -> click.Command | None:
        if name not in _COMMANDS:
            return None
        module, attribute = _COMMANDS[name]
        found: click.Command = getattr(importlib.import_module(module), attribute)
        options.everywhere(found)
        return found

    def make_context(self, *arguments: Any, **more: Any) -> click.Context:
        with _told():  # `--help` writes here
            return super().make_context(*arguments, **more)

    def invoke(self, context: click.Context) -> Any:
        with _told():
            return super().invoke(context)


@click.group(
    cls=_Program,
    params=options.own(hidden=False),
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Options may stand before or behind the command. Status: 0 fine, 1 something is wrong or failed, 2 wrong "
    "usage, 3 it could not be looked at.",
)
@click.option("--json", "as_json", is_flag=True, expose_value=False, callback=options.pass_json,
              help="Print JSON, for whatever tells something.")  # fmt: skip
@click.option("--version", is_flag=True, expose_value=False, is_eager=True, help="Show the version and exit.",
              callback=lambda context, _, wanted: _version(context) if wanted else None)  # fmt: skip
@click.pass_context
def main(context: click.Context) -> None:
    """Storage for pods in lightweight VMs: the guest gets the block device, not a share."""
    context.obj = lambda **more: _load(options.given(context), more)


def _version(context: click.Context) -> None:
    click.echo(f"runvol, version {version()}")
    context.exit()


def _load(given: dict[str, str], more: dict[str, Any]) -> config.Config:
    flags = {key: value for key, value in given.items() if key != "file"}
    with troubles.ending(troubles.LOOKING):
        loaded = config.load(file=given.get("file"), flags=flags | more)
    # What a person reads beside a listing is trouble; a service tells what it does.
    quiet = loaded.sources["log.level"] == config.DEFAULT and click.get_current_context().info_name not in _SERVICES
    logs.start("warning" if quiet else loaded.text("log.level"), loaded.text("log.format"))
    return loaded


Loader = Callable[..., config.Config]

__all__ = ["Loader", "as_json_option", "main"]
