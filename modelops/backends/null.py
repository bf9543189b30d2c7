"""A backend that computes nothing and takes a known time, to test what measures."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modelops.backends import Backend, Call, Module
from modelops.backends._sessions import OpenSession, check_names, onnx_path
from modelops.core.component import option
from modelops.core.tensors import Signature
from modelops.errors import StageFailed


class Null(Backend):
    """Zeros of the right shape after a known time: for tests of what measures."""

    computes = False
    for_tests = True

    microseconds: float = option(default=100.0, help="Time that one inference takes, busily.", min=0)
    fails_at: int = option(default=0, help="The inference that fails, counted from 1; 0 is none.", min=0)
    nan_at: int = option(default=0, help="The inference from which on outputs are NaN; 0 is none.", min=0)

    def missing(self) -> str:
        return ""

    def open(self, model: Path | Module) -> OpenSession:
        from modelops.graphs.describe import signature

        return _Session(signature(onnx_path(self, model)), self)


class _Session(OpenSession):
    def __init__(self, signature: Signature, backend: Null) -> None:
        super().__init__(signature)
        self._backend = backend
        self._count = 0

    def prepare(self, feed: Mapping[str, Any]) -> Call:
        import numpy as np

        check_names(self.signature, feed)
        sizes = {
            dim: size
            for spec in self.signature.inputs
            for dim, size in zip(spec.shape, feed[spec.name].shape, strict=True)
            if isinstance(dim, str)
        }
        zeros = {
            spec.name: np.zeros(
                [dim if isinstance(dim, int) else sizes.get(dim, 1) for dim in spec.shape],
                spec.dtype if spec.dtype != "bfloat16" else "float32",
            )
            for spec in self.signature.outputs
        }
        return Call(self._timed(zeros), dict)

    def _timed(self, zeros: dict[str, Any]) -> Any:
        import numpy as np

        clock = time.perf_counter_ns
        span = round(self._backend.microseconds * 1000)
        backend = self._backend

        def busy() -> dict[str, Any]:
            end = clock() + span
            while clock() < end:
                pass
            return zeros

        def faulty() -> dict[str, Any]:
            self._count += 1
            if self._count == backend.fails_at:
                raise StageFailed(f"inference {self._count} failed, as it was told to")
            outputs = busy()
            if backend.nan_at and self._count >= backend.nan_at:
                return {
                    name: np.full_like(array, np.nan) if array.dtype.kind == "f" else array
                    for name, array in outputs.items()
                }
            return outputs

        return faulty if backend.fails_at or backend.nan_at else busy

    def facts(self) -> dict[str, Any]:
        return {"threads": 1}
