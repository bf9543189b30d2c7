"""What a graph may ask for before it is refused."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 1 << 30


@dataclass(frozen=True)
class GraphLimits:
    """Limits for a file that nobody has looked at yet; honest models stay far below each.

    ``value_bytes`` (or four times the weights) bounds any one value whose size can be told without running;
    ``fold_bytes`` (and sixteen times the weights more) all values together that depend on no input, and that tools
    therefore compute while loading. ``trips`` bounds the iterations of nested loops that end by their trip count
    alone, ``folded_trips`` of those that depend on no input. ``expanded_nodes`` is what inlining may make of a file,
    and above ``freely_expanded`` no more than ``expansion`` times what is written in it.
    """

    nodes: int = 1_000_000
    expanded_nodes: int = 1_000_000
    freely_expanded: int = 50_000
    expansion: int = 100
    call_depth: int = 64
    subgraph_depth: int = 32
    value_bytes: int = 4 * GIB
    fold_bytes: int = GIB // 4
    trips: int = 10_000_000
    folded_trips: int = 100_000
    visits: int = 1_500_000
