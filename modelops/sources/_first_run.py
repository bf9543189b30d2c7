"""A module's first run on its example inputs: what came out, and how much work that was."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FirstRun:
    """What a module gave, in whatever structure; the work that it was; and how many seconds that took.

    ``operations`` are the multiplications and additions in matrix products and convolutions, ``convolutions`` those of
    the latter alone; both are 0 where counting was not possible.
    """

    outputs: Any
    operations: float = 0.0
    convolutions: float = 0.0
    seconds: float = 0.0


def first_run(call: Callable[[], Any]) -> FirstRun:
    """Run it, and count; where it does not run while it is counted, it runs once more. Raises what it raises."""
    counter, started = Counter(), time.monotonic()
    try:
        with counter.counting():
            outputs = call()
    except MemoryError:
        raise
    except Exception as error:
        log.debug("running it without counting: %s", error)
        return FirstRun(call(), seconds=time.monotonic() - started)
    return FirstRun(outputs, counter.total, counter.convolutions, time.monotonic() - started)


class Counter:
    """Counts operations while the block lasts."""

    def __init__(self) -> None:
        self.total = self.convolutions = 0.0

    @contextmanager
    def counting(self) -> Iterator[None]:
        from torch.utils._python_dispatch import TorchDispatchMode

        counter = self

        class Mode(TorchDispatchMode):  # type: ignore[misc]
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                out = func(*args, **(kwargs or {}))
                name = func._schema.name.removeprefix("aten::")
                found = operations(name, args, out)
                counter.total += found
                counter.convolutions += found if "convolution" in name else 0.0
                return out

        with Mode():
            yield


def operations(name: str, args: Sequence[Any], out: Any) -> float:
    """The multiplications and additions of one call: of products, convolutions and attention; 0 for all else."""
    if name in ("mm", "bmm"):
        return 2.0 * _size(args[0].shape) * int(args[1].shape[-1])
    if name in ("addmm", "baddbmm"):
        return 2.0 * _size(args[1].shape) * int(args[2].shape[-1])
    if name in ("convolution", "mkldnn_convolution", "_convolution"):
        x, weight = args[0], args[1]
        transposed = len(args) > 6 and args[6] is True
        if transposed:
            return 2.0 * _size(x.shape) * _size(weight.shape[1:])
        return 2.0 * _size(out.shape) * _size(weight.shape[1:])
    if name.startswith("_scaled_dot_product"):
        query, key = args[0], args[1]
        return 4.0 * _size(query.shape) * int(key.shape[-2])
    return 0.0


def _size(shape: Sequence[int]) -> int:
    return math.prod(int(dim) for dim in shape)
