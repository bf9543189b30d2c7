"""What of the machine may be used: control groups as the kernel shows them, in files of the test's own."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from modelops.backends import REGISTRY
from modelops.core import machine

Groups = Callable[..., None]


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Groups:
    """Makes this process a member of control groups with these files."""

    def make(membership: str, files: dict[str, str]) -> None:
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        (tmp_path / "own").write_text(membership)
        monkeypatch.setattr(machine, "_CGROUPS", tmp_path)
        monkeypatch.setattr(machine, "_OWN_CGROUPS", tmp_path / "own")

    return make


@pytest.mark.parametrize(
    ("membership", "files", "quota"),
    [
        ("0::/", {"cpu.max": "max 100000\n"}, None),
        ("0::/", {"cpu.max": "250000 100000\n"}, 2.5),
        ("0::/job", {"job/cpu.max": "400000 100000\n", "cpu.max": "150000 100000\n"}, 1.5),
        ("0::/job", {"job/cpu.max": "max 100000\n", "cpu.max": "150000 100000\n"}, 1.5),
        ("0::/", {"cpu.max": "nonsense"}, None),
        ("0::/", {}, None),
        ("", {"cpu.max": "200000 100000\n"}, 2.0),
        ("4:cpu,cpuacct:/job\n0::/", {"cpu/job/cpu.cfs_quota_us": "50000", "cpu/job/cpu.cfs_period_us": "100000"}, 0.5),
        ("4:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
    ],
)
def test_the_tightest_quota_of_all_groups_counts(
    groups: Groups, membership: str, files: dict[str, str], quota: float | None
) -> None:
    groups(membership, files)

    assert machine.cpu_quota() == quota


@pytest.mark.parametrize(("quota", "threads"), [("100000 100000", 1), ("50000 100000", 1), ("max 100000", None)])
def test_the_threads_of_an_inference_follow_the_quota(
    groups: Groups, perceptron: Path, quota: str, threads: int | None
) -> None:
    groups("0::/", {"cpu.max": quota})

    with REGISTRY.load("onnxruntime-cpu").parse({}).open(perceptron) as session:
        assert session.facts()["threads"] == (threads or len(os.sched_getaffinity(0)))


def test_a_quota_above_the_affinity_does_not_raise_the_threads(groups: Groups) -> None:
    groups("0::/", {"cpu.max": "6400000 100000"})

    assert machine.usable_cpus() == len(os.sched_getaffinity(0))
