"""The commands about the FlexVolume driver: putting it where kubelet looks, and taking it away."""

from __future__ import annotations

import contextlib
import os
import re
import sys

import click

from blockdev import durable
from runvol.config import ConfigError

PLUGINS = "/usr/libexec/kubernetes/kubelet-plugins/volume/exec"
_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,61}[a-z0-9])?/[a-z0-9]([-a-z0-9.]{0,61}[a-z0-9])?\Z")
_PROGRAM = """#!{python} -I
import os

os.environ.setdefault("RUNVOL_FLEXVOLUME_LOG", {log!r})
os.environ.setdefault("RUNVOL_FLEXVOLUME_CALL_SECONDS", {seconds!r})
{config}
from runvol.flexvolume_driver import main

main()
"""


@click.group()
def flexvolume() -> None:
    """Install or remove the FlexVolume driver."""


_directory = click.option("--plugin-dir", default=PLUGINS, show_default=True, metavar="DIR", help="Of kubelet.")
_as = click.option("--as", "name", default="runvol/runvol", show_default=True, metavar="VENDOR/DRIVER",
                   help="alicloud/disk reads that driver's options.")  # fmt: skip


@flexvolume.command("install")
@_directory
@_as
@click.option("--log", default="/var/log/runvol/flexvolume.log", show_default=True, metavar="FILE")
@click.option("--call-seconds", default=100, show_default=True, help="When a call that has not ended is answered.")
@click.pass_context
def install(context: click.Context, plugin_dir: str, name: str, log: str, call_seconds: int) -> None:
    """Install the driver, or upgrade it under a running kubelet: its file is replaced in one step."""
    place, driver = _place(plugin_dir, name)
    os.makedirs(place, mode=0o755, exist_ok=True)
    file = context.find_root().params.get("file")
    text = _PROGRAM.format(
        python=sys.executable, log=os.path.abspath(log), seconds=str(call_seconds),
        config=f"os.environ.setdefault('RUNVOL_CONFIG', {os.path.abspath(file)!r})" if file else "",
    )  # fmt: skip
    # kubelet passes over names that begin with a dot.
    beside = os.path.join(place, f".{driver}.")
    durable.sweep(beside)
    durable.replace(os.path.join(place, driver), text.encode(), beside=beside, mode=0o755)
    click.echo(f"installed {name} in {place}")


@flexvolume.command("uninstall")
@_directory
@_as
def uninstall(plugin_dir: str, name: str) -> None:
    """Remove the driver. Volumes that are mounted stay, and kubelet can unmount them only after another install."""
    place, driver = _place(plugin_dir, name)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(os.path.join(place, driver))
        durable.sweep(os.path.join(place, f".{driver}."))
    try:
        os.rmdir(place)
    except FileNotFoundError:
        click.echo(f"{name} was not installed in {plugin_dir}")
        return
    except OSError as error:
        raise ConfigError(f"{place}: {error.strerror}; it holds files that are not the driver's") from None
    click.echo(f"removed {name} from {plugin_dir}")


def _place(plugin_dir: str, name: str) -> tuple[str, str]:
    if not _NAME.match(name):
        raise ConfigError(f"--as {name!r}: must be VENDOR/DRIVER, in small letters")
    return os.path.join(plugin_dir, name.replace("/", "~")), name.rpartition("/")[2]
