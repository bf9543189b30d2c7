"""An exported model held against the eager outputs, at every shape that was tried."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelops.core.progress import progress
from modelops.core.report import Check
from modelops.errors import StageFailed
from modelops.graphs.reference import Case
from modelops.measures.comparison import Comparison
from modelops.measures.differences import Difference
from modelops.measures.gates import Gate
from modelops.measures.judging import Float64Errors, judge
from modelops.stages._compare import running

if TYPE_CHECKING:
    from numpy.typing import NDArray

Outputs = dict[str, "NDArray[Any]"]


@dataclass(frozen=True)
class Layout:
    """Which axis of each output counts samples: ``batch`` names that dimension, ``dims`` are the outputs'."""

    batch: str | None
    dims: Mapping[str, Sequence[int | str | None]]

    @property
    def unbatched(self) -> list[str]:
        """The outputs that give one value for a whole batch."""
        whole = {name: dims for name, dims in self.dims.items() if self.batch is not None and self.batch not in dims}
        return [name for name, dims in whole.items() if not dims or isinstance(dims[0], int)]

    def comparison(self) -> Comparison:
        """A comparison that finds the samples of every output."""
        dims = {name: list(found) for name, found in self.dims.items() if self.batch in found}
        return Comparison(axes={name: found.index(self.batch) for name, found in dims.items()})


@dataclass(frozen=True)
class Trial:
    """What onnxruntime made of each case: its outputs as far as the reference keeps them, or why it failed.

    ``gates`` are the user's own; each takes the place of the one on the same figure. Where sample rows are ``few``, the
    corners count as rows as well.
    """

    cases: Sequence[Case]
    results: Sequence[Outputs | str]
    layout: Layout
    gates: Sequence[Gate] = ()
    few: bool = False

    @property
    def working(self) -> list[Case]:
        """The cases that the model runs."""
        return [case for case, result in zip(self.cases, self.results, strict=True) if not isinstance(result, str)]

    def differences(self) -> dict[str, Difference]:
        """How far the sample rows differ, by output."""
        return self._differences([*self._rows(), *(self._others_run() if self.few else ())])

    def checks(self) -> list[Check]:
        """The export gates on the sample rows, and one check for every other shape."""
        for case, result in zip(self.cases, self.results, strict=True):
            if case.is_rows and isinstance(result, str):
                works = f"; it works at {shape_text(self.working[0])}" if self.working else ""
                text = f"onnxruntime can't run the exported model at {shape_text(case)}{works}: {result}"
                return [Check("runs", "fail", text)]
        # Of one row, the source's own error may be nothing by chance: float64 is judged on all shapes together.
        float64 = self._float64([*self._rows(), *self._others_run()])
        checks = judge(self.differences(), "export", agreement_evaluated=False, overrides=self.gates, float64=float64)
        checks = [_unspoiled(check, checks, self.differences()) for check in checks]
        return checks + [self._corner(*pair) for pair in self._others()]

    def _rows(self) -> list[tuple[Case, Outputs]]:
        pairs = zip(self.cases, self.results, strict=True)
        return [(case, result) for case, result in pairs if case.is_rows and not isinstance(result, str)]

    def _others(self) -> list[tuple[Case, Outputs | str]]:
        pairs = zip(self.cases, self.results, strict=True)
        return [(case, result) for case, result in pairs if not case.is_rows]

    def _others_run(self) -> list[tuple[Case, Outputs]]:
        return [(case, result) for case, result in self._others() if not isinstance(result, str)]

    def _float64(self, pairs: Sequence[tuple[Case, Outputs]]) -> Float64Errors | None:
        """The errors of both sides against float64, where the source ran in it for all of these cases."""
        if not pairs or any(case.outputs64 is None for case, _ in pairs):
            return None
        source, actual = self.layout.comparison(), self.layout.comparison()
        for case, result in pairs:
            exact = case.outputs64 or {}
            source.add(exact, {name: case.outputs[name].astype("float64") for name in exact})
            actual.add(exact, {name: result[name].astype("float64") for name in exact})
        return Float64Errors(source.differences(), actual.differences())

    def _corner(self, case: Case, result: Outputs | str) -> Check:
        name = f"shapes.{case.name}"
        if isinstance(result, str):
            return Check(name, "fail", f"{shape_text(case)}: onnxruntime fails: {result}")
        pairs = [(case, result)]
        judged = judge(self._differences(pairs), "export", agreement_evaluated=False, rows_min=1, overrides=self.gates)
        wrong = next((check for check in judged if check.verdict == "fail"), None)
        if wrong is not None:
            return Check(name, "fail", f"{shape_text(case)}: {wrong.message}", wrong.value, wrong.threshold, wrong.n)
        return Check(name, "pass", f"{shape_text(case)}: as the source")

    def _differences(self, pairs: Sequence[tuple[Case, Outputs]]) -> dict[str, Difference]:
        comparison = self.layout.comparison()
        for case, result in pairs:
            comparison.add(case.outputs, result)
        return comparison.differences()


def try_out(
    model: Path, cases: Sequence[Case], layout: Layout, gates: Sequence[Gate] = (), *, few: bool = False
) -> Trial:
    """Run the model on every case."""
    from modelops.backends import REGISTRY

    # On every CPU: on float32 graphs onnxruntime gives the same with one thread and with several.
    backend = REGISTRY.load("onnxruntime-cpu").parse({"spinning": False})
    results: list[Outputs | str] = []
    with running(model, backend) as session:
        for number, case in enumerate(cases):
            progress("checking", number, len(cases))
            try:
                results.append(case.take(session.run(case.feed)))
            except StageFailed as error:
                results.append(error.message)
    return Trial(cases, results, layout, gates, few)


def _unspoiled(check: Check, checks: Sequence[Check], differences: Mapping[str, Difference]) -> Check:
    """An output that the source itself never changes proves nothing, and spoils nothing where others do vary."""
    constant = {name for name, d in differences.items() if d.variation == 0.0}
    lively = any(d.varies for d in differences.values())
    name = check.name.rpartition(".")[0]
    if check.verdict == "inconclusive" and name in constant and lively and len(checks) > 1:
        return replace(check, verdict="not-evaluated", message=f"{name} is the same for every input of the source")
    return check


def shape_text(case: Case) -> str:
    """The shapes of a case's inputs."""
    return ", ".join(f"{name} {list(array.shape)}" for name, array in case.feed.items())
