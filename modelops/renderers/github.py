"""GitHub Actions: the text report, and annotations for what to look at first.

GitHub shows ten annotations of a sort for a step and drops the rest without a word, so that the worst nine are
written, and one line that counts the others.
"""

from __future__ import annotations

from collections.abc import Iterator

from modelops.core.component import option
from modelops.renderers import Renderer
from modelops.renderers._common import (
    SEVERITY,
    Document,
    checks,
    is_run,
    outcome,
    own_error,
    sentence,
    steps,
    visible,
)
from modelops.renderers.text import Text

_LEVELS = {"error": "error", "fail": "error", "inconclusive": "warning", "not-evaluated": "notice"}


class Github(Renderer):
    """Workflow commands, after a report that a person reads in the log."""

    annotations: int = option(default=9, help="Annotations to write at most.", min=1, max=9)

    def render(self, document: Document) -> str:
        """The report as text, and one workflow command a line."""
        found = sorted(_findings(document), key=lambda finding: SEVERITY.index(finding[0]))
        lines = [_command(*finding) for finding in found[: self.annotations]]
        if len(found) > self.annotations:
            left = found[self.annotations :]
            lines.append(_command(left[0][0], "modelops", f"{len(left)} more: see the report in the log of this step"))
        return Text.parse({}).render(document) + "".join(f"{line}\n" for line in lines)


def _findings(document: Document) -> Iterator[tuple[str, str, str, bool]]:
    """(severity, title, message, advisory) of everything that did not pass."""
    for step in steps(document):
        command = str(step.get("command") or "modelops")
        advisory = bool(step.get("advisory"))
        error = step.get("error")
        if error and outcome(step) != "fail":
            yield outcome(step), f"{command}: {error.get('code')}", _told(error), advisory
        for check in checks(step):
            if check.get("verdict") in _LEVELS:
                title = f"{command}: {check['name']}: {check['verdict']}"
                yield str(check["verdict"]), title, sentence(check), advisory
    error = own_error(document)
    if error and is_run(document):
        yield "error", f"{document.get('command')}: {error.get('code')}", _told(error), False


def _told(error: Document) -> str:
    hint = error.get("hint")
    return f"{error.get('message')}{f' (hint: {hint})' if hint else ''}"


def _command(severity: str, title: str, message: str, advisory: bool = False) -> str:
    level = "notice" if advisory else _LEVELS[severity]
    return f"::{level} title={_property(visible(title, 200))}::{_data(visible(message, 1000) or visible(title, 200))}"


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
