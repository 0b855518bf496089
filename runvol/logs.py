"""Logging to stderr: one line an event, with stable keys, as text or JSON. What belongs to a call says to which.

An event is one line, whatever others have put into it.
"""

from __future__ import annotations

import json
import logging
import sys
import time

from blockdev import log_context
from blockdev.printable import printable

_OWN = set(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}


class _Lines(logging.Formatter):
    def __init__(self, *, as_json: bool) -> None:
        super().__init__()
        self._as_json = as_json

    def format(self, record: logging.LogRecord) -> str:
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        own = {key: value for key, value in record.__dict__.items() if key not in _OWN}
        facts = {**log_context.facts(), **own}
        if record.exc_info:
            facts["traceback"] = self.formatException(record.exc_info)
        if self._as_json:
            line = {"time": when, "level": record.levelname.lower(), "from": record.name, "event": record.getMessage()}
            return json.dumps(facts | line, default=str)
        words = " ".join(f"{key}={json.dumps(value, default=str, ensure_ascii=False)}" for key, value in facts.items())
        return f"{when} {record.levelname:<7} {printable(record.getMessage())} {printable(words)}".rstrip()


def start(level: str, form: str) -> None:
    """Everything under `runvol.` at `level`; other libraries from warnings on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines(as_json=form == "json"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("runvol").setLevel(level.upper())
