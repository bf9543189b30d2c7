"""The shell: where results, errors and progress go. Results to standard output, everything else to standard error."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from modelops.errors import ModelOpsError, UsageError, from_os_error, unknown_name
from modelops.pipeline import Surroundings

_HEARTBEAT_SECONDS = 30.0


@dataclass(frozen=True)
class Shell:
    """What the flags that every command shares ask for."""

    command: str
    json: bool = False
    report: tuple[str, ...] = ()
    quiet: bool = False
    verbose: bool = False
    debug: bool = False
    time_limit: float | None = None
    memory_limit: int | None = None
    reports: tuple[tuple[str, Path], ...] = field(init=False, default=())

    def __post_init__(self) -> None:
        if self.quiet and (self.verbose or self.debug):
            raise UsageError("--quiet contradicts --verbose and --debug", hint="give one of them")
        object.__setattr__(self, "reports", tuple(_target(text) for text in self.report))
        level = logging.DEBUG if self.debug else logging.INFO if self.verbose else logging.WARNING
        logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr, force=True)

    @contextlib.contextmanager
    def surroundings(self) -> Iterator[Surroundings]:
        """How stages run under these flags: limits, progress on standard error, a worker's own output to a log."""
        with contextlib.ExitStack() as stack:
            log_to: IO[bytes] = sys.stderr.buffer if self.debug else stack.enter_context(tempfile.TemporaryFile())
            listener = None if self.quiet else stack.enter_context(_progress())
            yield Surroundings(self.time_limit, self.memory_limit, listener, log_to)

    def show(self, document: Mapping[str, Any]) -> int:
        """Print a document and write the reports that were asked for; gives the document's exit code."""
        for name, path in self.reports:
            _write(path, _rendered(name, document))
        if self.json:
            _print(_rendered("json", document))
        elif not self.quiet or document["exit_code"] != 0:
            _print(_rendered("text", document, **_terminal(), full=self.verbose, quiet=self.quiet))
        code: int = document["exit_code"]
        return code

    def show_value(self, value: Mapping[str, Any], text: str) -> int:
        """Print what a command that judges nothing found: JSON, or the text; quietly, nothing but JSON."""
        if self.json or not self.quiet:
            _print(_rendered("json", value) if self.json else text)
        return 0

    def fail(self, error: ModelOpsError) -> int:
        """Say what went wrong: one document with --json, else one message on standard error; its trace with --debug."""
        if self.debug:
            traceback.print_exception(error)
        document = failure(self.command, error)
        for name, path in self.reports:
            with contextlib.suppress(ModelOpsError):
                _write(path, _rendered(name, document))
        return print_failure(document, as_json=self.json)


def failure(command: str, error: ModelOpsError) -> dict[str, Any]:
    """The document of a command that could not do its work."""
    return {
        "schema": "modelops.document/1",
        "command": command,
        "exit_code": error.exit_code,
        "verdict": None,
        "advisory": False,
        "source": None,
        "target": None,
        "reused": "",
        "ran_because": "",
        "seconds": None,
        "peak_memory_bytes": None,
        "report": None,
        "error": error.to_dict(),
        "steps": [],
    }


def print_failure(document: Mapping[str, Any], *, as_json: bool) -> int:
    """Print a failed command's document, or its message for a person; gives its exit code."""
    error = document["error"]
    if as_json:
        _print(_rendered("json", document))
    else:
        with contextlib.suppress(OSError):  # nobody listens; the exit code still tells
            print(f"error: {plain(error['message'])}", file=sys.stderr)
            if error["hint"]:
                print(f"  hint: {plain(error['hint'])}", file=sys.stderr)
    code: int = document["exit_code"]
    return code


def plain(text: str) -> str:
    """Text on one line without control characters, which a hostile name could use to steer a terminal."""
    return "".join(char if char.isprintable() else " " for char in text)


def _print(text: str) -> None:
    # What standard output has no characters for is written as escapes.
    encoding = sys.stdout.encoding or "utf-8"
    try:
        print(text.rstrip("\n").encode(encoding, "backslashreplace").decode(encoding))
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has gone (as head does): the exit code still tells.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _target(text: str) -> tuple[str, Path]:
    from modelops.renderers import REGISTRY

    name, equals, path = text.partition("=")
    if not equals or not path:
        raise UsageError(f"--report {text!r} is not FORMAT=PATH", hint="such as --report junit=report.xml")
    if name not in REGISTRY.builtin() and name not in REGISTRY.names():
        raise unknown_name("report format", name, REGISTRY.names())
    target = Path(path)
    if target.is_dir() or not target.absolute().parent.is_dir():
        raise UsageError(f"--report can't write {path}", hint="give a file in a folder that exists")
    return name, target


def _rendered(name: str, document: Mapping[str, Any], **options: Any) -> str:
    from modelops.renderers import REGISTRY

    return REGISTRY.load(name).parse(options).render(document)


def _terminal() -> dict[str, Any]:
    """What standard output can show: colours, characters beyond ASCII, columns."""
    on_terminal = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    forced = any(os.environ.get(name, "0") not in ("", "0") for name in ("FORCE_COLOR", "CLICOLOR_FORCE"))
    return {
        "colour": (on_terminal or forced) and "NO_COLOR" not in os.environ,
        "ascii": not (sys.stdout.encoding or "").lower().replace("-", "").startswith("utf8"),
        "width": max(60, min(160, shutil.get_terminal_size().columns)) if on_terminal else 100,
    }


def _write(path: Path, text: str) -> None:
    if path.exists() and not path.is_file():
        # /dev/stdout, a pipe: written to, and never replaced.
        try:
            with open(path, "w", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise from_os_error(error, f"writing the report {path}") from error
        return
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        fresh.write_text(text, encoding="utf-8")
        os.replace(fresh, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            fresh.unlink()
        raise from_os_error(error, f"writing the report {path}") from error


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str, int, int | None], None]]:
    """A listener: a bar on a terminal; else a line when work starts, and a sign of life now and then."""
    if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True), transient=True) as bars:
            tasks: dict[str, Any] = {}

            def on_terminal(what: str, done: int, total: int | None) -> None:
                if what not in tasks:
                    tasks[what] = bars.add_task(plain(what), total=total)
                bars.update(tasks[what], completed=done, total=total)

            yield on_terminal
        return
    spoken: dict[str, float] = {}

    def in_lines(what: str, done: int, total: int | None) -> None:
        now = time.monotonic()
        ended = total is not None and done >= total
        if what in spoken and not ended and now - spoken[what] < _HEARTBEAT_SECONDS:
            return
        spoken[what] = now
        with contextlib.suppress(OSError):  # the work goes on when nobody listens
            print(f"{plain(what)}{f' {done}/{total}' if total else ''}", file=sys.stderr, flush=True)

    yield in_lines
