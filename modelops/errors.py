"""Every way a command can fail, drawn as a tree with the exit code that a script sees.

::

    (success)                     0
    ModelOpsError
    ├── GateFailed                1   a check did not hold: numerics, accuracy, speed, size
    ├── UsageError                2   a flag, recipe key or name is wrong
    ├── Inconclusive              3   noise too high, or too little data, to decide
    ├── InputRefused              4   malformed, altered or untrusted input
    ├── StageFailed               5   a tool below crashed or met an op it can't treat
    ├── ResourceExhausted         6   time, memory or disk ran out
    └── EnvironmentMissing        7   an optional package or a device is not here
    (a bug in modelops)           70
    (interrupted)                 130

A message states the fact with its values; a hint gives the next action, as a command where possible.
"""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

EXIT_BUG = 70
EXIT_INTERRUPTED = 130
_LONGEST_TEXT = 2000

# Out of space, over quota, read-only file system, failing device, file too large for the limit in force.
_DISK_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG, errno.EROFS, errno.EMFILE, errno.ENFILE})
_OUT_OF_DISK = re.compile(r"no space left|disk quota exceeded|errno 28\b", re.IGNORECASE)
_OUT_OF_MEMORY = re.compile(r"bad_alloc|failed to allocate memory|cannot allocate memory|can't allocate", re.IGNORECASE)


class ModelOpsError(Exception):
    """Base of every failure that a user can act on.

    ``message`` states the fact, ``hint`` the next action; both are one line, cut where a hostile file makes them long.
    """

    exit_code: ClassVar[int] = EXIT_BUG
    code: ClassVar[str] = "error"

    def __init__(self, message: str, *, hint: str = "") -> None:
        message = _cut(message)
        super().__init__(message)
        self.message = message
        self.hint = _cut(hint)

    def to_dict(self) -> dict[str, object]:
        return {"code": self.code, "exit_code": self.exit_code, "message": self.message, "hint": self.hint}


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]}…"


class GateFailed(ModelOpsError):
    """A check did not hold."""

    exit_code = 1
    code = "gate-failed"


class UsageError(ModelOpsError):
    """A flag, a recipe key or a name is wrong."""

    exit_code = 2
    code = "usage"


class Inconclusive(ModelOpsError):
    """Noise is too high, or data too scarce, to decide."""

    exit_code = 3
    code = "inconclusive"


class InputRefused(ModelOpsError):
    """An input is malformed, altered or not trusted."""

    exit_code = 4
    code = "input-refused"


class StageFailed(ModelOpsError):
    """A tool below crashed, or met something that it can't treat."""

    exit_code = 5
    code = "stage-failed"


class ResourceExhausted(ModelOpsError):
    """Time, memory or disk ran out."""

    exit_code = 6
    code = "resource-exhausted"


class EnvironmentMissing(ModelOpsError):
    """An optional package or a device is not here."""

    exit_code = 7
    code = "environment-missing"


ERRORS: dict[str, type[ModelOpsError]] = {
    error.code: error
    for error in (
        GateFailed,
        UsageError,
        Inconclusive,
        InputRefused,
        StageFailed,
        ResourceExhausted,
        EnvironmentMissing,
    )
}


def nearest(word: str, known: Iterable[str]) -> str:
    """The known name most like ``word``, or an empty string."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return matches[0] if matches else ""


def unknown_name(what: str, word: str, known: Iterable[str]) -> UsageError:
    """The error for a name that is not one of ``known``, with the nearest right one."""
    names = sorted(known)
    guess = nearest(word, names)
    hint = f"did you mean {guess!r}?" if guess else f"known: {', '.join(names) or '(none)'}"
    return UsageError(f"unknown {what} {word!r}", hint=hint)


def from_os_error(error: OSError, doing: str) -> ModelOpsError:
    """The failure that an operating-system error means to a user."""
    where = f" ({error.filename})" if error.filename else ""
    text = f"{doing}: {error.strerror or error}{where}"
    if error.errno in _DISK_ERRNOS:
        return ResourceExhausted(text, hint="free some space or choose another disk, then run the command again")
    if error.errno == errno.ENOMEM:
        return ResourceExhausted(text, hint="free some memory, or raise --memory-limit")
    return InputRefused(text, hint="check the path and its permissions")


def missing_path(what: str, path: Path) -> UsageError:
    """The error for a path that does not exist, with the sibling that it may have meant."""
    if path.is_symlink():
        return UsageError(f"no such {what}: {path} is a link to nothing", hint="mend the link, or give another path")
    try:
        siblings = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        siblings = []
    guess = nearest(path.name, (name for name in siblings if not name.startswith(".") and name != path.name))
    hint = f"did you mean {path.parent / guess}?" if guess else "check the path"
    return UsageError(f"no such {what}: {path}", hint=hint)


@contextmanager
def tool(name: str, *, hint: str = "") -> Iterator[None]:
    """Turn whatever a third-party tool raises inside the block into StageFailed or ResourceExhausted."""
    try:
        yield
    except ModelOpsError:
        raise
    except MemoryError as error:
        raise ResourceExhausted(f"{name} ran out of memory", hint="raise --memory-limit or free memory") from error
    except Exception as error:
        text = " ".join(str(error).split())[:400] or type(error).__name__
        if isinstance(error, OSError) and error.errno in _DISK_ERRNOS:
            raise from_os_error(error, name) from error
        if _OUT_OF_DISK.search(text):
            raise ResourceExhausted(f"{name} ran out of disk: {text}", hint="free some space") from error
        if _OUT_OF_MEMORY.search(text):
            raise ResourceExhausted(f"{name} ran out of memory: {text}", hint="raise --memory-limit") from error
        raise StageFailed(f"{name} failed: {type(error).__name__}: {text}", hint=hint) from error
