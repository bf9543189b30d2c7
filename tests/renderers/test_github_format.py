from __future__ import annotations

import re

from report_documents import FAILED, GOOD, HOSTILE, document, error, hostile

from modelops.core.report import Check, Report
from modelops.renderers.github import Github


def commands(value: object) -> list[str]:
    text = Github.parse({}).render(value)  # type: ignore[arg-type]
    return [line for line in text.splitlines() if line.lstrip().startswith("::")]


def test_the_report_is_there_for_the_log() -> None:
    assert Github.parse({}).render(document(GOOD)).startswith("quantize: PASS")
    assert commands(document(GOOD)) == []


def test_annotations_come_worst_first() -> None:
    assert [line.split()[0] for line in commands(document(FAILED))] == ["::error", "::warning", "::notice"]


def test_values_are_escaped() -> None:
    report = Report(checks=(Check("a:b,c", "fail", "50 % slower"),))
    assert commands(document(report)) == ["::error title=quantize%3A a%3Ab%2Cc%3A fail::50 %25 slower"]


def test_at_most_nine_annotations_and_one_line_for_the_rest() -> None:
    weak = [Check(f"weak {n}", "inconclusive", "?") for n in range(20)]
    bad = [Check(f"bad {n}", "fail", "!") for n in range(5)]
    found = commands(document(Report(checks=(*weak, *bad))))
    assert len(found) == 10
    assert all(line.startswith("::error") for line in found[:5])
    assert "16 more" in found[-1]


def test_an_advisory_run_only_notifies() -> None:
    found = commands(document(FAILED, advisory=True, exit_code=0))
    assert {line.split()[0] for line in found} == {"::notice"}


def test_an_error_is_annotated_with_its_hint() -> None:
    assert commands(document(exit_code=4, error=error())) == [
        "::error title=quantize%3A input-refused::no good (hint: do it well)"
    ]


def test_hostile_text_gives_no_command_of_its_own() -> None:
    found = commands(hostile())
    assert len(found) == 10
    assert all(re.match(r"::(error|warning|notice) title=[^:,]*::", line) for line in found)
    for text in HOSTILE:
        one = commands(document(Report(checks=(Check(text, "fail", text),), notes=(text,))))
        assert len(one) == 1
        assert re.match(r"::error title=[^:,]*::", one[0])
