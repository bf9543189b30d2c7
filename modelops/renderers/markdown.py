"""Markdown for pull requests, job summaries and wikis: one heading and two tables for each stage."""

from __future__ import annotations

import re

from modelops.core.component import option
from modelops.renderers import Renderer
from modelops.renderers._common import (
    WORDS,
    Document,
    checks,
    cost,
    is_run,
    measured,
    metrics,
    notes,
    outcome,
    own_error,
    route,
    sentence,
    steps,
    table,
    tables,
    visible,
    worst_first,
)

_SPECIAL = re.compile(r"([\\`*_\[\]|~$])")
# A mention, an issue, a link or an image would notify people, or take them elsewhere, in the name of a tensor.
_LIVE = re.compile(r"@(?=\w)|#(?=\d)|:(?=//)|(?<=www)\.|(?<=WWW)\.")
_FEWEST_ROWS = 3


class Markdown(Renderer):
    """GitHub-flavoured Markdown; what comes from a model or a file name is shown, never interpreted."""

    limit_bytes: int = option(
        default=60_000,
        help="Longest text; rows are left out, the best ones first, to stay below it.",
        min=4_000,
        unit="bytes",
    )

    def render(self, document: Document) -> str:
        """A section for each stage."""
        rows = 200
        while True:
            text = self._text(document, rows)
            if len(text.encode()) <= self.limit_bytes or rows <= _FEWEST_ROWS:
                return _cut(text, self.limit_bytes)
            rows = max(_FEWEST_ROWS, rows // 2)

    def _text(self, document: Document, rows: int) -> str:
        lines: list[str] = []
        if is_run(document):
            lines += _heading(document, "##")
            error = own_error(document)
            lines += _error(error) if error else []
            lines += _overview(document)
        for step in steps(document):
            lines += _heading(step, "###")
            lines += _stage(step, rows)
        return "\n".join(lines).rstrip("\n") + "\n"


def _heading(document: Document, level: str) -> list[str]:
    words = f"{level} {code(document.get('command') or 'modelops')}: {WORDS[outcome(document)]}"
    return [words, ""]


def _overview(document: Document) -> list[str]:
    rows = [
        [code(step.get("command") or ""), WORDS[outcome(step)], prose(step.get("reused") or cost(step))]
        for step in steps(document)
    ]
    columns, chain = table(document)
    measured_chain = [[code(row[0]), *map(prose, row[1:])] for row in chain]
    return [*_table(["step", "verdict", "took"], rows), *_table([prose(name) for name in columns], measured_chain)]


def _stage(document: Document, rows: int) -> list[str]:
    facts = [code(route(document)) if route(document) else "", cost(document)]
    if document.get("exit_code"):
        facts.append(f"exit {document['exit_code']}")
    elif document.get("advisory") and outcome(document) not in ("pass", "done"):
        facts.append("advisory: exit 0")
    lines = [", ".join(fact for fact in facts if fact), ""]
    if document.get("error"):
        lines += _error(document["error"])
    if document.get("reused"):
        lines += [f"Reused: {prose(document['reused'])}", ""]
    elif document.get("ran_because"):
        lines += [f"Ran: {prose(document['ran_because'])}", ""]
    found = worst_first(checks(document))
    judged = [
        [WORDS.get(str(check["verdict"]), "?"), code(check["name"]), prose(sentence(check))] for check in found[:rows]
    ]
    lines += _table(["verdict", "check", "finding"], judged, left_out=len(found) - len(judged))
    figures = [[code(item["name"]), *map(prose, measured(item))] for item in metrics(document)]
    lines += _table(["figure", "value", "certainty"], figures[:rows], left_out=len(figures) - rows)
    for columns, body in tables(document):
        readable = [[code(row[0]), *map(prose, row[1:])] for row in body]
        lines += _table([prose(name) for name in columns], readable[:rows], left_out=len(readable) - rows)
    lines += [f"- {prose(note)}" for note in notes(document)[:rows]]
    return [*lines, ""]


def _error(error: Document) -> list[str]:
    lines = [f"**{prose(error.get('code') or 'error')}**: {prose(error.get('message') or '')}", ""]
    return [*lines, f"Hint: {prose(error['hint'])}", ""] if error.get("hint") else lines


def _table(columns: list[str], rows: list[list[str]], left_out: int = 0) -> list[str]:
    if not rows:
        return []
    lines = [columns, ["---"] * len(columns), *rows]
    more = [f"and {left_out} more", ""] if left_out > 0 else []
    return [*(f"| {' | '.join(line)} |" for line in lines), "", *more]


def code(text: object) -> str:
    """The text as a code span, which nothing in it can end, also inside a table."""
    shown = visible(text).replace("|", "\\|")
    longest = max((len(run) for run in re.findall("`+", shown)), default=0)
    fence = "`" * (longest + 1)
    blank = " " if shown.startswith("`") or shown.endswith("`") else ""
    return f"{fence}{blank}{shown}{blank}{fence}" if shown.strip() else ""


def prose(text: object) -> str:
    """The text as plain words: no markup, no HTML, no mentions, no links."""
    shown = visible(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    shown = _SPECIAL.sub(r"\\\1", shown)
    return _LIVE.sub(lambda match: f"{match[0]}&#8203;", shown)


def _cut(text: str, limit: int) -> str:
    if len(text.encode()) <= limit:
        return text
    end = "\n\n(cut here: the report is too long)\n"
    kept = text.encode()[: limit - len(end)].decode(errors="ignore")
    return kept.rpartition("\n")[0] + end
