"""FlexVolume's PersistentVolumes as CSI ones with the same data: manifests to apply, and why one cannot be mapped.

A PersistentVolume's source cannot be changed, so each becomes a new one; its claim is bound to it by name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flexvolume.options import parse
from guestmount import BadRequest
from volumes import InvalidParameter, parameters

CSI_DRIVER = "csi.runvol.io"
# By FlexVolume driver: the name whose options it reads.
DRIVERS: Mapping[str, str] = {"runvol/runvol": "runvol", "alicloud/disk": "disk", "alicloud/nas": "nas"}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One PersistentVolume: what to apply, or why it stays as it is."""

    name: str
    manifests: tuple[dict[str, Any], ...] = ()
    refused: str = ""


def migrate(documents: Sequence[Mapping[str, Any]], known_volumes: frozenset[str] | None = None) -> list[Outcome]:
    """What becomes of each PersistentVolume among `documents`; other kinds are passed over.

    With `known_volumes` an id that is not among them is refused: its node has nothing of that name.
    """
    return [
        _one(document, known_volumes)
        for document in documents
        if document.get("kind") == "PersistentVolume" and "flexVolume" in (document.get("spec") or {})
    ]


def _one(document: Mapping[str, Any], known_volumes: frozenset[str] | None) -> Outcome:
    name = str((document.get("metadata") or {}).get("name", ""))
    spec = document["spec"]
    flex = spec["flexVolume"] or {}
    try:
        handle, attributes, flags = _mapped(flex, known_volumes)
    except ValueError as error:
        return Outcome(name=name, refused=str(error))
    kept = ("accessModes", "capacity", "nodeAffinity", "volumeMode")
    claim = spec.get("claimRef")
    new: dict[str, Any] = {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": f"{name}-csi", "labels": (document.get("metadata") or {}).get("labels") or {}},
        "spec": {
            **{key: spec[key] for key in kept if key in spec},
            # Nothing is deleted by a migration that is taken back.
            "persistentVolumeReclaimPolicy": "Retain",
            "storageClassName": spec.get("storageClassName", ""),
            "csi": {
                "driver": CSI_DRIVER,
                "volumeHandle": handle,
                **({"fsType": flex["fsType"]} if flex.get("fsType") else {}),
                **({"readOnly": True} if flex.get("readOnly") else {}),
                **({"volumeAttributes": attributes} if attributes else {}),
            },
        },
    }
    options = [*(spec.get("mountOptions") or []), *flags]
    if options:
        new["spec"]["mountOptions"] = options
    if not claim:
        return Outcome(name=name, manifests=(new,))
    new["spec"]["claimRef"] = {"namespace": claim["namespace"], "name": f"{claim['name']}-csi"}
    return Outcome(name=name, manifests=(new, _claim(claim, new)))


def _mapped(flex: Mapping[str, Any], known_volumes: frozenset[str] | None) -> tuple[str, dict[str, str], list[str]]:
    """Handle, attributes and mount options; ValueError says why there are none."""
    driver = str(flex.get("driver", ""))
    if driver not in DRIVERS:
        raise ValueError(f"driver {driver!r} is not runvol's; known are {', '.join(DRIVERS)}")
    if flex.get("secretRef"):
        raise ValueError("it names a secret (secretRef), and no volume of runvol's takes one")
    try:
        asked = parse(json.dumps({key: str(value) for key, value in (flex.get("options") or {}).items()}),
                      driver=DRIVERS[driver])  # fmt: skip
        attributes = parameters.check_context({"runtime": asked.runtime}) if asked.runtime else {}
        if asked.described.get("backend") == "nfs":
            for key in ("server", "path"):
                if not asked.described.get(key):
                    raise InvalidParameter(key, "", "must be given")
            attributes |= parameters.check_context(asked.described)
            named = f"{asked.described.get('server')} {asked.described.get('path')} {sorted(attributes.items())}"
            return f"nfs-{hashlib.sha256(named.encode()).hexdigest()[:32]}", attributes, list(asked.mount_flags)
    except (BadRequest, InvalidParameter) as error:
        raise ValueError(str(error)) from None
    if asked.described:
        raise ValueError(
            f"it is described by a path of its node ({asked.described}), which CSI has no volumes for; take an image "
            "file over by `runvol volumes adopt`"
        )
    if known_volumes is not None and asked.volume not in known_volumes:
        raise ValueError(
            f"the volume {asked.volume!r} is not on this node; run the migration where it is, or adopt it first"
        )
    return asked.volume, attributes, list(asked.mount_flags)


def _claim(claim: Mapping[str, Any], volume: Mapping[str, Any]) -> dict[str, Any]:
    spec = volume["spec"]
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"namespace": claim["namespace"], "name": f"{claim['name']}-csi"},
        "spec": {
            "accessModes": spec.get("accessModes", ["ReadWriteOnce"]),
            "storageClassName": spec["storageClassName"],
            "volumeName": volume["metadata"]["name"],
            "resources": {"requests": {"storage": (spec.get("capacity") or {}).get("storage", "1Gi")}},
            **({"volumeMode": spec["volumeMode"]} if "volumeMode" in spec else {}),
        },
    }
