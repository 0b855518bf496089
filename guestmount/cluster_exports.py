"""The NFS exports that a cluster's own objects name: those of StorageClasses, and of PersistentVolumes.

So a controller without a memory finds volumes whose ids do not say where they lie, and can list them all. Needs `list`
on persistentvolumes and storageclasses, which external-provisioner's role has.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from blockdev import Deadline, WaitExpired
from guestmount.drivers import DRIVERS
from guestmount.kubernetes_api import KubernetesApi
from guestmount.pods import PodUnknown
from volumes.errors import StoreFailed
from volumes.exports import Said

# For all pages of both lists.
_SECONDS = 15.0


def said(api: KubernetesApi) -> Sequence[Said]:
    """What the cluster says now. StoreFailed where it does not answer."""
    deadline = Deadline.after(_SECONDS)
    try:
        return [*_of_classes(api, deadline), *_of_volumes(api, deadline)]
    except (PodUnknown, WaitExpired) as error:
        raise StoreFailed(f"which NFS exports the cluster names is not known: {error}") from error


def _of_classes(api: KubernetesApi, deadline: Deadline) -> Iterator[Said]:
    for one in api.listed("StorageClasses", "/apis/storage.k8s.io/v1/storageclasses", deadline):
        parameters = one.get("parameters")
        if one.get("provisioner") in DRIVERS and isinstance(parameters, dict):
            yield Said(parameters=_texts(parameters), mount_options=_list(one.get("mountOptions")))


def _of_volumes(api: KubernetesApi, deadline: Deadline) -> Iterator[Said]:
    for one in api.listed("PersistentVolumes", "/api/v1/persistentvolumes", deadline):
        spec = one.get("spec")
        csi = spec.get("csi") if isinstance(spec, dict) else None
        if not isinstance(spec, dict) or not isinstance(csi, dict) or csi.get("driver") not in DRIVERS:
            continue
        attributes, handle = csi.get("volumeAttributes"), csi.get("volumeHandle")
        if isinstance(attributes, dict) and isinstance(handle, str):
            options = _list(spec.get("mountOptions"))
            yield Said(handle=handle, parameters=_texts(attributes), mount_options=options)


def _texts(values: dict[Any, Any]) -> dict[str, str]:
    return {str(key): value for key, value in values.items() if isinstance(value, str)}


def _list(value: Any) -> tuple[str, ...]:
    return tuple(str(one) for one in value) if isinstance(value, list) else ()
