"""The few calls of the CUDA runtime that timing needs, through its C interface: streams, events, memory.

Signatures: CUDA Runtime API reference, sections 6.1 (devices), 6.4 (streams), 6.5 (events) and 6.9 (memory).
"""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import functools
import subprocess
from collections.abc import Callable
from typing import Any

from modelops.errors import EnvironmentMissing, StageFailed

_FACTS = "name,driver_version,memory.total,clocks.sm,clocks.mem,temperature.gpu,power.draw"
# What newer drivers and older ones call why clocks are held down.
_REASONS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")
HELD_DOWN = "clocks_held_down"


class Cuda:
    """One device, with a stream of its own and a clock on that stream."""

    def __init__(self, device: int) -> None:
        self._lib = _runtime()
        if self._lib is None:
            raise EnvironmentMissing(
                "the CUDA runtime library (libcudart) is not here", hint="pip install nvidia-cuda-runtime"
            )
        self.device = device
        self._ask("cudaSetDevice", device)
        handle = ctypes.c_void_p()
        self._ask("cudaStreamCreate", ctypes.byref(handle))
        self.stream = handle.value or 0
        self._events = [self._event(), self._event()]

    @staticmethod
    def devices() -> int:
        """How many devices CUDA finds; 0 where it is not here."""
        lib, count = _runtime(), ctypes.c_int()
        if lib is None or lib.cudaGetDeviceCount(ctypes.byref(count)) != 0:
            return 0
        return count.value

    def synchronize(self) -> None:
        """Wait until all work on the stream is done."""
        self._ask("cudaStreamSynchronize", ctypes.c_void_p(self.stream))

    def timer(self) -> Callable[[], float]:
        """Record an event on the stream now; what it returns records another, waits, and gives the nanoseconds."""
        start, stop = self._events
        stream = ctypes.c_void_p(self.stream)
        self._ask("cudaEventRecord", start, stream)

        def elapsed() -> float:
            milliseconds = ctypes.c_float()
            self._ask("cudaEventRecord", stop, stream)
            self._ask("cudaEventSynchronize", stop)
            self._ask("cudaEventElapsedTime", ctypes.byref(milliseconds), start, stop)
            return milliseconds.value * 1e6

        return elapsed

    def used_bytes(self) -> int:
        """Memory of the device in use now, by every process on it."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._ask("cudaMemGetInfo", ctypes.byref(free), ctypes.byref(total))
        return total.value - free.value

    def described(self) -> dict[str, str]:
        """Name, driver, memory, clocks, temperature and why clocks are held down, as nvidia-smi gives them."""
        # nvidia-smi counts all devices, CUDA those that CUDA_VISIBLE_DEVICES leaves: the bus is the same for both.
        bus = ctypes.create_string_buffer(32)
        self._ask("cudaDeviceGetPCIBusId", bus, 32, self.device)
        return smi(bus.value.decode() or str(self.device))

    def _event(self) -> ctypes.c_void_p:
        event = ctypes.c_void_p()
        self._ask("cudaEventCreate", ctypes.byref(event))
        return event

    def _ask(self, function: str, *arguments: Any) -> None:
        status = getattr(self._lib, function)(*arguments)
        if status != 0:
            assert self._lib is not None
            self._lib.cudaGetErrorString.restype = ctypes.c_char_p
            text = self._lib.cudaGetErrorString(status).decode()
            raise StageFailed(f"{function} failed: {text}", hint="look at nvidia-smi")


def smi(device: str) -> dict[str, str]:
    """What nvidia-smi says of a device, by its bus, UUID or number; empty where it is not here."""
    for reasons in _REASONS:
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            answer = subprocess.run(
                ["nvidia-smi", f"--id={device}", f"--query-gpu={_FACTS},{reasons}", "--format=csv,noheader"],
                capture_output=True,
                text=True,
                timeout=10,
                check=True,
            )
            values = [value.strip() for value in answer.stdout.strip().splitlines()[0].split(",")]
            return dict(zip([*_FACTS.split(","), HELD_DOWN], values, strict=False))
    return {}


@functools.cache
def _runtime() -> ctypes.CDLL | None:
    """libcudart: the loader's, or the one in NVIDIA's pip packages."""
    for name in _candidates():
        with contextlib.suppress(OSError):
            return ctypes.CDLL(name)
    return None


def _candidates() -> list[str]:
    import importlib.util
    from pathlib import Path

    found = [ctypes.util.find_library("cudart") or "libcudart.so"]
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations or () if spec else ():
        found += [str(path) for path in sorted(Path(folder).glob("*/lib/libcudart.so*"))]
    return found
