"""A function of the user's, written ``file.py:function``, that gives the samples."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from modelops.datasets import Context, Dataset, Sample
from modelops.errors import InputRefused, ModelOpsError, StageFailed, UsageError, missing_path, nearest

_SPEC = re.compile(r"(?P<file>.+\.py):(?P<function>[A-Za-z_]\w*)")


class PythonFunction(Dataset):
    """A function, "file.py:function", that returns an iterable of feeds (name to array), or of (feed, label) pairs."""

    names_inputs = True

    @classmethod
    def reads(cls, path: Path) -> bool:
        match = _SPEC.fullmatch(str(path))
        return match is not None and Path(match["file"]).is_file()

    @classmethod
    def code(cls, path: Path) -> tuple[Path, ...]:
        """The file, and the modules beside it that it imports."""
        return code_of(path)

    def samples(self, path: Path, context: Context, limit: int | None = None) -> Iterator[Sample]:
        _parsed(path)
        if limit == 0:
            return
        with user_code(path):
            for number, item in enumerate(iter(function_of(path)())):
                yield _sample(item, f"{path}, sample {number}")
                if limit is not None and number + 1 >= limit:
                    return


def code_of(path: Path) -> tuple[Path, ...]:
    """The file of a ``file.py:function``, and the modules beside it that it imports."""
    return tuple(_with_imports(_parsed(path)[0]))


def function_of(path: Path) -> Any:
    """The function that ``file.py:function`` names, from a fresh import; UsageError where there is none."""
    return _loaded(*_parsed(path))


def _parsed(path: Path) -> tuple[Path, str]:
    match = _SPEC.fullmatch(str(path))
    if match is None:
        raise UsageError(f"{path} is not of the form file.py:function", hint="for example data.py:samples")
    file = Path(match["file"])
    if not file.is_file():
        raise missing_path("file", file)
    return file, match["function"]


def _loaded(file: Path, function: str) -> Any:
    """The function, from a fresh import of its file."""
    name = f"modelops_data_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise InputRefused(f"{file} can't be imported", hint="give a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    found = getattr(module, function, None)
    if not callable(found):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        guess = nearest(function, known)
        raise UsageError(
            f"{file} has no function {function!r}",
            hint=f"did you mean {guess!r}?" if guess else f"it has: {', '.join(known) or 'none'}",
        )
    return found


_HINT = "it must return an iterable of {input name: array}, or of ({input name: array}, label), without a batch axis"


@contextmanager
def user_code(path: Path, hint: str = _HINT) -> Iterator[None]:
    """Runs code of ``file.py:function``: modules beside the file can be imported and leave no bytecode.

    What goes wrong in it becomes StageFailed.
    """
    file = _parsed(path)[0]
    folder, unwritten = str(file.resolve().parent), sys.dont_write_bytecode
    sys.path.insert(0, folder)
    sys.dont_write_bytecode = True
    try:
        yield
    except ModelOpsError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        raise StageFailed(f"{path} failed{_line(error, file)}: {type(error).__name__}: {text}", hint=hint) from error
    finally:
        sys.dont_write_bytecode = unwritten
        if folder in sys.path:
            sys.path.remove(folder)


def _line(error: BaseException, file: Path) -> str:
    """Where in the user's file it happened."""
    trace, found = error.__traceback__, ""
    while trace is not None:
        if Path(trace.tb_frame.f_code.co_filename).name == file.name:
            found = f" in line {trace.tb_lineno}"
        trace = trace.tb_next
    return found


def _sample(item: Any, key: str) -> Sample:
    label = None
    if isinstance(item, tuple) and len(item) == 2:
        item, label = item
    if not isinstance(item, Mapping):
        raise InputRefused(f"{key} is a {type(item).__name__}, not a feed", hint=_HINT)
    return Sample(dict(item), label, key)


def _with_imports(file: Path) -> list[Path]:
    """The file and, found by reading their import statements, the modules beside it that it needs."""
    found, pending, folder = [file], [file], file.parent
    while pending:
        try:
            tree = ast.parse(pending.pop().read_bytes())
        except (SyntaxError, ValueError, OSError):
            continue  # importing it will say what is wrong
        names: set[str] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                names.update([node.module, *(f"{node.module}.{alias.name}" for alias in node.names)])
        for name in sorted(names):
            place = folder.joinpath(*name.split("."))
            for candidate in (place.with_suffix(".py"), place / "__init__.py"):
                if candidate.is_file() and candidate not in found:
                    found.append(candidate)
                    pending.append(candidate)
    return found
