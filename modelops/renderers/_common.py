"""What the formats share: the parts of a document, figures with their units, and text that can do no harm.

Names of nodes, inputs and files come from models and users: they may hold line breaks, escape sequences, commands of
a CI system, or anything else. ``visible`` makes them one line of printable text; each format escapes what is special
to it on top.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from modelops.core.wording import size_text

Document = Mapping[str, Any]

# From the one to look at first.
SEVERITY = ("error", "fail", "inconclusive", "not-evaluated", "pass")
WORDS = {
    "error": "ERROR",
    "fail": "FAIL",
    "inconclusive": "INCONCLUSIVE",
    "not-evaluated": "NOT EVALUATED",
    "pass": "PASS",
    "done": "DONE",
}
LONGEST = 500

# What the columns of a run's closing table count.
COLUMN_UNITS = {
    "size": "bytes",
    "latency": "ms",
    "speed-up": "x",
    "interval": "x",
    "SQNR dB": "",
    "seconds": "s",
    "peak memory": "bytes",
    "its interval": "ms",
    "memory": "bytes",
    "load": "ms",
    "time": "ms",
    "of peak": "fraction",
    "of bandwidth": "fraction",
}

_RATIOS = ("x", "ratio")
_WIDEST = 10.0
_TIMES = {"ms": 1e-3, "s": 1.0, "us": 1e-6, "seconds": 1.0}
# Azure, TeamCity and old GitHub runners act on these wherever they stand in a line.
_RUNNER_COMMAND = re.compile(r"##(?=\w*\[)")


def is_run(document: Document) -> bool:
    """Whether the document tells of several stages."""
    return bool(document.get("steps"))


def steps(document: Document) -> list[Document]:
    """The documents of the stages, in order: those of a run, or the document itself."""
    return list(document.get("steps") or [document])


def own_error(document: Document) -> Mapping[str, Any] | None:
    """The error of the document that none of its steps tells; None where there is none."""
    error: Mapping[str, Any] | None = document.get("error")
    told = [step.get("error") for step in document.get("steps") or ()]
    return None if error is None or error in told else error


def outcome(document: Document) -> str:
    """One of the keys of ``WORDS``: a verdict; "error"; or "done" when nothing was judged and all went well."""
    error = document.get("error")
    verdict = document.get("verdict") or (document.get("report") or {}).get("verdict")
    if error and not (error.get("code") == "gate-failed" and verdict == "fail"):
        return "inconclusive" if error.get("code") == "inconclusive" else "error"
    if verdict in WORDS and (verdict != "not-evaluated" or checks(document)):
        return str(verdict)
    return "done" if not document.get("exit_code") else "error"


def checks(document: Document) -> list[Mapping[str, Any]]:
    return list((document.get("report") or {}).get("checks") or ())


def metrics(document: Document) -> list[Mapping[str, Any]]:
    return list((document.get("report") or {}).get("metrics") or ())


def notes(document: Document) -> list[str]:
    """Sentences for a person: what the stage decided, where it had a choice, then its remarks."""
    report = document.get("report") or {}
    decision = (report.get("details") or {}).get("decision")
    return [*([f"decided: {decision}"] if decision else []), *(str(note) for note in report.get("notes") or ())]


def worst_first(found: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Checks, the failed ones first; otherwise in their order."""
    return sorted(found, key=lambda check: _rank(str(check.get("verdict"))))


def _rank(verdict: str) -> int:
    return SEVERITY.index(verdict) if verdict in SEVERITY else len(SEVERITY)


def route(document: Document) -> str:
    """Where the work started and where its result lies: "digits/01-convert -> digits/02-simplify"."""
    ends = [document.get("source"), document.get("target")]
    return " -> ".join(visible(end["path"]) for end in ends if end and end.get("path"))


def cost(document: Document) -> str:
    """What it took: "1.9 s, 310 MiB"; empty where it is not known."""
    seconds, memory = document.get("seconds"), document.get("peak_memory_bytes")
    parts = [figure(seconds, "s") if seconds is not None else "", figure(memory, "bytes") if memory is not None else ""]
    return ", ".join(part for part in parts if part)


def sentence(check: Mapping[str, Any]) -> str:
    """What a check found, for a person: its message; or the value, the threshold and the count."""
    message = visible(check.get("message") or "")
    if message:
        return message
    value, threshold, n = check.get("value"), check.get("threshold"), check.get("n")
    parts = [figure(value)] if value is not None else []
    if threshold:
        parts.append(f"(needs {visible(threshold)})")
    if n is not None:
        parts.append(f"n={n}")
    return " ".join(parts)


