"""onnxruntime on the CPU: the runtime that every model here is checked against."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from modelops.backends import Backend, Call, Module, NodeTime, require_usable
from modelops.backends._node_times import node_times
from modelops.backends._sessions import (
    OpenSession,
    check_names,
    onnx_path,
    onnxruntime_options,
    onnxruntime_session,
    onnxruntime_signature,
)
from modelops.core import machine
from modelops.core.component import option
from modelops.errors import tool


class OnnxruntimeCpu(Backend):
    """onnxruntime with its CPU execution provider."""

    tools = ("onnxruntime",)
    library = "onnxruntime"
    profiles = True

    threads: int = option(
        default=0, help="Threads inside one inference; 0 is what the process may use.", min=0, max=1024
    )
    optimization: Literal["none", "basic", "extended", "all"] = option(
        default="all", help="Level of graph optimisation."
    )
    spinning: bool = option(default=True, help="Let idle threads spin for more work: faster, and busier.")
    arena: bool = option(default=True, help="Keep freed memory in an arena for the next inference.")

    def missing(self) -> str:
        from importlib.util import find_spec

        return "" if find_spec("onnxruntime") else "onnxruntime is not installed; pip install onnxruntime"

    def open(self, model: Path | Module) -> OpenSession:
        require_usable(self)
        session = onnxruntime_session(onnx_path(self, model), self._options(), _PROVIDERS)
        return _Session(session, self.threads or machine.usable_cpus())

    def profile(self, model: Path, feed: Mapping[str, Any], scratch: Path, runs: int) -> list[NodeTime]:
        require_usable(self)
        return node_times(model, feed, scratch, runs, self._options(), _PROVIDERS)

    def _options(self) -> Any:
        return onnxruntime_options(
            threads=self.threads or machine.usable_cpus(),
            optimization=self.optimization,
            spinning=self.spinning,
            arena=self.arena,
        )


_PROVIDERS = ["CPUExecutionProvider"]


class _Session(OpenSession):
    def __init__(self, session: Any, threads: int) -> None:
        super().__init__(onnxruntime_signature(session))
        self._session = session
        self._threads = threads

    def prepare(self, feed: Mapping[str, Any]) -> Call:
        check_names(self.signature, feed)
        feed = dict(feed)
        names = [spec.name for spec in self.signature.outputs]
        run = self._session.run
        return Call(lambda: run(None, feed), lambda values: dict(zip(names, values, strict=True)))

    def run(self, feed: Mapping[str, Any]) -> dict[str, Any]:
        with tool("onnxruntime"):
            return super().run(feed)

    def facts(self) -> dict[str, Any]:
        return {"threads": self._threads, "providers": self._session.get_providers()}
