"""FlexVolume's PersistentVolumes as CSI ones with the same data: manifests to apply, and why one cannot be mapped.

A PersistentVolume's source cannot be changed, so each becomes a new one; its claim is bound to it by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flexvolume.options import COMPATIBLE, KNOWN

CSI_DRIVER = "csi.runvol.io"
# By FlexVolume driver: the name whose options it reads.
DRIVERS: Mapping[str, str] = {"runvol/runvol": "runvol", "alicloud/disk": "disk"}


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
        handle, attributes, flags = _mapped(flex)
        if known_volumes is not None and handle not in known_volumes:
            raise ValueError(
                f"the volume {handle!r} is not on this node; run the migration where it is, or adopt it first"
            )
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


def _mapped(flex: Mapping[str, Any]) -> tuple[str, dict[str, str], list[str]]:
    driver = str(flex.get("driver", ""))
    if driver not in DRIVERS:
        raise ValueError(f"driver {driver!r} is not runvol's; known are {', '.join(DRIVERS)}")
    if flex.get("secretRef"):
        raise ValueError("it names a secret (secretRef), and no volume of runvol's takes one")
    renamed = COMPATIBLE.get(DRIVERS[driver], {})
    options = {renamed.get(key, key): str(value) for key, value in (flex.get("options") or {}).items()}
    unknown = sorted(set(options) - set(KNOWN))
    if unknown:
        raise ValueError(f"option {unknown[0]!r} means nothing to CSI; known are {', '.join(KNOWN)}")
    if not options.get("volume"):
        raise ValueError("it names no volume (option volume)")
    attributes = {"runtime": options["runtime"]} if options.get("runtime") else {}
    return options["volume"], attributes, [word for word in options.get("mountOptions", "").split(",") if word]


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