def measured(metric: Mapping[str, Any]) -> tuple[str, str]:
    """A metric's value with its unit, and how sure it is: ("1.21x", "1.18x to 1.25x at 99 %, n=8")."""
    unit = str(metric.get("unit") or "")
    sure = []
    if metric.get("interval"):
        confidence = metric.get("confidence")
        at = f" at {100 * confidence:.4g} %" if isinstance(confidence, (int, float)) else ""
        sure.append(f"{span(metric['interval'], unit)}{at}")
    if metric.get("n") is not None:
        sure.append(f"n={metric['n']}")
    return figure(metric.get("value"), unit), ", ".join(sure)


def table(document: Document) -> tuple[list[str], list[list[str]]]:
    """The closing table of a run: its columns, and its rows as a person reads them; empty where there is none."""
    return _readable(document.get("table") or {})


def tables(document: Document) -> list[tuple[list[str], list[list[str]]]]:
    """The tables that a stage's report holds, in the same form."""
    details = (document.get("report") or {}).get("details") or {}
    found = [_readable(one) for one in details.get("tables") or ()]
    return [one for one in found if one[1]]


def _readable(found: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    columns = [str(name) for name in found.get("columns") or ()]
    rows = [
        [_cell(value, COLUMN_UNITS.get(name, "")) for name, value in zip(columns, row, strict=True)]
        for row in found.get("rows") or ()
    ]
    return ([visible(name, 40) for name in columns], rows) if rows else ([], [])


def _cell(value: Any, unit: str) -> str:
    if isinstance(value, (list, tuple)):
        return span(value, unit)
    return "-" if value is None else figure(value, unit)


def span(interval: Sequence[Any], unit: str) -> str:
    """An interval with its unit: "1.180x to 1.250x"; of a ratio that may be anything, only that."""
    low, high = interval
    if unit in _RATIOS and (low <= 0 or high / low > _WIDEST):
        return "too noisy to tell"
    return f"{figure(low, unit)} to {figure(high, unit)}"


def figure(value: Any, unit: str = "") -> str:
    """A value with its unit, as a person reads it: "45.1 KiB", "1.21x", "3.2 ms", "98.5 %"."""
    if value is None:
        return "n/a"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return f"{visible(value)} {visible(unit)}".strip()
    if not math.isfinite(value):
        return f"{value} {visible(unit)}".strip()
    if unit == "bytes":
        return size_text(value)
    if unit in _TIMES:
        return _time(value * _TIMES[unit])
    if unit == "fraction":
        return f"{_number(100 * value)} %"
    if unit in _RATIOS:
        return f"{value:.3f}x" if 0.1 <= abs(value) < 10 else f"{_number(value)}x"
    return f"{_number(value)} {visible(unit)}".strip()


def _number(value: float) -> str:
    if isinstance(value, int):
        return f"{value:,}" if abs(value) < 10**15 else f"{value:.4g}"
    if value and not 1e-4 <= abs(value) < 1e7:
        return f"{value:.3g}"
    digits = 4 if abs(value) < 1000 else max(4, math.floor(math.log10(abs(value))) + 1)
    return f"{value:.{digits}g}"


def _time(seconds: float) -> str:
    size = abs(seconds)
    if size >= 120:
        return f"{seconds / 60:.1f} min"
    if size >= 1:
        return f"{seconds:.3g} s"
    if size >= 1e-3 or not size:
        return f"{seconds * 1e3:.3g} ms"
    return f"{seconds * 1e6:.3g} us"


def visible(value: Any, longest: int = LONGEST) -> str:
    """The value as one line: what has no shape of its own is written as an escape, what is too long is cut."""
    text = str(value)
    if len(text) > longest:
        text = text[: longest - 1] + "…"
    shown = "".join(character if character.isprintable() else _escape(character) for character in text)
    return _RUNNER_COMMAND.sub("# #", shown)


def _escape(character: str) -> str:
    common = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
    if unicodedata.category(character) == "Zs":
        return " "
    code = ord(character)
    return common.get(character) or (f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}")


def width(text: str) -> int:
    """How many columns of a terminal the text takes."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def aligned(rows: Sequence[Sequence[str]], right: Iterable[int] = ()) -> list[str]:
    """The rows as lines with their columns aligned, those in ``right`` to the right."""
    if not rows:
        return []
    right = set(right)
    widths = [max(width(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = []
        for column, cell in enumerate(row):
            blank = " " * (widths[column] - width(cell))
            cells.append(blank + cell if column in right else cell + blank)
        lines.append("  ".join(cells).rstrip())
    return lines
