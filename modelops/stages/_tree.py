"""Nested inputs and outputs of torch modules, as flat lists of tensors with readable names, and back."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

Path = tuple[str | int, ...]


def leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every leaf of nested mappings, dataclasses, tuples and lists, with its path; None is left out.

    A leaf is a tensor, or whatever else is in there.
    """
    if value is None:
        return
    children = _children(value)
    if children is None:
        yield path, value
        return
    for key, child in children:
        yield from leaves(child, (*path, key))


def replaced(value: Any, swap: Callable[[Any], Any]) -> Any:
    """The same structure with every leaf swapped, in the order of ``leaves``."""
    if value is None:
        return None
    children = _children(value)
    if children is None:
        return swap(value)
    swapped = {key: replaced(child, swap) for key, child in children}
    if isinstance(value, Mapping):
        return swapped
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(value, **{str(key): child for key, child in swapped.items()})
    if hasattr(value, "_fields"):
        return type(value)(**{str(key): child for key, child in swapped.items()})
    return list(swapped.values()) if isinstance(value, list) else tuple(swapped.values())


def _children(value: Any) -> list[tuple[str | int, Any]] | None:
    """The named parts of a container; None for a leaf."""
    if isinstance(value, Mapping):  # a ModelOutput of transformers is a mapping, and a dataclass with odd fields
        return [(key if isinstance(key, int) else str(key), child) for key, child in value.items()]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(item.name, getattr(value, item.name)) for item in dataclasses.fields(value)]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return list(zip(value._fields, value, strict=True))
    if isinstance(value, (tuple, list)):
        return list(enumerate(value))
    return None


def input_names(paths: Sequence[Path]) -> list[str]:
    """A name for every input: the shortest end of its path that says a word and is nobody else's."""
    candidates = [_ends(path) for path in paths]
    chosen = [ends[0] for ends in candidates]
    for level in range(1, max(map(len, candidates), default=1)):
        chosen = [
            ends[min(level, len(ends) - 1)] if chosen.count(name) > 1 else name
            for name, ends in zip(chosen, candidates, strict=True)
        ]
    return unique(chosen)


def _ends(path: Path) -> list[str]:
    """The ends of a path that start with a word, shortest first: ("batch", "image", 0) gives image_0, batch_image_0."""
    starts = [number for number, part in enumerate(path) if isinstance(part, str)] or [0]
    return [_joined(path[start:]) for start in reversed(starts)]


def output_names(paths: Sequence[Path], taken: Iterable[str]) -> list[str]:
    """A name for every output, none of them an input's: its keys joined, after "output" where a number leads."""
    named = [_joined(path if path and isinstance(path[0], str) else ("output", *path)) for path in paths]
    return unique(named, taken)


def _joined(path: Path) -> str:
    return re.sub(r"\W+", "_", "_".join(str(part) for part in path)) or "value"


def unique(names: Iterable[str], taken: Iterable[str] = ()) -> list[str]:
    """The names, with a number behind those that were there before."""
    seen, found = set(taken), []
    for name in names:
        candidate, number = name, 1
        while candidate in seen:
            candidate, number = f"{name}_{number}", number + 1
        seen.add(candidate)
        found.append(candidate)
    return found
