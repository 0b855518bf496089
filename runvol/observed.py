"""What a plugin's metrics are told by, put together from the settings. Where none are served nothing of it runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from guestmount import Node
from runvol import version
from runvol.config import Config

if TYPE_CHECKING:
    from csi import Server
    from csi.call_book import CallBook
    from runvol.diagnosis import Diagnosis

# Calls after which a node's volumes are others than before.
_CHANGES = frozenset(
    {"NodePublishVolume", "NodeUnpublishVolume", "NodeStageVolume", "NodeUnstageVolume", "NodeExpandVolume"}
)


class Watcher(Protocol):
    """Who looks at something behind the calls."""

    def start(self) -> None: ...

    def stop(self) -> None: ...


def csi_plugin(config: Config, node: Node, book: CallBook, servers: Sequence[Server]) -> list[Watcher]:
    """Its metrics are served; who has to be started once it works. BadRequest."""
    if not config.text("csi.metrics"):
        return []
    from csi import metrics
    from guestmount.survey import Survey
    from runvol.doctor_watch import DoctorWatch

    survey = doctor = None
    if "node" in config.words("csi.services"):
        survey = Survey(node, interval=config.number("metrics.interval_seconds"), most=config.number("metrics.volumes"))
        looking = survey

        def ended(method: str, _code: str) -> None:
            if method in _CHANGES:
                looking.want()

        book.tell(ended)
    if config.number("metrics.doctor_seconds"):
        doctor = DoctorWatch(lambda: _findings(config), interval=config.number("metrics.doctor_seconds"))
    metrics.serve(
        config.text("csi.metrics"), version=version(), book=book, detector=node.detector, survey=survey,
        workers=[one for server in servers for one in server.workers], others=[doctor] if doctor is not None else [],
    )  # fmt: skip
    return [one for one in (survey, doctor) if one is not None]


def _findings(config: Config) -> list[Diagnosis]:
    """With parts of its own: what it waits for holds up none of the plugin's."""
    from runvol import assembly, doctor

    node = assembly.build(config)
    try:
        return list(doctor.examine(config, node))
    finally:
        node.catalog.close()
