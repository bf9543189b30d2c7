"""Where the time of one inference goes: which operators take it, and what the runtime could not do well."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from modelops.errors import UsageError
from modelops.stages._launch import write_arrays
from modelops.stages._runner import Contender, Runner

RUNS = 30
_MOST_SECONDS = 5.0
_SHOWN = 5

Node = Mapping[str, Any]


def profiled(contender: Contender, feed: Mapping[str, Any], scratch: Path) -> list[dict[str, Any]]:
    """The nodes of the model with their median times, the slowest first, measured in a process of its own.

    UsageError where the backend has no profiler.
    """
    path = scratch / "profile-feed.npz"
    write_arrays(path, feed)
    with Runner(replace(contender, expected=None), path, scratch, random.Random(0)) as runner:
        opened = runner.ask("open", patience=contender.load_seconds())
        one = float(opened["first_seconds"])
        runs = max(3, min(RUNS, int(_MOST_SECONDS / one))) if one > 0 else RUNS
        patience = contender.load_seconds() + 10 * runs * one
        nodes = runner.ask("profile", patience=patience, runs=runs, scratch=str(scratch))["nodes"]
    if nodes is None:
        raise UsageError(f"{contender.backend.name} has no profiler", hint="leave --profile out")
    found: list[dict[str, Any]] = nodes
    return found


def operators(nodes: Sequence[Node]) -> list[dict[str, Any]]:
    """For every operator and provider: how many nodes, microseconds in one inference, and the share of all."""
    total = sum(node["microseconds"] for node in nodes) or 1.0
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for node in nodes:
        row = found.setdefault(
            (node["op"], node["provider"]),
            {"op": node["op"], "provider": node["provider"], "nodes": 0, "microseconds": 0.0},
        )
        row["nodes"] += 1
        row["microseconds"] += node["microseconds"]
    rows = sorted(found.values(), key=lambda row: -row["microseconds"])
    return [{**row, "share": row["microseconds"] / total} for row in rows]


def work(
    nodes: Sequence[Node], peak: Mapping[str, Any] | None, *, macs: int | None = None, seconds: float | None = None
) -> list[dict[str, Any]]:
    """How far the whole model, then each of its five slowest nodes, are from what the machine can do.

    Each row: giga-operations in a second (a product and a sum are two) with their share of the machine's peak, and
    gigabytes in a second with their share of its bandwidth; None where the work of a node, or the peak, is not known.
    ``macs`` and ``seconds`` are those of a whole inference, where they were counted and measured apart.
    """
    whole = _work("the model", nodes, peak, macs, seconds)
    return [whole] + [_work(f"{node['op']} {node['name']}", [node], peak) for node in nodes[:_SHOWN]]


def _work(
    name: str,
    nodes: Sequence[Node],
    peak: Mapping[str, Any] | None,
    counted: int | None = None,
    measured: float | None = None,
) -> dict[str, Any]:
    seconds = measured or 1e-6 * sum(node["microseconds"] for node in nodes)
    known = all(node["macs"] is not None for node in nodes)
    macs = counted if counted is not None else sum(node["macs"] for node in nodes) if known else None
    rate = 2e-9 * macs / seconds if macs is not None and seconds > 0 else None
    moved = 1e-9 * sum(node["moved_bytes"] for node in nodes) / seconds if seconds > 0 else None
    share = None
    if peak and rate is not None:
        if known:  # the time that the work would take at the peak, over the time that it took
            kinds = {True: peak["int8_gops"], False: peak["float32_gflops"]}
            share = sum(2e-9 * node["macs"] / kinds[bool(node["int8"])] for node in nodes) / seconds
        else:
            share = rate / peak["int8_gops" if any(node["int8"] for node in nodes) else "float32_gflops"]
    of_bandwidth = moved / peak["bandwidth_gb_per_s"] if peak and moved is not None else None
    return {
        "name": name,
        "gops": rate,
        "share_of_peak": share,
        "gb_per_s": moved,
        "share_of_bandwidth": of_bandwidth,
        "milliseconds": 1e3 * seconds,
    }


def table(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The rows of ``work`` as a table of a report: the model, then its slowest nodes."""
    columns = {
        "where": "name",
        "time": "milliseconds",
        "Gop/s": "gops",
        "of peak": "share_of_peak",
        "GB/s": "gb_per_s",
        "of bandwidth": "share_of_bandwidth",
    }
    return {"columns": list(columns), "rows": [[row[key] for key in columns.values()] for row in rows]}


def sentences(nodes: Sequence[Node]) -> list[str]:
    """What a person should know: the operators that take most, QDQ that was not fused, work handed back to the CPU."""
    rows = operators(nodes)
    if not rows:
        return ["the runtime's profiler saw no node"]
    shown = ", ".join(f"{row['op']} {row['share']:.0%} ({row['nodes']} nodes)" for row in rows[:_SHOWN])
    found = [f"time by operator: {shown}"]
    alone = [row for row in rows if row["op"] in ("QuantizeLinear", "DequantizeLinear")]
    if alone:
        count, share = sum(row["nodes"] for row in alone), sum(row["share"] for row in alone)
        found.append(f"{count} QuantizeLinear and DequantizeLinear nodes were not fused: {share:.0%} of the time")
    providers = {row["provider"] for row in rows}
    if len(providers) > 1 and "CPUExecutionProvider" in providers:
        back = [row for row in rows if row["provider"] == "CPUExecutionProvider"]
        names = ", ".join(f"{row['op']} ({row['nodes']})" for row in back)
        found.append(f"handed back to the CPU, {sum(row['share'] for row in back):.0%} of the time: {names}")
    copies = sum(row["nodes"] for row in rows if row["op"] in ("MemcpyFromHost", "MemcpyToHost"))
    if copies:
        found.append(f"{copies} copies between CPU and device in every inference")
    return found
