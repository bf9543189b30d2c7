from __future__ import annotations

from report_documents import FAILED, GOOD, document, error

from modelops.core.report import Check, Metric, Report
from modelops.renderers.text import Text


def lines(value: object, **options: object) -> list[str]:
    return Text.parse(options).render(value).splitlines()  # type: ignore[arg-type]


def test_the_verdict_comes_first_with_the_way_and_the_cost() -> None:
    assert lines(document(GOOD))[0] == "quantize: PASS  out/02-simplify -> out/03-quantize  1.92 s, 310 MiB"


def test_failed_checks_come_before_the_others() -> None:
    words = [line.split()[0] for line in lines(document(FAILED))[1:5]]
    assert words == ["FAIL", "INCONCLUSIVE", "NOT", "PASS"]


def test_figures_show_their_interval_and_count() -> None:
    assert "  ratio    1.214x  1.180x to 1.250x at 99 %, n=8" in lines(document(GOOD))


def test_a_check_without_a_message_shows_its_value_and_threshold() -> None:
    report = Report(checks=(Check("snr", "fail", "", 42.0, ">= 100 dB", 32),))
    assert "  FAIL  snr  42 (needs >= 100 dB) n=32" in lines(document(report))


def test_no_escape_code_is_written_unless_asked_for() -> None:
    assert "\x1b" not in Text.parse({}).render(document(FAILED))
    assert "\x1b[31mFAIL\x1b[0m" in Text.parse({"colour": True}).render(document(FAILED))


def test_colour_takes_no_columns() -> None:
    plain, coloured = (Text.parse({"colour": on}).render(document(FAILED)) for on in (False, True))
    for code in ("\x1b[31m", "\x1b[32m", "\x1b[33m", "\x1b[0m"):
        coloured = coloured.replace(code, "")
    assert coloured == plain


def test_ascii_holds_only_ascii() -> None:
    report = Report((Metric("größe", 1.5, "µs"),), notes=("a → b … 中",))
    text = Text.parse({"ascii": True}).render(document(report))
    assert text.isascii()
    assert "a -> b ... \\u4e2d" in text


def test_columns_are_aligned_when_names_are_wide() -> None:
    report = Report((Metric("中文", 1, ""), Metric("abcd", 2, "")))
    assert lines(document(report))[1:] == ["  中文  1", "  abcd  2"]


def test_long_sentences_are_wrapped() -> None:
    report = Report(notes=("word " * 60,))
    assert max(map(len, lines(document(report), width=60)[1:])) <= 60


def test_quiet_shows_only_what_failed() -> None:
    assert lines(document(GOOD), quiet=True) == []
    text = "\n".join(lines(document(FAILED), quiet=True))
    assert "speed" in text
    assert "first" not in text


def test_quiet_run_shows_only_the_failed_stage() -> None:
    run = document(
        command="run", exit_code=1, verdict="fail", steps=[document(GOOD, command="prune"), document(FAILED)]
    )
    text = "\n".join(lines(run, quiet=True))
    assert "quantize" in text
    assert "prune" not in text


def test_advisory_says_that_the_exit_code_is_zero() -> None:
    assert "FAIL  advisory: exit 0" in lines(document(FAILED, advisory=True, exit_code=0))[0]


def test_an_error_shows_its_code_message_and_hint() -> None:
    shown = lines(document(exit_code=4, error=error()))
    assert shown[0].startswith("quantize: ERROR  exit 4")
    assert shown[1:3] == ["  no good", "  hint: do it well"]


def test_a_wrapped_line_never_starts_a_workflow_command() -> None:
    report = Report(notes=("x" * 57 + " ::set-output name=a::b",))
    shown = lines(document(report), width=60)
    assert any("\\::set-output" in line for line in shown)


CHAIN = {
    "title": "the chain",
    "columns": ["step", "size", "nodes", "latency", "speed-up", "interval", "top1 (n=600)", "seconds", "peak memory"],
    "rows": [
        ["01-convert", 1_245_000, 21, 0.21, 1.0, None, 0.98667, 9.1, 500 << 20],
        ["02-quantize", 321_000, 40, 0.105, 2.0, [1.91, 2.08], 0.985, 3.2, 300 << 20],
    ],
}


def test_a_run_ends_with_the_table_of_its_chain_and_its_verdict() -> None:
    run = document(command="run", verdict="pass", steps=[document(GOOD)], table=CHAIN, source=None, target=None)
    shown = lines(run)
    assert shown[-6].split() == [*CHAIN["columns"][:6], "top1", "(n=600)", "seconds", "peak", "memory"]  # type: ignore[index]
    assert shown[-4].split()[:10] == ["01-convert", "1.19", "MiB", "21", "210", "us", "1.000x", "-", "0.9867", "9.1"]
    assert "2.000x  1.910x to 2.080x" in shown[-3]
    assert shown[-1].startswith("run: PASS")


def test_a_run_counts_what_passed_and_shows_the_rest_unless_asked_for_all() -> None:
    stages = [document(FAILED, ran_because="options changed: samples 128 → 64"), document(GOOD, reused="unchanged")]
    run = document(command="run", verdict="pass", steps=stages)
    shown = "\n".join(lines(run))
    assert "  ran: options changed: samples 128 → 64\n" in shown
    assert "  reused: unchanged\n" in shown
    assert shown.count("  1 check passed") == 2
    assert "all is well" not in shown
    assert "1.214x" not in shown
    everything = "\n".join(lines(run, full=True))
    assert "all is well" in everything
    assert "1.214x" in everything


def test_a_ratio_that_may_be_anything_is_said_to_be_noise() -> None:
    report = Report((Metric("ratio", 2.5, "x", (0.001, 6000.0), 0.99), Metric("size", 5, "bytes", (1.0, 900.0))))
    shown = "\n".join(lines(document(report)))
    assert "too noisy to tell at 99 %" in shown
    assert "1 bytes to 900 bytes" in shown


def test_a_failed_gate_is_told_by_its_check_alone() -> None:
    shown = lines(document(FAILED, error=error("gate-failed", 1, "speed: 3.1 % slower")))
    assert len([line for line in shown if "slower" in line]) == 1
    assert "  hint: do it well" in shown
