"""Work done aside: by a copy of this process, which shares its memory, while this one goes on with something else."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Generic, TypeVar

from modelops.core import machine, worker
from modelops.core.progress import listen

log = logging.getLogger(__name__)

T = TypeVar("T")


class Aside(Generic[T]):
    """A call that a copy of this process makes.

    The copy sees everything as it was when it was made; only what the call returns comes back, so that it must not
    matter where the call runs.
    """

    def __init__(self, call: Callable[[], T]) -> None:
        context = multiprocessing.get_context("fork")
        self._reader, writer = context.Pipe(duplex=False)
        self._copy = context.Process(target=_answer, args=(call, writer), daemon=True)
        self._copy.start()
        writer.close()

    def result(self, seconds: float) -> T | None:
        """What the call returned, waited for so long at most; None where the copy failed or came to nothing."""
        try:
            if not self._reader.poll(seconds):
                log.debug("a copy of the process is not done after %.0f s", seconds)
                return None
            found: T = self._reader.recv()
            return found
        except (EOFError, OSError) as error:
            log.debug("a copy of the process failed: %s", error)
            return None
        finally:
            self.end()

    def end(self) -> None:
        """End the copy, whatever it is doing."""
        self._copy.kill()
        self._copy.join()
        self._reader.close()


@contextlib.contextmanager
def aside(call: Callable[[], T], *, wanted: bool) -> Iterator[Aside[T] | None]:
    """The call made aside while the block lasts; None unless that is wanted, and there are the means for it.

    It takes a second CPU, and memory for two: pages that are shared count twice where a limit is watched.
    """
    if not (wanted and sys.platform == "linux" and machine.usable_cpus() > 1 and _roomy()):
        yield None
        return
    try:
        made = Aside(call)
    except OSError as error:  # no process more, or no memory for one
        log.debug("no copy of the process could be made: %s", error)
        yield None
        return
    try:
        yield made
    finally:
        made.end()


def _roomy() -> bool:
    granted = worker.granted()
    limit = granted.memory_bytes if granted is not None else None
    most = machine.memory_bytes() // 2 if limit is None else limit
    return 3 * worker.resident_bytes(os.getpid()) <= most


def _answer(call: Callable[[], T], writer: Connection) -> None:
    """The copy's side: where the call fails the pipe just closes, and whoever waits makes the call himself."""
    worker.die_with_parent()
    listen(None)
    writer.send(call())
