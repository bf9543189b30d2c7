"""What every node of a quantized model costs, for a person: a table, and a picture of error against latency."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from modelops.stages._pictures import DARK, MAIN, drawing

PICTURES = ("sensitivity.svg", "sensitivity.png")
# Rows that a person reads, and steps of the picture that are named; the document holds all.
_MOST, _NAMED = 40, 4
_LONGEST = 28


def table(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The nodes that cost most first."""
    rows = [
        [line["node"], line["op"], line["error_db"], f"{100 * line['time_share']:.1f} %", line["decision"]]
        for line in lines[:_MOST]
    ]
    if len(lines) > _MOST:
        rest = sum(line["time_share"] for line in lines[_MOST:])
        rows.append([f"{len(lines) - _MOST} more nodes", "", None, f"{100 * rest:.1f} %", ""])
    return {"columns": ["node", "op", "SQNR dB", "of float time", "becomes"], "rows": rows}


def draw(place: Path, lines: Sequence[Mapping[str, Any]], found: float | None) -> None:
    """What outputs keep when nodes go back to float one by one, against the share of float's time that is in those.

    Those that make most error for their time go first. ``found`` is what the model that was made keeps, in dB.
    """
    errors = {line["node"]: 10 ** (-line["error_db"] / 10) for line in lines}
    order = sorted(lines, key=lambda line: -errors[line["node"]] / max(line["time_share"], 1e-6))
    times = [0.0, *accumulate(100 * line["time_share"] for line in order)][: len(order)]
    spent = [0.0, *accumulate(errors[line["node"]] for line in order)]
    kept = [-10 * math.log10(max(sum(errors.values()) - part, 1e-12)) for part in spent[: len(order)]]
    with drawing(place, across="share of the float model's time left in float, %", up="outputs keep, dB") as axes:
        axes.plot(times, kept, "o-", color=MAIN, markersize=4, linewidth=1.6, label="predicted from each node alone")
        for number, line in enumerate(order[:_NAMED], 1):
            if number < len(times):
                name = str(line["node"])
                text = name if len(name) <= _LONGEST else f"…{name[1 - _LONGEST :]}"
                axes.annotate(text, (times[number], kept[number]), (6, -4), textcoords="offset points", fontsize=7)
        if found is not None:
            share = 100 * sum(line["time_share"] for line in lines if line["decision"] != "int8")
            axes.plot([share], [found], "D", color=DARK, markersize=6, label="this model, measured")
