"""`runvol support-bundle`."""

from __future__ import annotations

import os
import re
import sys
import time

import click

from runvol import tables, troubles
from runvol.cli import Loader
from runvol.sizes import words as size

_NAMESPACE = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")


@click.command("support-bundle", short_help="Pack what a maintainer needs into one file.")
@click.argument("file", required=False, type=click.Path(dir_okay=False))
@click.option(
    "--namespace",
    default="",
    metavar="NAME",
    help="Where runvol's own pods are, of whose logs the newest "
    "are taken; default: this pod's namespace, else runvol-system.",
)
@click.pass_obj
def support_bundle(load: Loader, file: str | None, namespace: str) -> None:
    """Pack what a maintainer needs into FILE (default: runvol-NODE-TIME.tar.gz here), secrets left out.

    Doctor's findings, settings, lists, claims, hand-offs, containerd's and Kata's configuration, mounts, metrics, logs
    of two days and the kernel's messages about storage. Look through it before you give it away. Status 3 if a part had
    to be left out; MANIFEST.json in it says why.
    """
    from runvol import bundle

    if namespace and not _NAMESPACE.fullmatch(namespace):
        raise click.BadParameter(
            "it is no name of a namespace: a to z, 0 to 9 and -, 63 at most", param_hint="--namespace"
        )
    config = load()
    name = f"runvol-{config.node_id}-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}"
    path = file or f"{name}.tar.gz"
    if os.path.lexists(path):  # which is known before anything is asked
        raise click.ClickException(f"{path} exists, and nothing is written over; name another file")
    with troubles.looking():
        made = bundle.collect(config, namespace=namespace)
    try:
        count = bundle.pack(made, path, name)
    except FileExistsError:
        raise click.ClickException(f"{path} exists, and nothing is written over; name another file") from None
    except OSError as error:
        raise click.ClickException(f"{path}: {error.strerror}") from error
    tables.line(f"{path}: {len(made.content)} parts, {size(count)}; look through it before you give it away")
    for one in made.left_out:
        tables.line(f"left out: {one.name}: {one.left_out}", err=True)
    sys.exit(troubles.NOT_SEEN if made.left_out else troubles.FINE)
