"""The commands about the FlexVolume driver: putting it where kubelet looks, and taking it away."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shlex
import sys
from collections.abc import Mapping

import click

from blockdev import daemon, durable
from runvol import schemas, tables
from runvol.cli import Loader, as_json_option
from runvol.config import FILE_VARIABLE, Config, ConfigError, variable_of
from runvol.flexvolume_driver import INIT

PLUGINS = "/usr/libexec/kubernetes/kubelet-plugins/volume/exec"
_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,61}[a-z0-9])?/[a-z0-9]([-a-z0-9.]{0,61}[a-z0-9])?\Z")
_PROGRAM = """#!{python} -I
import os

{settings}
from runvol.flexvolume_driver import main

main()
"""
# Where the plugin is a container, kubelet's side is this. It prints one JSON object, and nothing besides.
_THROUGH = """#!/bin/sh
# The FlexVolume driver of runvol: its node plugin's container does the work, and is found by the plugin's process.
if [ "$1" = init ]; then
    echo '{init}'
    exit 0
fi
refuse() {{
    echo "{{\\"status\\": \\"Failure\\", \\"message\\": \\"$1\\"}}"
    exit 1
}}
absent='the node plugin of runvol does not run on this node'
for needed in cat env nsenter; do
    command -v "$needed" >/dev/null || refuse "the program $needed is not installed where kubelet runs"
done
{{ read -r pid began < {told}; }} 2>/dev/null || refuse "$absent"
# What is opened is what is entered, whoever has the number later. A process names itself as it likes: the word that
# counts is the twentieth behind the last bracket (proc(5)).
began_of() {{
    shift 19
    echo "$1"
}}
{{
    said=$(cat "/proc/$pid/stat")
    set -f
    [ "$(began_of ${{said##*) }})" = "${{began:-none}}" ] || refuse "$absent"
    reply=$(nsenter --mount=/proc/self/fd/3 -- env {settings} {program} "$@")
    status=$?
}} 2>/dev/null 3< "/proc/$pid/ns/mnt" || refuse "$absent"
[ "${{reply#\\{{}}" != "$reply" ] || refuse "the container of the node plugin cannot be entered, or gave no answer"
printf '%s\\n' "$reply"
exit $status
"""


@click.group(short_help="Install or remove the FlexVolume driver.")
def flexvolume() -> None:
    """Install or remove the FlexVolume driver."""


_directory = click.option("--plugin-dir", default=PLUGINS, show_default=True, metavar="DIR",
                          help="Where kubelet looks for drivers.")  # fmt: skip
_as = click.option("--as", "name", default="runvol/runvol", show_default=True, metavar="VENDOR/DRIVER",
                   help="The driver's name; alicloud/disk and alicloud/nas read those drivers' options.")  # fmt: skip


@flexvolume.command("install", short_help="Put the driver where kubelet looks.")
@_directory
@_as
@click.option("--log", default="/var/log/runvol/flexvolume.log", show_default=True, metavar="FILE",
              help="Where the driver writes what it did.")  # fmt: skip
@click.option("--call-seconds", default=100, show_default=True, metavar="SECONDS",
              help="After which a call that has not ended is answered.")  # fmt: skip
@click.option(
    "--through-plugin",
    is_flag=True,
    help="For a node plugin in a container: what kubelet executes on the node enters it. Run it in there.",
)
@as_json_option
@click.pass_obj
def install(
    load: Loader, plugin_dir: str, name: str, log: str, call_seconds: int, through_plugin: bool, as_json: bool
) -> None:
    """Install the driver, or upgrade it under a running kubelet: its file is replaced in one step.

    The settings that are given by --config, --state-dir and --run-dir, or by RUNVOL_CONFIG, are the driver's too.
    """
    config = load()
    place, driver = _place(plugin_dir, name)
    os.makedirs(place, mode=0o755, exist_ok=True)
    settings = {"RUNVOL_FLEXVOLUME_LOG": os.path.abspath(log), "RUNVOL_FLEXVOLUME_CALL_SECONDS": str(call_seconds),
                **_given(config)}  # fmt: skip
    if through_plugin:
        text = _through_plugin(config.text("paths.run_dir"), driver, settings)
    else:
        text = _PROGRAM.format(
            python=sys.executable,
            settings="".join(f"os.environ.setdefault({key!r}, {value!r})\n" for key, value in settings.items()),
        )
    # kubelet passes over names that begin with a dot.
    beside = os.path.join(place, f".{driver}.")
    durable.sweep(beside)
    durable.replace(os.path.join(place, driver), os.fsencode(text), beside=beside, mode=0o755)
    _tell("installed", name, f"installed {name} in {place}", as_json)


def _given(config: Config) -> dict[str, str]:
    """What this command line says of the settings."""
    directories = {variable_of(key): os.path.abspath(config.text(key)) for key in ("paths.state_dir", "paths.run_dir")
                   if config.sources[key].startswith("--")}  # fmt: skip
    return directories | ({FILE_VARIABLE: os.path.abspath(config.file)} if config.file else {})


def _tell(action: str, name: str, message: str, as_json: bool) -> None:
    one = schemas.Outcome(action=action, what="driver", name=name, done=True, message=message)
    tables.tell([one], as_json=as_json)


def _through_plugin(run_dir: str, driver: str, settings: Mapping[str, str]) -> str:
    """The node's side of a plugin in a container, with this container's settings. Its log is the run directory's, since
    little else in a container may be written."""
    own = {name: value for name, value in os.environ.items() if name.startswith("RUNVOL_") and name not in settings}
    words = {**own, **settings, "RUNVOL_FLEXVOLUME_NAME": driver}
    script = os.path.join(os.path.dirname(os.path.abspath(sys.argv[0])), "runvol-flexvolume")
    program = [script] if os.path.exists(script) else [sys.executable, "-m", "runvol.flexvolume_driver"]
    return _THROUGH.format(
        init=INIT, told=shlex.quote(daemon.told_process(run_dir)), program=shlex.join(program),
        settings=" ".join(shlex.quote(f"{name}={value}") for name, value in sorted(words.items())),
    )  # fmt: skip


@flexvolume.command("uninstall", short_help="Take the driver away.")
@_directory
@_as
@as_json_option
def uninstall(plugin_dir: str, name: str, as_json: bool) -> None:
    """Take the driver away. Volumes that are mounted stay, and kubelet can unmount them only after another install."""
    place, driver = _place(plugin_dir, name)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(os.path.join(place, driver))
        durable.sweep(os.path.join(place, f".{driver}."))
    try:
        os.rmdir(place)
    except FileNotFoundError:
        _tell("removed", name, f"{name} was not installed in {plugin_dir}", as_json)
        return
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        raise click.ClickException(f"{place} holds files that are not the driver's, and stays") from None
    _tell("removed", name, f"removed {name} from {plugin_dir}", as_json)


def _place(plugin_dir: str, name: str) -> tuple[str, str]:
    if not _NAME.match(name):
        raise ConfigError(f"--as {name!r}: must be VENDOR/DRIVER, in small letters")
    return os.path.join(plugin_dir, name.replace("/", "~")), name.rpartition("/")[2]
