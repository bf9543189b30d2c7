"""A worker's failure is one clear error, and nothing that it started outlives it."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from modelops.core.worker import Limits, Outcome, WorkerBug, call
from modelops.errors import InputRefused, ResourceExhausted, StageFailed

JOBS = """
import ctypes, os, subprocess, sys, time

def double(x):
    from modelops.core.progress import tracked
    return {"y": sum(2 * x for _ in tracked("doubling", range(1), 1))}

def refuse():
    from modelops.errors import InputRefused
    raise InputRefused("bad file", hint="try another")

def crash():
    ctypes.string_at(0)

def bug():
    return 1 / 0

def not_json():
    return object()

def hang():
    while True:
        time.sleep(1)

def spin():
    while True:
        pass

def allowed():
    from modelops.core.worker import granted
    time.sleep(0.05)
    return [granted().wall_seconds, granted().memory_bytes]

def eat():
    kept = []
    while True:
        kept.append(bytearray(1 << 24))

def eat_in_a_grandchild():
    code = "kept = [bytearray(1 << 24) for _ in range(64)]; import time; time.sleep(60)"
    subprocess.run([sys.executable, "-c", code])

def leave_a_child(pidfile):
    child = subprocess.Popen(["sleep", "60"])
    open(pidfile, "w").write(str(child.pid))
    time.sleep(60)

def disk_full():
    raise OSError(28, "No space left on device", "/x")

def environment():
    return {key: os.environ.get(key) for key in ("ORT_LOAD_CONFIG_FROM_MODEL", "HF_HUB_OFFLINE", "PYTHONHASHSEED")}
"""


@pytest.fixture(autouse=True)
def _jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "jobs_of_a_test.py").write_text(JOBS)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]]))
    yield


def work(name: str, limits: Limits | None = None, **arguments: object) -> Outcome:
    return call(f"jobs_of_a_test:{name}", arguments, limits=limits, what="the job")


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def test_the_value_comes_back_with_progress_and_peak_memory() -> None:
    said: list[tuple[str, int, int | None]] = []
    outcome = call("jobs_of_a_test:double", {"x": 4}, what="the job", on_progress=lambda *event: said.append(event))
    assert outcome.value == {"y": 8} and ("doubling", 1, 1) in said
    assert outcome.peak_memory_bytes is not None and outcome.peak_memory_bytes > 1 << 20


def test_a_modelops_error_comes_back_as_itself() -> None:
    with pytest.raises(InputRefused, match="bad file") as caught:
        work("refuse")
    assert caught.value.hint == "try another"


def test_a_crash_is_a_failed_stage_that_names_the_signal() -> None:
    with pytest.raises(StageFailed, match="SIGSEGV"):
        work("crash")


@pytest.mark.parametrize(("name", "word"), [("bug", "ZeroDivisionError"), ("not_json", "serializable")])
def test_any_other_exception_is_a_bug_with_its_traceback(name: str, word: str) -> None:
    with pytest.raises(WorkerBug) as caught:
        work(name)
    assert word in caught.value.text


def test_time_memory_and_disk_are_exhausted_resources() -> None:
    with pytest.raises(ResourceExhausted, match="longer than 1 s"):
        work("hang", Limits(wall_seconds=0.7))
    with pytest.raises(ResourceExhausted, match="CPU time"):
        work("spin", Limits(cpu_seconds=0.5, wall_seconds=60))
    for name in ("eat", "eat_in_a_grandchild"):
        with pytest.raises(ResourceExhausted, match="memory"):
            work(name, Limits(memory_bytes=300 << 20, wall_seconds=50))
    with pytest.raises(ResourceExhausted, match="No space left"):
        work("disk_full")


def test_a_worker_knows_what_it_may_still_use() -> None:
    seconds, memory = work("allowed", Limits(wall_seconds=30.0, memory_bytes=1 << 30)).value
    assert 0 < seconds < 29.96 and memory == 1 << 30


def test_nothing_outlives_a_worker_that_was_stopped(tmp_path: Path) -> None:
    with pytest.raises(ResourceExhausted):
        work("leave_a_child", Limits(wall_seconds=2.0), pidfile=str(tmp_path / "pid"))
    assert not alive(int((tmp_path / "pid").read_text()))


def test_a_worker_dies_with_its_parent(tmp_path: Path) -> None:
    script = textwrap.dedent(
        f"""
        from modelops.core.worker import call
        call("jobs_of_a_test:leave_a_child", {{"pidfile": {str(tmp_path / "pid")!r}}}, what="the job")
        """
    )
    parent = subprocess.Popen([sys.executable, "-c", script])
    deadline = time.monotonic() + 20
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    worker = int(subprocess.run(["pgrep", "-P", str(parent.pid)], capture_output=True, text=True, check=True).stdout)
    parent.kill()
    parent.wait()
    while alive(worker):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(int((tmp_path / "pid").read_text()), 9)


def test_what_could_steer_a_runtime_is_not_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORT_LOAD_CONFIG_FROM_MODEL", "1")
    assert work("environment").value == {
        "ORT_LOAD_CONFIG_FROM_MODEL": None, "HF_HUB_OFFLINE": "1", "PYTHONHASHSEED": "0",
    }  # fmt: skip
