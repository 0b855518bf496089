"""Hand-off dialects: how a runtime is told which device a volume is. One module a dialect."""

from guestmount.handoff.base import Delivered, Delivery, Dialect
from guestmount.handoff.kata import KataDialect

__all__ = ["Delivered", "Delivery", "Dialect", "KataDialect"]
