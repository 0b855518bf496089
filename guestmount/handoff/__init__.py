"""Hand-off dialects: how a runtime is told which device a volume is. One module a dialect."""

from guestmount.handoff.base import Closing, Delivered, Delivery, Dialect, NfsDelivery
from guestmount.handoff.dialects import Dialects
from guestmount.handoff.kata import KataDialect
from guestmount.handoff.rund2 import Rund2Dialect
from guestmount.handoff.rund3 import Rund3Dialect
from guestmount.handoff.runv import RunvDialect

__all__ = [
    "Closing",
    "Delivered",
    "Delivery",
    "Dialect",
    "Dialects",
    "KataDialect",
    "NfsDelivery",
    "Rund2Dialect",
    "Rund3Dialect",
    "RunvDialect",
]
