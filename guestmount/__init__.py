"""How a volume reaches a pod: runtime detection, claims, hand-off dialects, and the verbs of a node."""

from guestmount.claim_sources import ClaimSources
from guestmount.claims import Claim, Claims, Owner, Target
from guestmount.detect import Detector, Runtime
from guestmount.detect import Settings as DetectSettings
from guestmount.errors import (
    BadRequest,
    Busy,
    Conflict,
    GuestmountError,
    NoPlace,
    Refused,
    RuntimeUnknown,
    Unsupported,
)
from guestmount.handoff import Delivered, Dialect, KataDialect, Rund2Dialect, Rund3Dialect, RunvDialect
from guestmount.kubernetes_api import KubernetesApi
from guestmount.node import Node
from guestmount.pods import PodRef
from guestmount.reach import Reach
from guestmount.requests import PublishRequest, StageRequest

__all__ = [
    "BadRequest",
    "Busy",
    "Claim",
    "ClaimSources",
    "Claims",
    "Conflict",
    "Delivered",
    "DetectSettings",
    "Detector",
    "Dialect",
    "GuestmountError",
    "KataDialect",
    "KubernetesApi",
    "NoPlace",
    "Node",
    "Owner",
    "PodRef",
    "PublishRequest",
    "Reach",
    "Refused",
    "Rund2Dialect",
    "Rund3Dialect",
    "Runtime",
    "RuntimeUnknown",
    "RunvDialect",
    "StageRequest",
    "Target",
    "Unsupported",
]
