"""Every metric that there is, by process: docs/metrics.md is made from it, and alerts and dashboard name no others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from blockdev import scraped
from blockdev.families import Family
from csi import metric_families as csi_families
from guestmount import nri_metrics
from runvol import doctor_watch
from snapshotter import metrics as snapshotter_metrics

# Which process has them, and the setting by which it serves them.
TABLE: tuple[tuple[str, str, Sequence[Family]], ...] = (
    ("Every process", "", scraped.FAMILIES),
    ("`runvol csi`", "csi.metrics", (*csi_families.FAMILIES, *doctor_watch.FAMILIES)),
    ("`runvol snapshotter`", "snapshotter.metrics", snapshotter_metrics.FAMILIES),
    ("`runvol nri`", "nri.metrics", nri_metrics.FAMILIES),
)


def families() -> list[Family]:
    return [family for _process, _setting, group in TABLE for family in group]


def sample_names() -> set[str]:
    """What a query can name; a histogram has three."""
    return {name for family in families() for name in _names(family)}


def _names(family: Family) -> Iterator[str]:
    if family.kind != "histogram":
        yield family.name
        return
    for ending in ("_bucket", "_sum", "_count"):
        yield family.name + ending


def as_markdown() -> str:
    """The table of docs/metrics.md."""
    lines: list[str] = []
    for process, setting, group in TABLE:
        lines += [f"### {process}{f' (`{setting}`)' if setting else ''}", ""]
        lines += ["| metric | type | labels | meaning |", "| --- | --- | --- | --- |"]
        lines += [
            f"| `{one.name}` | {one.kind} | {', '.join(f'`{label}`' for label in one.labels) or '–'} | {one.help} |"
            for one in group
        ]
        lines.append("")
    return "\n".join(lines)
