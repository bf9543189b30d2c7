"""A report's verdict is the worst of what was evaluated, and the exit code follows it."""

from __future__ import annotations

import json

import pytest

from modelops.core.report import Check, Metric, Report, Verdict


@pytest.mark.parametrize(
    ("verdicts", "verdict", "code"),
    [
        ((), "not-evaluated", 0),
        (("pass",), "pass", 0),
        (("pass", "not-evaluated"), "pass", 0),
        (("not-evaluated",), "not-evaluated", 3),
        (("pass", "inconclusive"), "inconclusive", 3),
        (("inconclusive", "fail", "pass"), "fail", 1),
    ],
)
def test_the_worst_evaluated_check_decides(verdicts: tuple[Verdict, ...], verdict: Verdict, code: int) -> None:
    report = Report(checks=tuple(Check("c", each) for each in verdicts))
    assert (report.verdict, report.exit_code, bool(report)) == (verdict, code, verdict == "pass")


def test_a_report_survives_json() -> None:
    report = Report(
        (Metric("latency", 1.5, "ms", (1.0, 2.0), 0.99, 12), Metric("size", 3, "bytes")),
        (Check("speed", "fail", "too slow", 1.2, "<= 1.05", 8),),
        ("a note",),
        {"more": [1, 2]},
    )
    assert Report.parse(json.loads(json.dumps(report.to_dict()))) == report


def test_an_unknown_verdict_is_refused() -> None:
    with pytest.raises(ValueError, match="maybe"):
        Check("c", "maybe")  # type: ignore[arg-type]
