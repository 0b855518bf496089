"""The specs that csi-sanity may skip here, each with its reason. Whatever else is skipped fails."""

from __future__ import annotations

import fnmatch

_NO_ATTACH = "a local volume is attached to nothing: ControllerPublish has no meaning for it"
_NO_MODIFY = "a local volume of the backend loop has no parameter that could change: modifying it has no meaning"
_ALPHA = "CSI calls alpha what this needs (SNAPSHOT_ACCESSIBILITY_CONSTRAINTS); its check compares protobuf's internals"
_PENDING = "pending in csi-sanity itself"

ALLOWED: tuple[tuple[str, str], ...] = (
    ("Controller Service [[]Controller Server] / ListVolumes / pagination should detect volumes added*", _PENDING),
    ("Controller Service [[]Controller Server] / Controller*PublishVolume / *", _NO_ATTACH),
    ("Controller Service [[]Controller Server] / ControllerUnpublishVolume / *", _NO_ATTACH),
    ("Controller Service [[]Controller Server] / volume lifecycle / *", _NO_ATTACH),
    ("Controller Service [[]Controller Server] / CreateVolume / should * volume attribute class", _NO_MODIFY),
    (
        "CreateSnapshot [[]Controller Server] / should succeed when creating a snapshot with accessibility requirements",
        _ALPHA,
    ),
    ("ModifyVolume [[]Controller Server] / *", _NO_MODIFY),
)


_NO_SNAPSHOTS = "the backend takes no snapshots and makes no clones, and does not say that it does"
OF_FILES: tuple[tuple[str, str], ...] = tuple(
    (pattern, _NO_SNAPSHOTS)
    for pattern in (
        "GroupController Service *",
        "*Snapshot*",
        "*snapshot*",
        "Controller Service [[]Controller Server] / CreateVolume / should * source volume*",
        "Controller Service [[]Controller Server] / CreateVolume / should * existing source*",
    )
)


_NO_GROUPS = "the backend takes no snapshots of groups, and does not say that it does"
OF_NFS: tuple[tuple[str, str], ...] = (("GroupController Service *", _NO_GROUPS),)


_NEVER_BESIDE_A_GUEST = (
    "what a sandbox has is not grown under it: the refusal, and the growth with the next pod, are tests of tests/csi"
)
OF_GUESTS: tuple[tuple[str, str], ...] = (
    (
        "Node Service / NodeExpandVolume / should work if node-expand is called after node-publish",
        _NEVER_BESIDE_A_GUEST,
    ),
)


def reason(spec: str, backend: str = "loop", runtime: str = "runc") -> str | None:
    """Why `spec` may be skipped; None if it must run."""
    if backend == "loop" and runtime == "sandbox":
        for pattern, why in OF_GUESTS:
            if spec == pattern:
                return why
    allowed = ALLOWED + {"loop": (), "nfs": OF_NFS}.get(backend, OF_FILES)
    return next((why for pattern, why in allowed if fnmatch.fnmatchcase(spec, pattern)), None)
