"""How a volume reaches a pod: the table of sources and runtimes, one module a way.

A row is what a source is on this node (`rows`), a way is how it reaches one target; the claim's target names its way.
"""

from guestmount.ways.base import Arrival, Means, Problem, Usage, Way
from guestmount.ways.rows import WAYS, Row, by_others, completed, drop_unclaimed, in_guests, of_claim, of_source, way_at

__all__ = [
    "WAYS",
    "Arrival",
    "Means",
    "Problem",
    "Row",
    "Usage",
    "Way",
    "by_others",
    "completed",
    "drop_unclaimed",
    "in_guests",
    "of_claim",
    "of_source",
    "way_at",
]
