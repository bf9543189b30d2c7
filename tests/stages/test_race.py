"""Races: verdicts on models of known speed, and what happens when something goes wrong in the middle."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modelops.backends import REGISTRY
from modelops.core.worker import tree
from modelops.errors import Inconclusive, ModelOpsError, StageFailed
from modelops.measures.verdicts import Rules
from modelops.stages import _speed
from modelops.stages._launch import write_arrays
from modelops.stages._launches import Plan, measuring
from modelops.stages._race import Contender, measure, race, standings

FEED = {"x": np.ones((1, 8), np.float32)}
# Nothing waits for steady times here: other tests may keep the CPUs busy.
QUICK = Plan(
    rounds=7, most_rounds=7, block_seconds=0.002, warm_seconds=0.01, warm_most_seconds=0.0, patience_seconds=2.0
)
THREE = Rules(looks=(3, 5))


@pytest.fixture(autouse=True)
def nothing_left_running() -> Iterator[None]:
    yield
    assert tree(os.getpid()) == [os.getpid()]


def null(name: str, model: Path, **options: Any) -> Contender:
    return Contender(name, REGISTRY.load("null").parse(options), model)


def test_a_much_slower_model_fails_and_passes_when_swapped(perceptron: Path) -> None:
    fast, slow = null("fast", perceptron, microseconds=100), null("slow", perceptron, microseconds=2000)

    found = race(slow, fast, FEED, rules=THREE, plan=QUICK)

    assert found.verdict.verdict == "fail"
    assert found.verdict.ratio is not None and 5 < found.verdict.ratio < 40
    saved = [json.loads(json.dumps(record)) for record in found.records]
    assert _speed.judge(saved, "slow", "fast", THREE) == found.verdict
    swapped = _speed.judge(saved, "fast", "slow", THREE)
    assert swapped is not None and swapped.verdict == "pass"
    assert swapped.ratio == pytest.approx(1 / found.verdict.ratio)


def test_blocks_of_a_round_come_in_random_order_unless_told_otherwise(perceptron: Path) -> None:
    def firsts(plan: Plan) -> set[str]:
        with measuring([null("a", perceptron), null("b", perceptron)], FEED, plan=plan) as measurement:
            measurement.launch(5.0)
        return {r["side"] for r in measurement.records if r["kind"] == "block" and r["position"] == 0}

    assert firsts(replace(QUICK, rounds=30, most_rounds=30)) == {"a", "b"}
    assert firsts(replace(QUICK, ordered=True)) == {"a"}


def test_extra_inferences_are_timed_and_not_counted(perceptron: Path) -> None:
    plan = replace(QUICK, multiple=20, most_rounds=15, rounds=15)
    slow = Contender("slow", REGISTRY.load("null").parse({"microseconds": 100}), perceptron, inflate=3.0)

    records = measure([slow, null("even", perceptron)], FEED, budget_seconds=9, launches=1, plan=plan)

    [launch] = _speed.launches(records, "slow", "even")
    ratio = launch.log_ratio("wall")
    assert ratio is not None and np.exp(ratio) > 2
    assert {block["n"] % 20 for block in records if block["kind"] == "block"} == {0}


def test_standings_hold_the_speed_of_every_model_beside_the_first(perceptron: Path) -> None:
    models = [null(str(us), perceptron, microseconds=us) for us in (8000, 2000, 200)]

    found = standings(models, FEED, most_launches=2, plan=QUICK)

    first, middle, last = (standing.speedup for standing in found.standings)
    assert 1 == first < middle < last
    assert found.of("2000").interval is not None
    assert found.of("8000").latency_ms > 8


def test_the_time_around_a_20_microsecond_model_is_small(perceptron: Path) -> None:
    plan = replace(QUICK, block_seconds=0.01, rounds=20, most_rounds=20)

    records = measure([null("a", perceptron, microseconds=20)], FEED, budget_seconds=9, launches=1, plan=plan)

    # From the end of one inference to the end of the next is all that a block's time is made of. A quiet machine shows
    # less than 3 %; a busy one must not fail the test, so the quickest tenth is held to three times that.
    spans = sorted(span for block in _speed.blocks(records, "a") for span in block["latencies_ns"])
    assert spans[len(spans) // 10] < 20_000 * 1.09


@pytest.mark.parametrize(
    ("options", "message"),
    [({"fails_at": 1000, "microseconds": 10}, "inference 1000 failed"), ({"nan_at": 1000, "microseconds": 10}, "NaN")],
)
def test_a_model_that_breaks_while_it_is_timed_is_an_error(
    perceptron: Path, options: dict[str, Any], message: str
) -> None:
    plan = replace(QUICK, warm_seconds=0.0, rounds=60, most_rounds=60)

    with pytest.raises(StageFailed, match=message):
        race(null("broken", perceptron, **options), null("b", perceptron, microseconds=10), FEED, plan=plan)


def test_outputs_other_than_the_right_ones_are_an_error(perceptron: Path, tmp_path: Path) -> None:
    backend = REGISTRY.load("onnxruntime-cpu").parse({"threads": 1})
    write_arrays(tmp_path / "expected.npz", {"y": np.ones((1, 4), np.float32)})

    with pytest.raises(StageFailed, match="y changed"):
        measure(
            [Contender("a", backend, perceptron, expected=tmp_path / "expected.npz")],
            FEED,
            budget_seconds=5,
            launches=1,
            plan=QUICK,
        )


def _disturbed(perceptron: Path, disturb: Callable[[int], None], microseconds: float = 30_000) -> ModelOpsError:
    """The error of a race whose processes are disturbed from the first block on, every 5 ms."""
    over = threading.Event()

    def keep_disturbing() -> None:
        while not over.wait(0.005):
            for pid in tree(os.getpid())[1:]:
                with contextlib.suppress(ProcessLookupError):
                    disturb(pid)

    thread = threading.Thread(target=keep_disturbing)
    contenders = [null(name, perceptron, microseconds=microseconds) for name in "ab"]
    with measuring(contenders, FEED, plan=replace(QUICK, patience_seconds=0.3)) as measurement:
        measurement.on_block = lambda: None if thread.ident else thread.start()
        try:
            with pytest.raises(ModelOpsError) as caught:
                measurement.launch(5.0)
        finally:
            over.set()
            thread.join()
    assert measurement.records == []
    return caught.value


def test_a_process_killed_in_mid_block_is_an_error(perceptron: Path) -> None:
    error = _disturbed(perceptron, lambda pid: os.kill(pid, signal.SIGKILL))

    assert "killed" in error.message


def test_a_process_stopped_in_mid_block_is_an_error(perceptron: Path) -> None:
    error = _disturbed(perceptron, lambda pid: os.kill(pid, signal.SIGSTOP))

    assert isinstance(error, StageFailed) and "gave no answer" in error.message


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs")
def test_changing_affinity_leaves_no_verdict(perceptron: Path) -> None:
    one = {min(os.sched_getaffinity(0))}

    error = _disturbed(perceptron, lambda pid: os.sched_setaffinity(pid, one), microseconds=1000)

    assert isinstance(error, Inconclusive) and "CPUs" in error.message


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs")
def test_threads_follow_the_cpus_that_may_be_used(perceptron: Path) -> None:
    allowed = os.sched_getaffinity(0)
    model = Contender("a", REGISTRY.load("onnxruntime-cpu").parse({}), perceptron)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        records = measure([model], FEED, budget_seconds=5, launches=1, plan=QUICK)
    finally:
        os.sched_setaffinity(0, allowed)

    [header] = _speed.headers(records)
    assert header["sides"]["a"]["facts"]["threads"] == 1


def test_processes_die_with_the_one_that_started_them(perceptron: Path) -> None:
    script = textwrap.dedent(f"""
        import numpy as np
        from modelops.backends import REGISTRY
        from modelops.stages._race import Contender, measure
        model = Contender("a", REGISTRY.load("null").parse({{"microseconds": 50_000}}), {str(perceptron)!r})
        measure([model], {{"x": np.ones((1, 8), np.float32)}}, budget_seconds=60, launches=20)
    """)
    parent = subprocess.Popen([sys.executable, "-c", script])
    end = time.monotonic() + 20
    while len(children := tree(parent.pid)[1:]) == 0 and time.monotonic() < end:
        time.sleep(0.05)
    assert children

    parent.kill()
    parent.wait()

    while any(Path(f"/proc/{pid}").exists() and "Z" not in _state(pid) for pid in children):
        assert time.monotonic() < end
        time.sleep(0.05)


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"
