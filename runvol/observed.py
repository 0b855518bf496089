"""What tells a plugin's metrics and events, put together from the settings. Where nobody is told none of it runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from guestmount import Node
from runvol import version
from runvol.config import Config

if TYPE_CHECKING:
    from csi import Server
    from csi.call_book import CallBook
    from guestmount.survey import Survey
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
    """Its metrics are served, if they are; who has to be started once it works. BadRequest."""
    survey = _survey(config, node, book)
    watchers: list[Watcher] = [survey] if survey is not None else []
    if not config.text("csi.metrics"):
        return watchers
    from csi import metrics
    from runvol.doctor_watch import DoctorWatch

    others = []
    if config.number("metrics.doctor_seconds"):
        others = [DoctorWatch(lambda: _findings(config), interval=config.number("metrics.doctor_seconds"))]
    metrics.serve(
        config.text("csi.metrics"), version=version(), book=book, detector=node.detector, survey=survey,
        events=node.events, workers=[one for server in servers for one in server.workers], others=others,
    )  # fmt: skip
    return [*watchers, *others]


def _survey(config: Config, node: Node, book: CallBook) -> Survey | None:
    """Of a node's plugin, where somebody wants to know: whoever scrapes it, or the pods."""
    if "node" not in config.words("csi.services") or not (config.text("csi.metrics") or node.events is not None):
        return None
    from guestmount.notices import Notices
    from guestmount.survey import Survey

    survey = Survey(
        node, interval=config.number("metrics.interval_seconds"), most=config.number("metrics.volumes"),
        listeners=[Notices(node.events).looked] if node.events is not None else [],
    )  # fmt: skip

    def ended(method: str, _code: str) -> None:
        if method in _CHANGES:
            survey.want()

    book.tell(ended)
    return survey


def _findings(config: Config) -> list[Diagnosis]:
    """With parts of its own: what it waits for holds up none of the plugin's."""
    from runvol import assembly, doctor

    node = assembly.build(config, looking=True)
    try:
        return list(doctor.examine(config, node))
    finally:
        node.catalog.close()
