"""Work on one item after another, with the next ones under way meanwhile."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from modelops.core import machine

Item = TypeVar("Item")
Made = TypeVar("Made")


def ahead(run: Callable[[Item], Made], items: Iterable[Item], most: int = 4) -> Iterator[Made]:
    """What ``run`` makes of every item, in order: one item on each CPU, ``most`` at a time, and one result waiting.

    It is for work that leaves Python's lock, and that keeps to one thread itself: then results are the same on any
    number of CPUs. Items are taken, and errors raised, in the caller's thread.
    """
    workers = min(machine.usable_cpus(), most)
    with ThreadPoolExecutor(workers) as pool:
        pending: deque[Future[Made]] = deque()
        try:
            for item in items:
                pending.append(pool.submit(run, item))
                if len(pending) > workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
