"""What became of every group, what was left alone and why, and the points of a curve: tables for a prune's report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# Rows that a person reads; the document holds all.
_MOST = 16

Table = dict[str, Any]


def tables(details: Mapping[str, Any]) -> list[Table]:
    """The tables of what these details hold."""
    found = [_groups(details.get("groups", ())), _skipped(details.get("skipped", ())), _curve(details.get("curve", ()))]
    return [table for table in found if table["rows"]]


def _groups(groups: Sequence[Mapping[str, Any]]) -> Table:
    """Those that save most work first."""
    columns = ["group", "of", "kept", "removed", "importance lost", "MACs saved", "us gained"]
    ordered = sorted(groups, key=lambda group: -group["macs_saved"])
    rows = [
        [
            group["nodes"][0] + (f" and {len(group['nodes']) - 1} more" if len(group["nodes"]) > 1 else ""),
            group["kind"],
            group["kept"],
            group["removed"],
            f"{100 * group['importance_lost']:.2g} %",
            group["macs_saved"],
            group.get("microseconds_gained"),
        ]
        for group in ordered[:_MOST]
    ]
    if len(ordered) > _MOST:
        rest = ordered[_MOST:]
        total = [sum(group[name] for group in rest) for name in ("kept", "removed", "macs_saved")]
        rows.append([f"{len(rest)} more groups", "", *total[:2], None, total[2], None])
    return {"columns": columns, "rows": rows}


def _skipped(skipped: Sequence[Mapping[str, Any]]) -> Table:
    """Those with most channels first; what the model's outputs ask for is no loss, and left out."""
    inside = sorted((item for item in skipped if not item["interface"]), key=lambda item: -item["channels"])
    rows: list[list[Any]] = [[item["node"], item["channels"], item["reason"]] for item in inside[:_MOST]]
    if len(inside) > _MOST:
        rest = inside[_MOST:]
        rows.append([f"{len(rest)} more nodes", sum(item["channels"] for item in rest), None])
    return {"columns": ["left alone", "channels", "because"], "rows": rows}


def _curve(points: Sequence[Mapping[str, Any]]) -> Table:
    columns = ["removed", "of the work", "quality", "without refitting", "speed-up", "interval"]
    rows = [
        [
            f"{100 * point['removed']:.4g} %",
            f"{100 * point['reached']:.4g} %",
            point["quality"],
            point.get("unrefitted"),
            point["speedup"],
            point["interval"],
        ]
        for point in points
    ]
    return {"columns": columns, "rows": rows}
