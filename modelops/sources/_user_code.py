"""User code: found without running it, run with its failures told in its own terms, and recorded."""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.machinery
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from modelops.errors import ModelOpsError, ResourceExhausted, StageFailed, UsageError, missing_path, unknown_name

_OWN_PACKAGE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Place:
    """A name in a Python file: ``module`` is how it is imported, ``root`` the folder it is imported from."""

    path: Path
    root: Path
    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.path.name}:{self.name}"


def locate(spec: str) -> Place:
    """Where ``file.py:name`` or ``package.module:name`` points, without running anything; UsageError when nowhere."""
    left, _, name = spec.rpartition(":")
    if left.endswith(".py"):
        path = Path(left)
        if not path.is_file():
            raise missing_path("file", path)
        return Place(path.absolute(), path.absolute().parent, path.stem, name)
    found = _find(left)
    if found is None:
        raise UsageError(
            f"no module {left!r} is found here or among the installed packages",
            hint="run the command from the folder that holds the package, or give file.py:function",
        )
    root = found.parents[left.count(".") + (found.name == "__init__.py")]
    return Place(found, root, left, name)


def _find(module: str) -> Path | None:
    """The file of a module, found without importing its parents, which would run them."""
    search: list[str] | None = [str(Path.cwd()), *sys.path]
    spec: importlib.machinery.ModuleSpec | None = None
    for number, _ in enumerate(parts := module.split(".")):
        spec = importlib.machinery.PathFinder.find_spec(".".join(parts[: number + 1]), search)
        if spec is None:
            return None
        search = list(spec.submodule_search_locations) if spec.submodule_search_locations is not None else None
        if search is None and number + 1 < len(parts):
            return None
    return Path(spec.origin).absolute() if spec is not None and spec.origin else None


def files_of(place: Place) -> dict[str, Path]:
    """The file, and those that it and they import from the same folder, by path below that folder.

    Told from the text: what is imported in other ways is found only when the code has run.
    """
    found: dict[str, Path] = {}
    pending = [place.path]
    while pending:
        path = pending.pop()
        key = path.relative_to(place.root).as_posix()
        if key in found or _foreign(path):
            continue
        found[key] = path
        pending += [near for name in _imports(path, place.root) for near in _near(name, place.root)]
    found.setdefault(place.path.relative_to(place.root).as_posix(), place.path)
    return dict(sorted(found.items()))


def _imports(path: Path, root: Path) -> Iterator[str]:
    """The modules that a file imports, by absolute name; none where the file can't be parsed."""
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return
    package = path.relative_to(root).parent.parts
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            head = ".".join((*base, *(node.module or "").split("."))).strip(".")
            yield from (f"{head}.{alias.name}".strip(".") for alias in node.names)


def _near(module: str, root: Path) -> Iterator[Path]:
    """The files below the root that importing this name runs: every package on the way, and the module."""
    parts = [part for part in module.split(".") if part]
    for number in range(1, len(parts) + 1):
        base = root.joinpath(*parts[:number])
        yield from (path for path in (base / "__init__.py", base.with_name(f"{base.name}.py")) if path.is_file())


def _foreign(path: Path) -> bool:
    """Whether a file belongs to an installed package, to Python or to modelops."""
    roots = (Path(sys.prefix), Path(sys.base_prefix))
    installed = "site-packages" in path.parts or any(path.is_relative_to(root) for root in roots)
    return installed or path.resolve().is_relative_to(_OWN_PACKAGE)


def resolve(place: Place) -> Any:
    """The object that the place names, its module imported; StageFailed tells in which line that failed."""
    sys.dont_write_bytecode = True
    if str(place.root) not in sys.path:
        sys.path.insert(0, str(place.root))
    with told(place, "importing"):
        module = _import(place)
    if not hasattr(module, place.name):
        public = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise unknown_name(f"function in {place.path.name}", place.name, public)
    return getattr(module, place.name)


def _import(place: Place) -> ModuleType:
    known = sys.modules.get(place.module)
    if known is not None and getattr(known, "__file__", None) != str(place.path):
        # A file called like a module that is loaded already, such as types.py.
        name = f"_modelops_source_{place.path.stem}"
    elif known is None and not place.path.name.startswith("__init__") and "." not in place.module:
        name = place.module
    else:
        return importlib.import_module(place.module)
    spec = importlib.util.spec_from_file_location(name, place.path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{place.path} can't be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def call(place: Place, function: Callable[[], Any]) -> Any:
    """What the user's function returns; StageFailed tells in which of its lines it failed."""
    if not callable(function):
        raise UsageError(f"{place} is {type(function).__name__}, not a function", hint="name a function")
    with told(place, "running"):
        return function()


@contextmanager
def told(place: Place | None, doing: str, *, hint: str = "") -> Iterator[None]:
    """Turn whatever the user's code raises inside the block into StageFailed, with the last line of that code.

    ``hint`` is what to do about it; without one, that line is to be looked at.
    """
    what = f"{doing} {place}" if place is not None else doing
    try:
        yield
    except ModelOpsError:
        raise
    except MemoryError as error:
        raise ResourceExhausted(f"{what} ran out of memory", hint="free some memory") from error
    except (Exception, SystemExit) as error:
        hint = hint or f"look at {where(error, place)}"
        raise StageFailed(f"{what} failed: {summary(error, place)}", hint=hint) from error


def summary(error: BaseException, place: Place | None = None) -> str:
    """Type and text of an exception, and the line that raised it, in the user's code where there is one."""
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {text} ({where(error, place)})" if text else f"{type(error).__name__}"


def where(error: BaseException, place: Place | None) -> str:
    """The last line of the user's code in the error's traceback, else its last line."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{Path(error.filename).name}, line {error.lineno}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<")]
    own = [frame for frame in frames if not _foreign(Path(frame.filename))]
    if place is not None:
        own = [frame for frame in own if Path(frame.filename).is_relative_to(place.root)] or own
    chosen = (own or frames)[-1:]
    return f"{Path(chosen[0].filename).name}, line {chosen[0].lineno}, in {chosen[0].name}" if chosen else "the code"


def executed(place: Place) -> tuple[dict[str, str], ...]:
    """Path and sha256 of every file of the user's that was imported so far, the source first of all included."""
    paths = {place.path}
    for module in list(sys.modules.values()):
        name = getattr(module, "__file__", None)
        if isinstance(name, str) and name.endswith(".py"):
            path = Path(name).absolute()
            if path.is_relative_to(place.root) and path.is_file() and not _foreign(path):
                paths.add(path)
    return tuple({"path": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()} for path in sorted(paths))
