"""`runvol migrate flexvolume`: from FlexVolume's PersistentVolumes to CSI's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import yaml

from blockdev import durable
from flexvolume.migrate import Outcome
from flexvolume.migrate import migrate as mapped
from runvol import assembly, schemas, tables, troubles
from runvol.cli import Loader, as_json_option
from runvol.config import ConfigError


@click.group(short_help="Move volumes from another way of use to CSI.")
def migrate() -> None:
    """Move volumes from another way of using them to CSI."""


@migrate.command("flexvolume", short_help="Map FlexVolume PersistentVolumes to CSI's.")
@click.argument("files", metavar="[FILE]...", nargs=-1, type=click.Path(exists=True, dir_okay=False, allow_dash=True))
@click.option("--kubeconfig", metavar="FILE", help="Read the PersistentVolumes from this cluster instead of a FILE.")
@click.option(
    "--write", "directory", metavar="DIR", help="Write the manifests there; without it only the plan is shown."
)
@click.option("--anywhere", is_flag=True, help="Do not ask whether the volumes are on this node.")
@as_json_option
@click.pass_obj
def from_flexvolume(
    load: Loader, files: tuple[str, ...], kubeconfig: str | None, directory: str | None, anywhere: bool, as_json: bool
) -> None:
    """Map FlexVolume PersistentVolumes in each FILE (`kubectl get pv -o yaml`; `-` for standard input) to CSI ones.

    Nothing is changed in the cluster. Status 1 if one cannot be mapped.
    """
    if bool(files) == bool(kubeconfig):
        raise click.UsageError("name a FILE or --kubeconfig, one of the two")
    documents = _from_cluster(kubeconfig) if kubeconfig else [one for file in files for one in _from_file(file)]
    known = None
    if not anywhere:
        known = frozenset(volume.volume_id for _place, volume in assembly.build(load()).catalog.list())
    found = mapped(documents, known)
    items = [_item(one, directory) for one in found]
    if directory is not None:
        Path(directory).mkdir(parents=True, exist_ok=True)
        for one, item in zip(found, items, strict=True):
            if item.file:
                text = yaml.safe_dump_all(one.manifests, sort_keys=False)
                durable.replace(item.file, text.encode(), mode=0o644)
    columns: tables.Columns[schemas.Migration] = ["persistent_volume", "becomes", "volume", "file", "why_not"]
    tables.show(schemas.Migration, items, columns, as_json=as_json, empty="no FlexVolume PersistentVolumes")
    if any(one.refused for one in found):
        raise SystemExit(troubles.FOUND)


def _item(outcome: Outcome, directory: str | None) -> schemas.Migration:
    made = outcome.manifests[0] if outcome.manifests else None
    return schemas.Migration(
        persistent_volume=outcome.name,
        becomes=made["metadata"]["name"] if made else None,
        volume=made["spec"]["csi"]["volumeHandle"] if made else None,
        why_not=outcome.refused or None,
        file=str(Path(directory) / f"{outcome.name}.yaml") if made and directory is not None else None,
    )


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
        raise troubles.NotSeen(f"asking the cluster of {kubeconfig}: {error}") from None
    return [{**item, "kind": "PersistentVolume"} for item in plain.get("items", [])]
