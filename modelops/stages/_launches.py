"""Launches: fresh processes for every contender, timed in pairs close in time and in random order.

A launch is the unit that verdicts count: what a process draws at its start (memory layout, placement of threads) moves
all of its timings together, so blocks of one launch are never pooled with those of another.
"""

from __future__ import annotations

import contextlib
import math
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modelops.errors import Inconclusive, StageFailed
from modelops.stages._launch import write_arrays
from modelops.stages._runner import Contender, Runner

Record = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """How a launch is run: ``rounds`` of one block for each contender; more, up to ``most_rounds``, where starting the
    processes took longer than that; fewer where the time does not allow them.

    ``concurrency`` lists how many inferences at once are timed too, for about ``many_seconds`` each. ``multiple`` makes
    block sizes multiples of it, ``ordered`` forbids the random order: both serve tests of the measurement itself.
    """

    rounds: int = 20
    most_rounds: int = 60
    fewest_rounds: int = 5
    block_seconds: float = 0.010
    warm_seconds: float = 0.2
    warm_most_seconds: float = 2.0
    patience_seconds: float = 10.0
    concurrency: tuple[int, ...] = ()
    many_seconds: float = 0.2
    multiple: int = 1
    ordered: bool = False


@dataclass
class Measurement:
    """Contenders, their input, and every raw record so far; ``launch()`` adds to it.

    Records are of three kinds. ``launch``: number, order of starting, inferences per block, and what each side reported
    of loading, warm-up and memory. ``block``: launch, round, side, position in its round, n, wall, CPU and device time,
    single latencies. ``many``: launch, side, how many threads made n inferences each at once, and the wall time.
    """

    contenders: Sequence[Contender]
    feed: Path
    scratch: Path
    rng: random.Random
    plan: Plan = field(default_factory=Plan)
    records: list[Record] = field(default_factory=list)
    launches: int = 0
    longest_seconds: float = 0.0
    n: dict[str, int] = field(default_factory=dict)
    rounds: int = 0
    on_block: Callable[[], None] = lambda: None

    def launch(self, share_seconds: float) -> None:
        """One more launch, of about this many seconds where the models allow it.

        StageFailed when a model fails, or its outputs change or turn NaN; Inconclusive when the processes' CPUs change.
        """
        started = time.monotonic()
        with contextlib.ExitStack() as stack:
            header: Record = {"kind": "launch", "launch": self.launches, "order": [], "sides": {}}
            runners: dict[str, Runner] = {}
            allowed = _cpus()
            for contender in self._shuffled(self.contenders):
                runners[contender.name] = stack.enter_context(Runner(contender, self.feed, self.scratch, self.rng))
                runners[contender.name].tell("ready")
                header["order"].append(contender.name)
            for runner in runners.values():
                runner.answer("ready", patience=runner.contender.load_seconds())
                runner.pause()
            for name, runner in runners.items():
                runner.resume()
                header["sides"][name] = self._readied(runner)
                runner.pause()
            ready = time.monotonic() - started
            sides = header["sides"]
            if not self.n:
                self._choose(sides, ready, share_seconds - ready)
            header["n"] = dict(self.n)
            blocks = list(self._rounds(runners, sides))
            many = list(self._many(runners, sides))
            for name, runner in runners.items():
                runner.resume()
                _refuse_changed(name, runner.ask("check", patience=self._patience(sides[name], 1))["outputs"])
                sides[name].update(runner.ask("end", patience=self.plan.patience_seconds))
                runner.pause()
            _refuse_moved(allowed, blocks)
        self.records += [header, *blocks, *many]
        self.launches += 1
        self.longest_seconds = max(self.longest_seconds, time.monotonic() - started)

    def _shuffled(self, contenders: Sequence[Any]) -> list[Any]:
        order = list(contenders)
        if not self.plan.ordered:
            self.rng.shuffle(order)
        return order

    def _readied(self, runner: Runner) -> Record:
        found = runner.ask("open", patience=runner.contender.load_seconds())
        _refuse_changed(runner.contender.name, found.pop("changed"))
        warm = runner.ask(
            "warm",
            patience=self.plan.patience_seconds + 4 * self.plan.warm_most_seconds + 6 * found["first_seconds"],
            least_seconds=self.plan.warm_seconds,
            most_seconds=self.plan.warm_most_seconds,
            block_seconds=self.plan.block_seconds,
        )
        return {**found, "warm": warm}

    def _choose(self, sides: Mapping[str, Record], ready_seconds: float, left_seconds: float) -> None:
        """The inferences per block, the same for all sides with the same inputs, and the rounds that fit."""
        feeds = {contender.name: contender.feed for contender in self.contenders}
        for name, feed in feeds.items():
            n = max(sides[other]["warm"]["n"] for other in sides if feeds[other] == feed)
            self.n[name] = -(-n // self.plan.multiple) * self.plan.multiple
        one_round = sum(side["warm"]["one_seconds"] * 1.125 * self.n[name] for name, side in sides.items())
        wanted = max(self.plan.rounds, min(self.plan.most_rounds, int(ready_seconds / one_round)))
        # Where starting alone takes longer than the time there is, a half of that again is well spent.
        fitting = int(max(left_seconds, 0.5 * ready_seconds) / one_round)
        self.rounds = max(self.plan.fewest_rounds, min(wanted, fitting))

    def _rounds(self, runners: Mapping[str, Runner], sides: Mapping[str, Record]) -> Iterator[Record]:
        for number in range(self.rounds):
            for position, name in enumerate(self._shuffled(list(runners))):
                runner = runners[name]
                runner.resume()
                block = runner.ask("time", n=self.n[name], patience=self._patience(sides[name], self.n[name]))
                runner.pause()
                _refuse_changed(name, block.pop("outputs"))
                self.on_block()
                yield {
                    "kind": "block",
                    "launch": self.launches,
                    "round": number,
                    "side": name,
                    "position": position,
                    **block,
                }

    def _many(self, runners: Mapping[str, Runner], sides: Mapping[str, Record]) -> Iterator[Record]:
        for threads in self.plan.concurrency:
            for name in self._shuffled(list(runners)):
                runner, one = runners[name], float(sides[name]["warm"]["one_seconds"])
                n = max(2, math.ceil(self.plan.many_seconds / (threads * max(one, 1e-9))))
                runner.resume()
                found = runner.ask("many", n=n, threads=threads, patience=self._patience(sides[name], n * threads))
                runner.pause()
                yield {"kind": "many", "launch": self.launches, "side": name, **found}

    def _patience(self, side: Mapping[str, Any], n: int) -> float:
        return self.plan.patience_seconds + 20 * n * float(side["warm"]["one_seconds"])


@contextlib.contextmanager
def measuring(
    contenders: Sequence[Contender], feed: Mapping[str, Any], *, seed: int = 0, plan: Plan | None = None
) -> Iterator[Measurement]:
    """A measurement of these contenders on this feed (name → array), with a scratch directory that goes away."""
    names = [contender.name for contender in contenders]
    if len(set(names)) != len(names):
        raise ValueError(f"contenders need names of their own, not {names}")
    with tempfile.TemporaryDirectory(prefix="modelops-bench-") as folder:
        path = Path(folder) / "feed.npz"
        write_arrays(path, feed)
        yield Measurement(contenders, path, Path(folder), random.Random(seed), plan or Plan())


def _refuse_changed(name: str, changed: str) -> None:
    if changed:
        raise StageFailed(
            f"{name}: output {changed} while it was timed", hint="a model that gives no steady answer can't be compared"
        )


def _refuse_moved(allowed: list[int], blocks: Sequence[Record]) -> None:
    """Inconclusive when some block did not run on the CPUs that this process started with, or lost them meanwhile."""
    seen = {tuple(block.pop("cpus")) for block in blocks} | {tuple(_cpus())}
    if seen != {tuple(allowed)}:
        raise Inconclusive(
            f"the CPUs that the processes may use changed during the measurement: {sorted(seen | {tuple(allowed)})}",
            hint="leave the affinity alone, and run it again",
        )


def _cpus() -> list[int]:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
