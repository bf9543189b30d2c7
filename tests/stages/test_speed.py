"""What raw records say: verdicts, clocks and figures, from records that were made up."""

from __future__ import annotations

import math
from typing import Any

import pytest
from made_records import Records, records

from modelops.measures.verdicts import Rules
from modelops.stages import _speed


def verdict(found: Records, **rules: Any) -> str:
    result = _speed.judge(found, "a", "b", Rules(**rules))
    assert result is not None
    return result.verdict


@pytest.mark.parametrize(("a", "rules", "expected"), [
    (1.0, {}, "pass"),
    (1.1, {}, "fail"),
    (0.5, {"at_least": 1.5}, "pass"),
    (0.8, {"at_least": 1.5}, "fail"),
    (1.04, {}, "fail"),
    (1.04, {"ignore": 0.1, "detect": 0.2}, "pass"),
])  # fmt: skip
def test_records_decide(a: float, rules: dict[str, Any], expected: str) -> None:
    assert verdict(records(a, 1.0), **rules) == expected


def test_four_launches_that_are_not_the_last_decide_nothing() -> None:
    assert _speed.judge(records(2.0, 1.0, launches=4), "a", "b", final=False) is None


def test_launches_that_did_not_come_to_rest_never_pass() -> None:
    assert verdict(records(1.0, 1.0, steady=False)) == "inconclusive"


def test_cpu_time_decides_only_where_others_are_busy_and_models_have_one_thread() -> None:
    assert verdict(records(1.2, 1.0)) == "fail"
    assert verdict(records(1.2, 1.0, busy=0.9)) == "pass"
    assert verdict(records(1.2, 1.0, busy=0.9, threads=2)) == "fail"
    assert verdict(records(1.2, 1.0, busy=0.9, device=True)) == "fail"


def test_the_first_of_a_pair_is_known() -> None:
    assert [pair.first for pair in _speed.launches(records(1, 1), "a", "b")[0].pairs] == ["B", "A", "B"]


def test_figures_of_a_side() -> None:
    found = {metric.name: metric for metric in _speed.metrics(records(4.0, 1.0), "a", rows=8)}

    assert found["latency_p50"].value == pytest.approx(4.0, rel=0.01)
    assert found["latency_p50"].interval is not None
    assert found["throughput"].value == pytest.approx(2000, rel=0.01)
    assert found["load"].value == 500
    assert found["first_inference"].value == 8
    assert found["memory_of_model"].value == 30
    assert "latency_p99" not in found  # 150 latencies are too few
    assert "device_memory" not in found


def test_the_speed_up_of_a_model_that_takes_half_the_time_is_two() -> None:
    ratio, interval = _speed.speedup(records(2.0, 1.0), "a", "b")

    assert ratio == pytest.approx(2, rel=0.01)
    assert interval[0] < ratio < interval[1] and math.isfinite(interval[1])
