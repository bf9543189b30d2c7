"""What an engine did to a graph, operator by operator."""

from __future__ import annotations

from collections.abc import Mapping


def changes(before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, list[int]]:
    """For every operator whose count changed, what it was and what it is."""
    names = sorted({*before, *after})
    return {op: [before.get(op, 0), after.get(op, 0)] for op in names if before.get(op, 0) != after.get(op, 0)}


def brought_in(before: Mapping[str, int], after: Mapping[str, int], domain: str) -> dict[str, int]:
    """How many more operators of a domain there are than before, by name."""
    counts = {
        op.removeprefix(f"{domain}:"): after[op] - before.get(op, 0) for op in after if op.startswith(f"{domain}:")
    }
    return {op: count for op, count in counts.items() if count > 0}
