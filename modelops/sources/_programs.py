"""Files that are programs: loading one may run whatever its author wrote, so the user must say that it is trusted."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from modelops.errors import InputRefused, StageFailed, missing_path
from modelops.sources import Request


def trusted(spec: str, request: Request, *, what: str, runs: Callable[[str], bool], safer: str) -> Path:
    """The path of the program; InputRefused without --allow-code, naming the part of it that loading would run.

    ``what`` is what the file is, ``runs`` tells which members of an archive are run, ``safer`` is another way.
    """
    path = Path(spec)
    if not path.is_file():
        raise missing_path("file", path)
    if not request.allow_code:
        member = next((name for name in members(path) if runs(name)), "")
        part = f": {member} is run when it is loaded" if member else ""
        raise InputRefused(f"{path} is {what}, a program{part}", hint=f"{safer}; or add --allow-code if you trust it")
    return path


def members(path: Path) -> list[str]:
    """The names in an archive; none where the file is no archive. Nothing is unpacked."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except (zipfile.BadZipFile, ValueError, OSError):
        return []


def executed(path: Path) -> tuple[dict[str, str], ...]:
    """The record of the program that was run."""
    with open(path, "rb") as file:
        return ({"path": str(path.absolute()), "sha256": hashlib.file_digest(file, "sha256").hexdigest()},)


@contextmanager
def loading(path: Path, tool: str) -> Iterator[None]:
    """StageFailed, with what the loader said, where the program can't be loaded."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        raise StageFailed(
            f"{path}: {tool} can't load it: {type(error).__name__}: {text}",
            hint="save it with the version of torch that is installed here",
        ) from error
