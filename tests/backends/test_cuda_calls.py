"""The calls of the CUDA runtime, against a library that only notes them: no device is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from modelops.backends import _cuda
from modelops.errors import EnvironmentMissing, StageFailed
from modelops.stages._evidence import _held_down


class Library:
    """Answers like libcudart on a machine with one device; every call is noted."""

    def __init__(self, failing: str = "") -> None:
        self.calls: list[str] = []
        self.failing = failing

    def __getattr__(self, name: str) -> Any:
        def function(*arguments: Any) -> Any:
            self.calls.append(name)
            if name == "cudaGetErrorString":
                return b"out of order"
            if name == self.failing:
                return 4
            values = {
                "cudaGetDeviceCount": [1],
                "cudaStreamCreate": [77],
                "cudaEventCreate": [5],
                "cudaEventElapsedTime": [2.5],
                "cudaMemGetInfo": [30, 100],
            }.get(name, [])
            pointers = [argument._obj for argument in arguments if hasattr(argument, "_obj")]
            for pointer, value in zip(pointers, values, strict=True):
                pointer.value = value
            return 0

        if name != "cudaGetErrorString":
            return function
        function.restype = None  # type: ignore[attr-defined]
        self.__dict__[name] = function
        return function


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    found = Library()
    monkeypatch.setattr(_cuda, "_runtime", lambda: found)
    return found


def test_the_timer_gives_the_nanoseconds_between_two_events(library: Library) -> None:
    cuda = _cuda.Cuda(0)
    library.calls.clear()

    stop = cuda.timer()
    assert stop() == 2.5e6

    assert library.calls == ["cudaEventRecord", "cudaEventRecord", "cudaEventSynchronize", "cudaEventElapsedTime"]


def test_used_memory_is_what_is_not_free(library: Library) -> None:
    assert _cuda.Cuda(0).used_bytes() == 70
    assert _cuda.Cuda(0).stream == 77 and _cuda.Cuda.devices() == 1


def test_a_call_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library("cudaStreamSynchronize")
    monkeypatch.setattr(_cuda, "_runtime", lambda: library)

    with pytest.raises(StageFailed, match="cudaStreamSynchronize failed: out of order"):
        _cuda.Cuda(0).synchronize()


def test_without_the_runtime_there_are_no_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cuda, "_runtime", lambda: None)

    assert _cuda.Cuda.devices() == 0
    with pytest.raises(EnvironmentMissing, match="libcudart"):
        _cuda.Cuda(0)


def smi_on_path(folder: Path, monkeypatch: pytest.MonkeyPatch, *, refuses: str = "") -> None:
    """An nvidia-smi that answers for any device, and may refuse a field as older drivers do."""
    program = folder / "nvidia-smi"
    refusal = f'case "$*" in *{refuses}*) exit 2;; esac\n' if refuses else ""
    program.write_text(
        f'#!/bin/sh\n{refusal}echo "GPU, 555.1, 80 GiB, 1980 MHz, 2619 MHz, 40, 90 W, 0x0000000000000024"\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


@pytest.mark.parametrize("refuses", ["", "clocks_event_reasons"])
def test_drivers_old_and_new_tell_why_clocks_are_held_down(
    refuses: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smi_on_path(tmp_path, monkeypatch, refuses=refuses)

    found = _cuda.smi("0")

    assert found["clocks.sm"] == "1980 MHz" and found[_cuda.HELD_DOWN].endswith("24")
    launch = {"sides": {"a": {"device_after": found}}}
    assert _held_down([launch, launch], "a") == "power cap, heat"
    assert _held_down([{"sides": {"a": {"device_after": "cpu"}}}, {"sides": {"a": {}}}], "a") == ""


def test_nvidia_smi_is_asked_for_the_device_by_its_bus(
    library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(_cuda, "smi", lambda device: asked.append(device) or {})

    _cuda.Cuda(0).described()

    assert "cudaDeviceGetPCIBusId" in library.calls and asked == ["0"]  # this library leaves the bus empty


def test_without_nvidia_smi_nothing_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    assert _cuda.smi("0") == {}
