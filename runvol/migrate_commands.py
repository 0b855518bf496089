"""`runvol migrate flexvolume`: from FlexVolume's PersistentVolumes to CSI's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import yaml

from blockdev import durable
from flexvolume.migrate import Outcome
from flexvolume.migrate import migrate as mapped
from runvol import assembly, tables
from runvol.cli import Loader
from runvol.config import ConfigError


@click.group()
def migrate() -> None:
    """Move volumes from another way of using them to CSI."""


@migrate.command("flexvolume")
@click.argument("files", nargs=-1, type=click.Path(exists=True, dir_okay=False, allow_dash=True))
@click.option("--kubeconfig", metavar="FILE", help="Read the PersistentVolumes from this cluster instead of FILES.")
@click.option(
    "--write", "directory", metavar="DIR", help="Write the manifests there; without it only the plan is shown."
)
@click.option("--anywhere", is_flag=True, help="Do not ask whether the volumes are on this node.")
@click.pass_obj
def from_flexvolume(
    load: Loader, files: tuple[str, ...], kubeconfig: str | None, directory: str | None, anywhere: bool
) -> None:
    """Map FlexVolume PersistentVolumes in FILES (`kubectl get pv -o yaml`; `-` for standard input) to CSI ones.

    Nothing is changed in the cluster. Status 1 if one cannot be mapped.
    """
    if bool(files) == bool(kubeconfig):
        raise ConfigError("name FILES or --kubeconfig, one of the two")
    documents = _from_cluster(kubeconfig) if kubeconfig else [one for file in files for one in _from_file(file)]
    known = None
    if not anywhere:
        known = frozenset(volume.volume_id for _place, volume in assembly.build(load()).catalog.list())
    found = mapped(documents, known)
    rows = [{"volume": one.name, "becomes": _becomes(one), "why_not": one.refused} for one in found]
    tables.show(rows, ("volume", "becomes", "why_not"), as_json=False, empty="no FlexVolume PersistentVolumes")
    if directory is not None:
        Path(directory).mkdir(parents=True, exist_ok=True)
        for one in found:
            if one.manifests:
                path = Path(directory) / f"{one.name}.yaml"
                text = yaml.safe_dump_all(one.manifests, sort_keys=False)
                durable.replace(str(path), text.encode(), mode=0o644)
                click.echo(f"wrote {path}")
    if any(one.refused for one in found):
        raise SystemExit(1)


def _becomes(outcome: Outcome) -> str:
    if not outcome.manifests:
        return ""
    return f"{outcome.manifests[0]['spec']['csi']['volumeHandle']} as {outcome.manifests[0]['metadata']['name']}"


def _from_file(file: str) -> list[Any]:
    with click.open_file(file) as opened:
        try:
            documents = [one for one in yaml.safe_load_all(opened) if isinstance(one, dict)]
        except yaml.YAMLError as error:
            raise ConfigError(f"{file} is no YAML: {error}") from None
    return [item for one in documents for item in (one.get("items") or [] if one.get("kind") == "List" else [one])]


def _from_cluster(kubeconfig: str) -> list[Any]:
    from kubernetes import client, config

    try:
        made: Any = config.new_client_from_config(kubeconfig)  # type: ignore[no-untyped-call]
        listed = client.CoreV1Api(made).list_persistent_volume(_request_timeout=20)
        plain = made.sanitize_for_serialization(listed)
    except Exception as error:
        raise ConfigError(f"asking the cluster of {kubeconfig}: {error}") from None
    return [{**item, "kind": "PersistentVolume"} for item in plain.get("items", [])]
