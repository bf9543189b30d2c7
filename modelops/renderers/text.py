"""Text for people: the verdict first, then what was checked, measured and decided. No escape codes unless asked for."""

from __future__ import annotations

import textwrap

from modelops.core.component import option
from modelops.renderers import Renderer
from modelops.renderers._common import (
    WORDS,
    Document,
    aligned,
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
    width,
    worst_first,
)

_COLOURS = {"pass": "32", "done": "32", "inconclusive": "33", "not-evaluated": "33", "fail": "31", "error": "31"}
_NAME_WIDTH = 32
_ASCII = {"…": "...", "→": "->", "×": "x", "≥": ">=", "≤": "<=", "±": "+-", "–": "-", "—": "-", "µ": "u"}


class Text(Renderer):
    """Plain text that reads well in a terminal, in a log and in a mail."""

    colour: bool = option(default=False, help="Colour the verdicts.")
    ascii: bool = option(default=False, help="Write ASCII characters only.")
    quiet: bool = option(default=False, help="Show only what failed.")
    full: bool = option(default=False, help="Show every check and figure of every step of a run, not only of a stage.")
    width: int = option(default=100, help="Columns to wrap long sentences at.", min=40)

    def render(self, document: Document) -> str:
        """Blocks of lines, one for each stage; an empty text when quiet and nothing failed."""
        blocks = [
            self._stage(step, in_run=is_run(document)) for step in steps(document) if not self.quiet or _bad(step)
        ]
        error = own_error(document)
        if is_run(document) and (error or not self.quiet):
            blocks.append(self._run(document))
        text = "\n".join(_harmless(line) for block in blocks for line in (*block, ""))
        return self._ascii(text) if self.ascii else text

    def _stage(self, document: Document, *, in_run: bool) -> list[str]:
        short = self.quiet or (in_run and not self.full)
        found = worst_first(checks(document))
        shown = [check for check in found if check.get("verdict") != "pass"] if short else found
        lines = [self._headline(document), *self._reasons(document)]
        if document.get("reused"):
            lines += self._wrapped(f"reused: {visible(document['reused'])}")
        elif document.get("ran_because") and in_run:
            lines += self._wrapped(f"ran: {visible(document['ran_because'])}")
        lines += self._checks(shown)
        if in_run and not self.quiet and len(found) > len(shown):
            passed = len(found) - len(shown)
            lines.append(f"  {passed} check{'' if passed == 1 else 's'} passed")
        if not short:
            figures = [[visible(item["name"], 60), *measured(item)] for item in metrics(document)]
            lines += [f"  {line}" for line in aligned(figures, right=[1])]
            for columns, rows in tables(document):
                lines += ["", *(f"  {line}" for line in _grid(columns, rows))]
            if tables(document):
                lines.append("")
        if not self.quiet:
            for note in notes(document):
                lines += self._wrapped(f"- {visible(note)}")
        return lines

    def _checks(self, found: list[Document]) -> list[str]:
        names = [visible(check["name"], 60) for check in found]
        words = [WORDS.get(str(check["verdict"]), "?") for check in found]
        name_width = min(_NAME_WIDTH, max(map(width, names), default=0))
        word_width = max(map(len, words), default=0)
        lines = []
        for check, name, word in zip(found, names, words, strict=True):
            head = f"{word.ljust(word_width)}  {name}{' ' * (name_width - width(name))}  "
            lines += self._wrapped(head + sentence(check), indent=word_width + 2, colour=str(check["verdict"]))
        return lines

    def _run(self, document: Document) -> list[str]:
        columns, rows = table(document)
        if not rows or self.quiet:
            return [self._headline(document), *self._reasons(document)]
        return [*_grid(columns, rows), "", self._headline(document), *self._reasons(document)]

    def _headline(self, document: Document) -> str:
        found = outcome(document)
        details = [f"{visible(document.get('command') or 'modelops')}: {self._coloured(WORDS[found], found)}"]
        if document.get("exit_code"):
            details.append(f"exit {document['exit_code']}")
        elif document.get("advisory") and found not in ("pass", "done"):
            details.append("advisory: exit 0")
        details += [part for part in (route(document), "" if document.get("reused") else cost(document)) if part]
        return "  ".join(details)

    def _reasons(self, document: Document) -> list[str]:
        error = own_error(document)
        if not error:
            return []
        # A failed gate is told by its check below.
        judged = error.get("code") in ("gate-failed", "inconclusive") and checks(document)
        lines = [] if judged else self._wrapped(visible(error.get("message") or error.get("code")))
        if error.get("hint"):
            lines += self._wrapped(f"hint: {visible(error['hint'])}")
        return lines

    def _wrapped(self, text: str, indent: int = 4, colour: str = "") -> list[str]:
        lines = textwrap.wrap(
            text, self.width - 2, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False
        )
        word = WORDS.get(colour, "")
        if word and lines and lines[0].startswith(word):
            lines[0] = self._coloured(word, colour) + lines[0][len(word) :]
        return [f"  {line}" for line in lines]

    def _coloured(self, word: str, found: str) -> str:
        return f"\x1b[{_COLOURS[found]}m{word}\x1b[0m" if self.colour else word

    def _ascii(self, text: str) -> str:
        for character, plain in _ASCII.items():
            text = text.replace(character, plain)
        return text.encode("ascii", "backslashreplace").decode("ascii")


def _grid(columns: list[str], rows: list[list[str]]) -> list[str]:
    """A table with its columns' names above a ruler."""
    ruler = ["-" * max(width(row[column]) for row in (columns, *rows)) for column in range(len(columns))]
    return aligned([columns, ruler, *rows], right=range(1, len(columns)))


def _bad(document: Document) -> bool:
    return outcome(document) not in ("pass", "done")


def _harmless(line: str) -> str:
    """The line with a mark before a leading "::", which GitHub's runner would obey in any job's log."""
    rest = line.lstrip()
    return line[: len(line) - len(rest)] + "\\" + rest if rest.startswith("::") else line
