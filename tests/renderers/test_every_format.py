"""What holds for every format."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report_documents import FAILED, GOOD, HOSTILE, document, error, hostile

from modelops.core.report import Check, Metric, Report
from modelops.renderers import REGISTRY, Renderer
from modelops.renderers._common import figure, visible

NAMES = REGISTRY.builtin()


def renderer(name: str) -> Renderer:
    return REGISTRY.load(name).parse({})


def test_the_promised_formats_are_there() -> None:
    assert {"text", "json", "markdown", "junit", "github"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_format_tells_the_failed_check_and_its_finding(name: str) -> None:
    text = renderer(name).render(document(FAILED))
    assert "speed" in text
    assert "3.1 %" in text


@pytest.mark.parametrize("name", NAMES)
def test_every_format_tells_an_error_with_its_hint(name: str) -> None:
    text = renderer(name).render(document(exit_code=4, error=error()))
    assert "no good" in text
    assert "do it well" in text
    assert "input-refused" in text or name == "text"


@pytest.mark.parametrize("name", NAMES)
def test_every_format_tells_what_was_decided(name: str) -> None:
    report = Report(checks=GOOD.checks, details={"decision": "kept-source"})
    assert "kept-source" in renderer(name).render(document(report))


@pytest.mark.parametrize("name", NAMES)
def test_every_format_tells_why_a_result_was_reused(name: str) -> None:
    if name != "github":
        assert "nothing changed" in renderer(name).render(document(GOOD, reused="nothing changed"))


@pytest.mark.parametrize("name", NAMES)
def test_an_error_of_a_run_is_told_once(name: str) -> None:
    failed = error(message="the disk is full")
    stage = document(exit_code=6, error=failed)
    text = renderer(name).render(document(command="run", exit_code=6, error=failed, steps=[stage]))
    assert text.count("the disk is full") == {"json": 2, "github": 2}.get(name, 1)


@pytest.mark.parametrize("name", NAMES)
def test_hostile_text_becomes_printable_lines(name: str) -> None:
    text = renderer(name).render(hostile())
    text.encode("utf-8")
    assert set(filter(lambda c: not c.isprintable(), text)) <= {"\n", "\u200b"}
    for line in text.splitlines():
        assert "##[" not in line
        assert "##vso[" not in line
        if name != "github":
            assert not line.lstrip().startswith("::")


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=60)
@given(text=st.text(max_size=60))
def test_any_text_at_all_can_be_rendered(name: str, text: str) -> None:
    report = Report((Metric(text, 1.5, text),), (Check(text, "fail", text, text, text),), (text,))
    shown = renderer(name).render(document(report, command=text, reused=text, error=error(message=text, hint=text)))
    shown.encode("utf-8")
    assert all(c.isprintable() or c == "\n" for c in shown.replace("\u200b", ""))


@pytest.mark.parametrize("name", NAMES)
def test_a_document_with_nothing_in_it_can_be_rendered(name: str) -> None:
    bare = document(source=None, target=None, seconds=None, peak_memory_bytes=None)
    assert "quantize" in renderer(name).render(bare)


@pytest.mark.parametrize("text", HOSTILE)
def test_visible_text_is_one_printable_line_of_bounded_length(text: str) -> None:
    shown = visible(text)
    assert shown.isprintable()
    assert len(shown) <= 6 * 500


@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [
        (None, "", "n/a"),
        (512, "bytes", "512 bytes"),
        (46182, "bytes", "45.1 KiB"),
        (1023 * 1024, "bytes", "1023 KiB"),
        (-2048, "bytes", "-2 KiB"),
        (310 << 20, "bytes", "310 MiB"),
        (1.2139, "x", "1.214x"),
        (0.985185, "fraction", "98.52 %"),
        (0.02, "ms", "20 us"),
        (12.3456, "ms", "12.3 ms"),
        (0.0, "ms", "0 ms"),
        (250.0, "s", "4.2 min"),
        (34.31, "dB", "34.31 dB"),
        (22713216, "", "22,713,216"),
        (1.6e-7, "", "1.6e-07"),
        (float("inf"), "dB", "inf dB"),
        (123456.7, "", "123457"),
        (True, "", "True"),
        ("per channel", "", "per channel"),
    ],
)
def test_figures_read_as_a_person_writes_them(value: object, unit: str, shown: str) -> None:
    assert figure(value, unit) == shown
