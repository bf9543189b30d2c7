from __future__ import annotations

import re

import pytest
from markdown_it import MarkdownIt
from report_documents import FAILED, GOOD, HOSTILE, document, hostile

from modelops.core.report import Check, Report
from modelops.renderers.markdown import Markdown, code, prose

PARSER = MarkdownIt("gfm-like", {"linkify": False})


def render(value: object, **options: object) -> str:
    return Markdown.parse(options).render(value)  # type: ignore[arg-type]


def test_tables_hold_every_check_and_figure() -> None:
    text = render(document(FAILED))
    assert "| FAIL | `speed` | 3.1 % slower (99 % interval 2.2 to 4.0 %) |" in text
    assert "| `ratio` | 1.214x | 1.180x to 1.250x at 99 %, n=8 |" in render(document(GOOD))


def test_a_run_starts_with_a_table_of_its_stages() -> None:
    chain = {"columns": ["step", "speed-up", "interval"], "rows": [["01-a|b", 1.5, [1.4, 1.6]]]}
    stages = [document(GOOD), document(FAILED)]
    text = render(document(command="run", exit_code=1, verdict="fail", steps=stages, table=chain))
    assert text.startswith("## `run`: FAIL\n\n| step | verdict | took |")
    assert "| `01-a\\|b` | 1.500x | 1.400x to 1.600x |" in text
    assert text.count("### `quantize`") == 2


@pytest.mark.parametrize("text", HOSTILE)
def test_a_hostile_name_stays_one_cell_of_plain_text(text: str) -> None:
    table = f"| a | b |\n| --- | --- |\n| {code(text)} | {prose(text)} |\n"
    html = PARSER.render(table)
    assert html.count("<td>") == 2
    assert set(re.findall(r"<(\w+)", html)) <= {"table", "thead", "tbody", "tr", "th", "td", "code"}


def test_a_hostile_document_makes_no_markup_of_its_own() -> None:
    html = PARSER.render(render(hostile()))
    known = {"h2", "h3", "p", "table", "thead", "tbody", "tr", "th", "td", "code", "strong", "ul", "li"}
    assert set(re.findall(r"<(\w+)", html)) <= known


@pytest.mark.parametrize("live", ["@octocat", "#12", "http://x", "www.x"])
def test_mentions_and_links_are_dead(live: str) -> None:
    assert live not in prose(f"see {live} now")


def test_a_long_report_is_cut_to_its_limit_and_keeps_the_worst() -> None:
    checks = [Check(f"check {n}", "pass", "x" * 400) for n in range(1000)]
    report = Report(checks=(*checks, Check("the bad one", "fail", "y")))
    text = render(document(report), limit_bytes=20_000)
    assert len(text.encode()) <= 20_000
    assert "the bad one" in text
    assert re.search(r"and \d+ more", text)


def test_a_run_of_very_many_stages_is_cut_to_its_limit() -> None:
    steps = [document(GOOD, command=f"stage {n}") for n in range(500)]
    text = render(document(command="run", verdict="pass", steps=steps), limit_bytes=20_000)
    assert len(text.encode()) <= 20_000
    assert text.endswith("(cut here: the report is too long)\n")
