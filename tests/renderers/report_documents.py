"""Documents to render: a good one, a failed one, a hostile one."""

from __future__ import annotations

from typing import Any

from modelops.core.report import Check, Metric, Report

HOSTILE = (
    "a\n::error::b",
    "::add-mask::secret",
    "\u2028::set-output name=x::y",
    "\x1b[2J\x1b]0;title\x07",
    "\x9b31m",
    "x | y | z",
    "`code` ``more`` ```fence",
    "<script>alert(1)</script> & <!-- -->",
    "]]> & <![CDATA[",
    "\x00\x01\x0b\x7f\ufffe\uffff",
    "\ud800lone",
    "@octocat see #12, http://x.example and www.x.example",
    "\u202ereversed\u202c zero\u200bwidth",
    "a##[error]b ##vso[task.complete]c ##teamcity[buildStop]",
    "100% %0A::stop-commands::x",
    "\r\nsection_start:1:a\r\x1b[0K",
    "[link](javascript:x) ![image](y) **bold** _it_ ~~s~~ $x$",
    "long " * 3000,
    "",
    " ",
)


def document(report: Report | None = None, **values: Any) -> dict[str, Any]:
    """A document of one stage, as the pipeline writes it."""
    made: dict[str, Any] = {
        "schema": "modelops.document/1",
        "command": "quantize",
        "exit_code": report.exit_code if report is not None else 0,
        "verdict": report.verdict if report is not None else None,
        "advisory": False,
        "source": {"path": "out/02-simplify", "id": "a" * 64},
        "target": {"path": "out/03-quantize", "id": "b" * 64},
        "reused": "",
        "seconds": 1.92,
        "peak_memory_bytes": 310 << 20,
        "report": report.to_dict() if report is not None else None,
        "error": None,
        "steps": [],
    }
    return {**made, **values}


def error(code: str = "input-refused", exit_code: int = 4, message: str = "no good", hint: str = "do it well") -> Any:
    return {"code": code, "exit_code": exit_code, "message": message, "hint": hint}


GOOD = Report(
    metrics=(
        Metric("size", 46182, "bytes"),
        Metric("ratio", 1.214, "x", (1.18, 1.25), 0.99, 8),
        Metric("top1", 0.98519, "fraction", n=540),
    ),
    checks=(Check("top1", "pass", "top-1 fell by 0.2 points", 0.002, "<= 0.02", 540),),
    notes=("int8 does not pay here: kept as float",),
)
FAILED = Report(
    checks=(
        Check("first", "pass", "all is well"),
        Check("numerics", "inconclusive", "too few rows", 12, ">= 32", 12),
        Check("speed", "fail", "3.1 % slower (99 % interval 2.2 to 4.0 %)", 0.969, ">= 0.98", 8),
        Check("labels", "not-evaluated", "no labels were given"),
    ),
)


def hostile() -> dict[str, Any]:
    """A document in which every text is hostile, and a run of such documents."""
    stages = []
    for number, text in enumerate(HOSTILE):
        report = Report(
            metrics=(Metric(text, text, text), Metric(text, float("nan"), text, (0.0, float("inf")), 0.5)),
            checks=(
                Check(text, "fail", text, text, text),
                Check(text, "inconclusive", "", 1.0, text, 3),
                Check(text, "not-evaluated", text),
                Check(text, "pass", text),
            ),
            notes=(text,),
            details={"anything": [text]},
        )
        stages.append(
            document(
                report,
                command=text or "quantize",
                source={"path": text, "id": text},
                reused=text if number % 2 else "",
                error=error("stage-failed", 5, text, text) if number % 3 else None,
            )
        )
    return document(
        command="run", exit_code=1, verdict="fail", steps=stages, error=error("usage", 2, "own", HOSTILE[0])
    )
