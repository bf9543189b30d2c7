"""Work done by a copy of the process: what it gives is what the call gives, and a copy that fails is no failure."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from modelops.core import machine, worker
from modelops.core.artifact import Draft
from modelops.errors import StageFailed
from modelops.stages import REGISTRY, _aside, _effort, _from_torch
from modelops.stages._aside import Aside, aside

NETS = Path(__file__).with_name("nets.py")


@pytest.fixture
def two_cpus(monkeypatch):
    monkeypatch.setattr(machine, "usable_cpus", lambda: 2)


def test_a_copy_gives_what_the_call_gives_and_leaves_this_process_alone(two_cpus):
    seen = []

    def call():
        seen.append(os.getpid())
        return {"rows": np.arange(300_000)}, os.getpid()

    with aside(call, wanted=True) as copy:
        rows, pid = copy.result(60)
    np.testing.assert_array_equal(rows["rows"], np.arange(300_000))
    assert pid != os.getpid() and seen == []


@pytest.mark.parametrize(
    "call",
    [lambda: 1 / 0, lambda: os.kill(os.getpid(), signal.SIGKILL), lambda: time.sleep(60)],
    ids=["raises", "is killed", "hangs"],
)
def test_a_copy_that_comes_to_nothing_gives_nothing(call):
    started = time.monotonic()
    assert Aside(call).result(2.0) is None
    assert time.monotonic() - started < 30


def test_a_copy_ends_with_its_block(two_cpus):
    with aside(lambda: time.sleep(600), wanted=True) as copy:
        pass
    assert copy._copy.exitcode == -signal.SIGKILL


def test_without_a_second_cpu_or_wish_there_is_no_copy(monkeypatch, two_cpus):
    with aside(os.getpid, wanted=False) as copy:
        assert copy is None
    monkeypatch.setattr(machine, "memory_bytes", lambda: 1 << 20)
    with aside(os.getpid, wanted=True) as copy:
        assert copy is None
    monkeypatch.undo()
    monkeypatch.setattr(machine, "usable_cpus", lambda: 1)
    with aside(os.getpid, wanted=True) as copy:
        assert copy is None


@pytest.fixture
def convert(tmp_path, monkeypatch, two_cpus):
    """Converts a function of nets.py as if it were expensive; says how often this process ran the source itself."""
    monkeypatch.setattr(_effort, "_AFFORDABLE", -1.0)
    observe, here = _from_torch.observe, []
    monkeypatch.setattr(_from_torch, "observe", lambda *args, **kwargs: here.append(1) or observe(*args, **kwargs))

    def converted(name, folder="out"):
        (tmp_path / folder).mkdir()
        stage = REGISTRY.load("convert").parse({"exporter": "torchscript", "rows": 32})
        report = stage.run(f"{NETS}:{name}", Draft(tmp_path / folder))
        files = {path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()}
        return report, files, len(here)

    return converted


def test_a_conversion_has_the_same_bytes_whoever_ran_the_source(convert, monkeypatch):
    report, files, here = convert("cnn")
    assert (report.verdict, here) == ("pass", 0)
    assert {entry["case"] for entry in report.details["shapes"]} > {"minimum", "minimum+1", "odd"}
    monkeypatch.setattr(machine, "usable_cpus", lambda: 1)
    again, others, here = convert("cnn", "alone")
    assert (again.checks, others, here) == (report.checks, files, 1)


def test_what_the_source_refuses_is_told_as_it_is_without_a_copy(convert):
    with pytest.raises(StageFailed, match="can't be dynamic"):
        convert("fixed")
    report, files, _ = convert("only_Logarithm", "nan")
    assert report.exit_code == 1 and "reference.npz" not in files
    assert "the source gives NaN for its own example inputs" in report.worst().message


def test_a_machine_that_gives_no_process_more_is_no_failure(monkeypatch, two_cpus):
    def refuse(call):
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(_aside, "Aside", refuse)
    with aside(os.getpid, wanted=True) as copy:
        assert copy is None


def test_a_copy_is_waited_for_while_time_is_left_to_do_without_it(monkeypatch):
    monkeypatch.setattr(worker, "granted", lambda: None)
    assert _from_torch._patience(40.0) == 430.0
    monkeypatch.setattr(worker, "granted", lambda: worker.Limits(wall_seconds=300.0))
    assert _from_torch._patience(40.0) == 70.0
    assert _from_torch._patience(100.0) == 0.0


def test_a_source_that_fails_is_run_no_second_time():
    runs = []

    def observing():
        runs.append(1)
        raise StageFailed("it draws at random", hint="seed it")

    observed = _from_torch._Observed(observing, None, 1.0, _from_torch._Work({}, []))
    for _ in range(2):
        with pytest.raises(StageFailed, match="at random"):
            observed()
    assert len(runs) == 1
