"""The calls of the CUDA runtime, against a library that only notes them: no device is needed."""

from __future__ import annotations

from typing import Any

import pytest

from modelops.backends import _cuda
from modelops.errors import EnvironmentMissing, StageFailed


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
