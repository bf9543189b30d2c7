"""auto: every engine that is worth it, each result held against the source, and the best of those that hold."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from modelops.core.component import option
from modelops.core.progress import progress
from modelops.core.workbench import Done
from modelops.core.worker import WorkerBug
from modelops.errors import ModelOpsError, UsageError, unknown_name
from modelops.simplifiers import REGISTRY, Arena, Simplifier

# Memory that an engine needs, as multiples of the model's size: measured on a GPT-2 of 498 MB.
_APPETITE = {"onnxsim": 6.5, "onnxslim": 8.0, "onnxscript": 4.0, "onnxruntime": 4.0}


class Auto(Simplifier):
    """Run several engines, and keep the simplest result that still does what the source does."""

    arranges = True
    # Every engine that may be tried, whatever is chosen: a new version may give another result.
    tools = ("onnxsim", "onnxslim", "onnxscript", "onnxruntime", "onnx-ir", "onnx")

    engines: tuple[str, ...] = option(
        default=("onnxslim", "onnxscript", "onnxsim", "onnxruntime"),
        help="Engines to try, in order; a+b runs b on what a made.",
    )

    def simplify(self, source: Path, target: Path, workbench: Arena) -> Done:
        from modelops.graphs.describe import summary

        chains = [self._chain(text) for text in self.engines]
        if not chains:
            raise UsageError("--engines names no engine", hint=f"known: {', '.join(_known())}")
        before = (int(summary(source)["nodes"]), _size(source))
        attempts: list[dict[str, Any]] = []
        best, best_rank = "", before
        for number, (text, chain) in enumerate(zip(self.engines, chains, strict=True)):
            progress("trying engines", number, len(chains))
            place = workbench.scratch / f"auto-{number}" / target.name
            place.parent.mkdir()
            attempt = self._attempt(chain, source, place, workbench, best_rank)
            attempts.append({"engine": text, **attempt})
            if attempt["outcome"] == "valid":
                best, best_rank = text, (attempt["nodes"], attempt["bytes"])
                _copy(place, target)
            shutil.rmtree(place.parent)
        return Done(notes=_notes(attempts, best, before), details={"attempts": attempts, "chosen": best or None})

    def _chain(self, text: str) -> list[Simplifier]:
        names = text.split("+")
        for name in names:
            if name not in _known():
                raise unknown_name("engine", name, _known())
        return [REGISTRY.ready(name).parse({}) for name in names]

    def _attempt(
        self, chain: list[Simplifier], source: Path, place: Path, workbench: Arena, best: tuple[int, int]
    ) -> dict[str, Any]:
        """What came of one chain of engines; its result, if there is one, is at ``place``.

        Only what has fewer nodes than the best so far, or as many in a smaller file, is held against the source.
        """
        from modelops.graphs.describe import summary

        found: dict[str, Any] = {}
        current = source
        try:
            for step, engine in enumerate(chain):
                made = place if step == len(chain) - 1 else place.with_name(f"step-{step}.onnx")
                workbench.attempt(engine, current, made)
                current = made if made.is_file() else current
            if not place.is_file():
                return {"outcome": "not better", "reason": "it changed nothing"}
            found |= {"nodes": int(summary(place)["nodes"]), "bytes": _size(place)}
            if (found["nodes"], found["bytes"]) >= best:
                return {**found, "outcome": "not better"}
            checks = workbench.judge(place)
        except ModelOpsError as error:
            return {**found, "outcome": error.code, "reason": error.message}
        except WorkerBug as error:
            return {**found, "outcome": "crashed", "reason": str(error)}
        broken = [check for check in checks if check.verdict == "fail"]
        if broken:
            return {**found, "outcome": "refused", "reason": f"{broken[0].name}: {broken[0].message}"}
        return {**found, "outcome": "valid"}


def appetite(engine: Simplifier) -> float:
    """How many times the model's size an engine may need in memory; 8 where it was never measured."""
    return _APPETITE.get(engine.name, 8.0)


def _known() -> list[str]:
    return [name for name in REGISTRY.names() if name != "auto"]


def _size(model: Path) -> int:
    data = model.with_name(f"{model.name}.data")
    return model.stat().st_size + (data.stat().st_size if data.is_file() else 0)


def _copy(model: Path, target: Path) -> None:
    for name in (f"{target.name}.data", target.name):
        target.with_name(name).unlink(missing_ok=True)
    for suffix in ("", ".data"):
        place = model.with_name(model.name + suffix)
        if place.is_file():
            shutil.copyfile(place, target.with_name(target.name + suffix))  # the scratch may lie on another disk


def _notes(attempts: list[dict[str, Any]], best: str, before: tuple[int, int]) -> tuple[str, ...]:
    lines = []
    for attempt in attempts:
        figures = f"{before[0]} → {attempt['nodes']} nodes, {attempt['bytes']:,} bytes" if "nodes" in attempt else ""
        outcome = "" if attempt["outcome"] == "valid" else attempt["outcome"]
        parts = [part for part in (figures, outcome, attempt.get("reason", "")) if part]
        lines.append(f"{attempt['engine']}: {': '.join(parts)}")
    verdict = f"kept the result of {best}" if best else "no engine made anything better: the source is kept as it is"
    return (*lines, verdict)
