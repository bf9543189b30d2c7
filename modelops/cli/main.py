"""The entry point: the one place that turns failures into messages and exit codes."""

from __future__ import annotations

import difflib
import errno
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, TypeGuard

from modelops import __version__
from modelops.errors import (
    EXIT_BUG,
    EXIT_INTERRUPTED,
    EnvironmentMissing,
    ModelOpsError,
    UsageError,
    from_os_error,
    unknown_name,
)

_REFUSALS = frozenset(
    {errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO}
    | {errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EAGAIN}
)
_ISSUES = "please report it, with the command and the lines above, where you got modelops from"


def main() -> None:
    """Run the command line of this process, and leave with its exit code."""
    _open_streams()
    signal.signal(signal.SIGTERM, _interrupt)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, _interrupt)
    code = run(sys.argv[1:])
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def _open_streams() -> None:
    """Open what the caller closed of the three streams, so that no file of ours takes their numbers."""
    while (lowest := os.open(os.devnull, os.O_RDWR)) < 3:
        pass
    os.close(lowest)
    sys.stdout = sys.stdout or os.fdopen(1, "w", encoding="utf-8")
    sys.stderr = sys.stderr or os.fdopen(2, "w", encoding="utf-8")


def run(argv: Sequence[str]) -> int:
    """Run a command line; gives the exit code that the table in ``modelops.errors`` tells."""
    words = list(argv)
    before_dashes = words[: words.index("--")] if "--" in words else words
    as_json, debug = "--json" in before_dashes, "--debug" in before_dashes
    name = words[0] if words else ""
    try:
        return _dispatch(words)
    except KeyboardInterrupt:
        return _interrupted(name, as_json=as_json)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        told = from_os_error(error, "can't go on") if _is_of_the_system(error) else error
        if isinstance(told, ModelOpsError):
            if debug:
                traceback.print_exc()
            from modelops.cli.shell import failure, print_failure

            return print_failure(failure(name, told), as_json=as_json)
        print(getattr(error, "text", None) or traceback.format_exc(), file=sys.stderr)
        print(f"this is a bug in modelops {__version__}: {_ISSUES}", file=sys.stderr)
        if as_json:
            _print_bug(name, error)
        return EXIT_BUG


def _is_of_the_system(error: Exception) -> TypeGuard[OSError]:
    """Whether the system refused what no bug asked of it: a path without permission, a full disk or table."""
    return isinstance(error, OSError) and error.errno in _REFUSALS


def _interrupted(name: str, *, as_json: bool) -> int:
    from modelops.cli.shell import failure, print_failure

    document = failure(name, ModelOpsError("interrupted: nothing was left half-written"))
    document["exit_code"] = EXIT_INTERRUPTED
    document["error"] |= {"code": "interrupted", "exit_code": EXIT_INTERRUPTED}
    return print_failure(document, as_json=as_json)


def _print_bug(name: str, error: Exception) -> None:
    from modelops.cli.shell import failure, print_failure

    document = failure(name, ModelOpsError(f"bug in modelops: {type(error).__name__}: {error}", hint=_ISSUES))
    print_failure(document, as_json=True)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _dispatch(words: list[str]) -> int:
    from modelops.cli import help as root

    if sys.platform == "win32":
        raise EnvironmentMissing("modelops does not run on Windows", hint="run it under WSL 2 or in a Linux container")
    if not words or words[0] in ("--help", "-h", "help"):
        print(root.page())
        return 0
    if words[0] == "--version":
        print(f"modelops {__version__}")
        return 0
    _refuse_foreign_bytes(words)
    name = words[0]
    if name in root.stage_files() or (name not in root.COMMANDS and name in _plugin_stages()):
        from modelops.cli.commands import _stage

        return _invoke(_stage.command(name), name, words[1:])
    if name not in root.COMMANDS:
        raise unknown_name("command", name, [*root.stage_files(), *root.COMMANDS])
    import importlib

    return _invoke(importlib.import_module(f"modelops.cli.commands.{name}").command(), name, words[1:])


def _refuse_foreign_bytes(words: list[str]) -> None:
    for word in words:
        try:
            word.encode()
        except UnicodeEncodeError as error:
            raise UsageError(f"{word!r} is not UTF-8, which the tools below need", hint="rename the file") from error


def _plugin_stages() -> list[str]:
    from modelops.stages import REGISTRY

    return list(REGISTRY.plugins())


def _invoke(function: Callable[..., Any], name: str, words: list[str]) -> int:
    """Let Typer parse the words and call the function; gives the function's exit code."""
    import typer

    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")
    app.command(name=name)(function)
    try:
        code = typer.main.get_command(app).main(args=words, prog_name=f"modelops {name}", standalone_mode=False)
    except typer.Abort as error:
        raise KeyboardInterrupt from error
    except typer.exceptions.TyperException as error:
        # What Typer raises on bad usage: an unknown flag, a missing argument, a value that is not a choice.
        raise _usage(error, name) from error
    if code == EXIT_INTERRUPTED:  # what Typer makes of KeyboardInterrupt
        raise KeyboardInterrupt
    return int(code or 0)


def _usage(error: Any, name: str) -> UsageError:
    """The same in the words of modelops; of several flags that look alike, only the nearest is named."""
    unknown = getattr(error, "possibilities", None)
    if unknown is None:
        return UsageError(" ".join(error.format_message().split()), hint=f"modelops {name} --help")
    known = [flag.lstrip("-") for flag in unknown]
    guess = difflib.get_close_matches(error.option_name.lstrip("-"), known, n=1, cutoff=0.6)
    hint = f"did you mean --{guess[0]}?" if guess else f"modelops {name} --help"
    return UsageError(f"no such option: {error.option_name}", hint=hint)


if __name__ == "__main__":
    main()
