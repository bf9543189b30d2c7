"""Progress: what a long stage says while it works, for whoever listens; by default nobody does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import TypeVar

T = TypeVar("T")
Listener = Callable[[str, int, int | None], None]

_listener: ContextVar[Listener | None] = ContextVar("modelops_progress", default=None)


def listen(listener: Listener | None) -> None:
    """Send progress (what, done, total or None) to this function from now on."""
    _listener.set(listener)


def progress(what: str, done: int = 0, total: int | None = None) -> None:
    """Say how far the work on ``what`` is."""
    listener = _listener.get()
    if listener is not None:
        listener(what, done, total)


def tracked(what: str, items: Iterable[T], total: int | None = None) -> Iterator[T]:
    """The items, with progress said after each."""
    progress(what, 0, total)
    for count, item in enumerate(items, 1):
        yield item
        progress(what, count, total)
