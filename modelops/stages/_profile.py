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
        patience = contender.load_seconds() + 10 * RUNS * float(opened["first_seconds"])
        nodes = runner.ask("profile", patience=patience, runs=RUNS, scratch=str(scratch))["nodes"]
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


def work(nodes: Sequence[Node], peak: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """How far all nodes together, then the five slowest, are from what the machine can do.

    Each row: giga-operations in a second (a product and a sum are two), gigabytes in a second, and the larger of their
    shares of the peak; None where the work of a node, or the peak, is not known.
    """
    rows = [_work("all nodes", nodes, peak)]
    return rows + [_work(f"{node['op']} {node['name']}", [node], peak) for node in nodes[:_SHOWN]]


def _work(name: str, nodes: Sequence[Node], peak: Mapping[str, Any] | None) -> dict[str, Any]:
    seconds = 1e-6 * sum(node["microseconds"] for node in nodes)
    known = all(node["macs"] is not None for node in nodes) and seconds > 0
    rate = 2e-9 * sum(node["macs"] for node in nodes) / seconds if known else None
    moved = 1e-9 * sum(node["moved_bytes"] for node in nodes) / seconds if seconds > 0 else None
    share = None
    if peak is not None and rate is not None and moved is not None:
        # The time that the work would take at the peak, over the time that it took.
        least = sum(2e-9 * node["macs"] / peak["int8_gops" if node["int8"] else "float32_gflops"] for node in nodes)
        share = max(least / seconds, moved / peak["bandwidth_gb_per_s"])
    return {"name": name, "gops": rate, "gb_per_s": moved, "share_of_peak": share}


def sentences(nodes: Sequence[Node], peak: Mapping[str, Any] | None = None) -> list[str]:
    """What a person should know: the operators that take most, QDQ that was not fused, work handed back to the CPU."""
    rows = operators(nodes)
    if not rows:
        return ["the runtime's profiler saw no node"]
    shown = ", ".join(f"{row['op']} {row['share']:.0%} ({row['nodes']} nodes)" for row in rows[:_SHOWN])
    found = [f"time by operator: {shown}"]
    whole = work(nodes, peak)[0]
    if whole["gops"] is not None:
        far = f", {whole['share_of_peak']:.0%} of the peak" if whole["share_of_peak"] is not None else ""
        found.append(f"the nodes reach {whole['gops']:.3g} Gop/s and {whole['gb_per_s']:.3g} GB/s{far}")
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
