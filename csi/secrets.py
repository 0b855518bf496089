"""Requests for the log, without what must not stand there.

A field is secret because its descriptor says so (`csi_secret`), not because somebody listed its name.
"""

from __future__ import annotations

from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from runvol_proto import csi_pb2

STRIPPED = "***stripped***"
_LONGEST = 256
# kubelet puts tokens into the volume context when a CSIDriver asks for them (tokenRequests).
_TOKENS = "csi.storage.k8s.io/serviceAccount.tokens"


def stripped(message: Message) -> dict[str, Any]:
    """The set fields of a message, secrets replaced, long strings cut."""
    return {field.name: _field(field, value) for field, value in message.ListFields()}


def _field(field: FieldDescriptor, value: Any) -> Any:
    if field.GetOptions().Extensions[csi_pb2.csi_secret]:  # type: ignore[index]
        return STRIPPED
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        return {_short(key): STRIPPED if key == _TOKENS else _short(value[key]) for key in sorted(value)}
    if field.message_type is not None:
        return [stripped(one) for one in value] if field.is_repeated else stripped(value)
    return [_short(one) for one in value] if field.is_repeated else _short(value)


def _short(value: Any) -> Any:
    if isinstance(value, str) and len(value) > _LONGEST:
        return f"{value[:_LONGEST]}… ({len(value)} characters)"
    return value
