"""What is said of a gain in speed is what launches bear out: a pass needs the bound, not the mean."""

from __future__ import annotations

from typing import Any

import pytest

from modelops.stages import _speed
from modelops.stages._gain import Timing, not_timed
from modelops.stages._race import Standing


def timing(ratios: list[float], busy: float = 0.0) -> Timing:
    """Launches in which the pruned model was so many times as fast as its source."""
    records: list[dict[str, Any]] = [{"kind": "preflight", "busy": busy}]
    for launch, ratio in enumerate(ratios):
        sides = {name: {"facts": {}, "warm": {"steady": True}} for name in ("source", "pruned")}
        records.append({"kind": "launch", "launch": launch, "sides": sides})
        for position, (side, span) in enumerate((("source", 1_000_000), ("pruned", round(1_000_000 / ratio)))):
            block = {"kind": "block", "launch": launch, "round": 0, "side": side, "position": position, "n": 1}
            records.append({**block, "wall_ns": span, "cpu_ns": span})
    speedup, interval = _speed.speedup(records, "source", "pruned")
    rows = (Standing("source", 1.0, 1.0, None), Standing("pruned", 1.0 / speedup, speedup, interval))
    return Timing(rows, records, len(ratios), busy)


@pytest.mark.parametrize(
    ("ratios", "verdict"),
    [
        ([2.10, 2.12, 2.11, 2.13, 2.09], "pass"),
        ([2.10, 3.0, 1.6, 2.6, 2.0], "inconclusive"),  # the mean is enough, the bound is not
        ([1.50, 1.52, 1.49, 1.51, 1.50], "fail"),
        ([2.10, 2.10], "inconclusive"),  # too few launches to tell
    ],
)
def test_time_that_was_asked_for_passes_where_the_bound_says_so(ratios: list[float], verdict: str) -> None:
    assert timing(ratios).removed("pruned", 0.5, best_effort=False).verdict == verdict


def test_best_effort_accepts_what_was_reached() -> None:
    check = timing([1.50, 1.52, 1.49]).removed("pruned", 0.5, best_effort=True)
    assert check.verdict == "pass" and "--best-effort accepts it" in check.message


def test_nothing_is_concluded_on_a_busy_machine() -> None:
    found = timing([2.1, 2.1, 2.1, 2.1, 2.1], busy=0.6)
    assert found.removed("pruned", 0.5, best_effort=False).verdict == "inconclusive"
    assert found.metric("pruned").interval is None
    assert "other work used 60%" in found.remarks("pruned")[0]


def test_two_launches_give_no_interval() -> None:
    assert timing([7.0, 7.0]).metric("pruned").interval is None
    assert timing([7.0, 7.1, 6.9]).metric("pruned").interval is not None
    assert "2 launches" in timing([7.0, 7.0]).remarks("pruned")[0]


def test_time_that_could_not_be_measured_is_not_passed() -> None:
    assert not_timed(0.5, best_effort=False).verdict == "inconclusive"
    accepted = not_timed(0.5, best_effort=True)
    assert accepted.verdict == "pass" and "--best-effort" in accepted.message
