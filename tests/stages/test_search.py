from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from modelops.core import cache
from modelops.core.artifact import Artifact, Draft
from modelops.core.report import Check, Metric
from modelops.errors import GateFailed, ResourceExhausted, UsageError
from modelops.graphs.wrap import wrap
from modelops.quantizers.auto import Auto, Facts
from modelops.quantizers.dynamic import Dynamic
from modelops.quantizers.static import Static
from modelops.stages import _reasons, _search, quantize
from modelops.stages._attempts import Attempt, Attempts
from modelops.stages._search import Search, Tried
from modelops.stages.quantize import Pace, Quantize


def attempt(name: str, *, sqnr: float = 30.0, verdict: str = "pass", size: int = 10) -> Attempt:
    checks = [Check("y.sqnr", verdict, "told")]  # type: ignore[arg-type]
    return Attempt(name, {"name": "dynamic"}, bytes=size, checks=checks, metrics=[Metric("sqnr", sqnr, "dB")])


def chosen(*rows: Tried) -> Any:
    search = object.__new__(Search)
    search.tried, search.untried, search.remembered, search.elsewhere = list(rows), [], 0, None
    best = search._best()
    search._tell(best)
    return best, search


def tried(name: str, speedup: float | None, **facts: Any) -> Tried:
    return Tried(attempt(name, **facts), [] if speedup is None else list(np.log([speedup, speedup])))


def test_the_fastest_that_is_accurate_enough_is_best() -> None:
    best, search = chosen(tried("slow", 1.2), tried("wrong", None, verdict="fail"), tried("fast", 2.0, sqnr=20.0))
    assert best.attempt.name == "fast"
    outcomes = {row["name"]: row["outcome"] for row in search.table()}
    assert outcomes == {"slow": "slower", "wrong": "not accurate enough", "fast": "best"}
    assert {row["name"]: row["pareto"] for row in search.table()} == {"slow": True, "wrong": False, "fast": True}


def test_among_equally_fast_ones_the_more_accurate_is_best() -> None:
    best, _ = chosen(tried("a", 2.00, sqnr=20.0), tried("b", 1.99, sqnr=30.0), tried("c", 1.5, sqnr=90.0))
    assert best.attempt.name == "b"


def test_int8_goes_before_float_that_is_no_faster() -> None:
    fused = tried("float, fused", 2.00, sqnr=120.0)
    fused.attempt.method = {"name": "float"}
    assert chosen(fused, tried("int8", 1.99))[0].attempt.name == "int8"
    assert chosen(fused, tried("int8", 1.5))[0].attempt.name == "float, fused"


def test_what_could_not_be_decided_comes_after_what_surely_is_right() -> None:
    best, _ = chosen(tried("sure", 1.1), tried("unsure", 3.0, verdict="inconclusive"))
    assert best.attempt.name == "sure"


def test_the_most_accurate_of_those_that_fail_is_shown() -> None:
    best, search = chosen(tried("a", None, verdict="fail", sqnr=5.0), tried("b", None, verdict="fail", sqnr=8.0))
    assert best.attempt.name == "b" and best.reason == "told"
    assert any(note.startswith("b: ") for note in search.notes())


def facts(**given: Any) -> Facts:
    plain = {"convolutions": 0, "products": 0, "recurrent": 0, "attention": False, "weight_bytes": 0, "has_data": True}
    return Facts(**{**plain, **given})


def test_candidates_follow_the_graph() -> None:
    def names(**given: Any) -> list[str]:
        return [candidate.name for candidate in Auto().plan(facts(**given))]

    assert names(convolutions=20, products=1)[0] == "static, best ranges"
    assert not any("dynamic" in name for name in names(convolutions=20, products=1))
    assert names(products=36, attention=True)[:2] == ["dynamic", "float, fused"]
    assert not any("static" in name for name in names(products=2, has_data=False))
    assert names(convolutions=1, products=48, attention=True)[:2] == ["dynamic", "float, fused"]
    assert "float, fused" in names(convolutions=50, products=8, attention=True)
    paired = Auto(target="gpu-qdq").plan(facts(products=36, attention=True))
    assert {one.method.name for one in paired} == {"static"}
    with pytest.raises(UsageError, match="needs --data"):
        Auto(target="gpu-qdq").plan(facts(products=36, has_data=False))
    with pytest.raises(UsageError, match="needs --data"):
        names(convolutions=20, has_data=False)
    with pytest.raises(GateFailed, match="2 recurrent nodes"):
        names(recurrent=2)


@pytest.fixture
def net(tmp_path: Path, write_perceptron: Callable[..., Path]) -> Artifact:
    return wrap(write_perceptron(tmp_path / "model.onnx"), tmp_path / "artifact")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    x = np.random.default_rng(3).normal(size=(400, 8)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=x)
    return tmp_path / "data.npz"


@pytest.fixture(autouse=True)
def _fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELOPS_CACHE", str(tmp_path / "cache"))


def looked(monkeypatch: pytest.MonkeyPatch, speedups: dict[str, float], elsewhere: bool = False) -> list[str]:
    """Replace timing: candidates run at these speeds, and the names of those that were looked at are listed."""
    seen: list[str] = []

    def look(self: Search, attempt: Attempt) -> dict[str, Any]:
        seen.append(attempt.name)
        ratio = float(np.log(speedups[attempt.name]))
        return {"ratios": [ratio, ratio, ratio], "untimed": "", "latency_ms": 1.0, "float_ms": 1.0}

    def timed(stage: Any, source: Any, target: Any, feed: Any) -> Pace:
        best = max(speedups.values())
        return Pace("pass" if best > 1 else "fail", f"runs at {best}x", (Metric("speedup", best, "x"),))

    def beside(self: Search, contender: Any) -> dict[str, Any]:
        return {"ratios": [1.0, 1.01, 1.02], "untimed": "", "latency_ms": 1.0, "float_ms": 1.0}

    monkeypatch.setattr(Search, "_look", look)
    monkeypatch.setattr(Search, "_beside_float", beside)
    if not elsewhere:
        monkeypatch.setattr(Search, "_elsewhere", lambda _: None)
    monkeypatch.setattr(quantize, "timed", timed)
    return seen


def ran(stage: Quantize, source: Artifact, tmp_path: Path) -> Any:
    draft = tmp_path / f"draft-{time.monotonic_ns()}"
    draft.mkdir()
    return stage.run(source, Draft(draft)), draft / "model.onnx"


def test_auto_publishes_what_is_best_and_lists_the_rest(
    net: Artifact, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked(monkeypatch, {"dynamic": 1.3, "static, best ranges": 1.9})
    report, model = ran(Quantize(data=data), net, tmp_path)
    assert report.exit_code == 0 and report.details["method"] == "static"
    outcomes = {row["name"]: row["outcome"] for row in report.details["candidates"]}
    assert outcomes.pop("dynamic") == "slower" and outcomes.pop("static, best ranges") == "best"
    assert set(outcomes.values()) == {"not tried"}
    assert any(node.op_type == "QuantizeLinear" for node in onnx.load(model).graph.node)
    json.dumps(report.to_dict())


def test_auto_says_dont_where_nothing_is_faster(
    net: Artifact, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked(monkeypatch, {"dynamic": 0.3, "static, best ranges": 0.9})
    monkeypatch.setattr(_reasons, "reasons", lambda *_: ["12 of 36 products are too small"])
    report, _ = ran(Quantize(data=data), net, tmp_path)
    assert report.exit_code == 1 and report.details["decision"] == "refused"
    assert report.details["candidate"] == "static, best ranges"
    assert "12 of 36 products are too small" in report.notes
    report, model = ran(Quantize(data=data, if_slower="publish"), net, tmp_path)
    assert report.exit_code == 0 and any(node.op_type == "QuantizeLinear" for node in onnx.load(model).graph.node)


def test_a_second_search_measures_nothing_again(
    net: Artifact, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = looked(monkeypatch, {"dynamic": 1.3, "static, best ranges": 1.9})
    first, model = ran(Quantize(data=data), net, tmp_path)
    wanted = model.read_bytes()
    assert seen == ["dynamic", "static, best ranges"]
    second, model = ran(Quantize(data=data), net, tmp_path)
    assert len(seen) == 2 and model.read_bytes() == wanted
    assert any("2 of 2 candidates were remembered" in note for note in second.notes)
    assert second.details["candidates"] == first.details["candidates"]
    ran(Quantize(data=data, seed=1, batch=4), net, tmp_path)
    assert len(seen) == 4  # other options are another search


def test_float_on_another_runtime_is_told_where_it_is_faster(
    net: Artifact, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")
    looked(monkeypatch, {"dynamic": 0.3, "static, best ranges": 1.2}, elsewhere=True)
    report, _ = ran(Quantize(data=data), net, tmp_path)
    assert report.details["method"] == "static"
    row = report.details["candidates"][-1]
    assert row["name"].startswith("float on openvino-cpu") and row["accuracy"] == "pass"
    assert any("keeping float and running it on another backend is faster still" in note for note in report.notes)
    looked(monkeypatch, {"dynamic": 0.3, "static, best ranges": 9.0}, elsewhere=True)
    report, _ = ran(Quantize(data=data, seed=1), net, tmp_path)
    assert not any("another backend is faster" in note for note in report.notes)


def test_when_the_budget_is_spent_the_best_so_far_is_taken(
    net: Artifact, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked(monkeypatch, {"dynamic": 1.3, "static, best ranges": 1.9})
    clock = iter(range(0, 100_000, 100))
    monkeypatch.setattr(_search.time, "monotonic", lambda: next(clock))
    report, _ = ran(Quantize(method=Auto(budget=60.0), data=data), net, tmp_path)
    assert report.details["method"] == "dynamic"
    assert report.details["candidates"][1]["outcome"] == "not tried"
    assert "budget" in report.details["candidates"][1]["reason"]


def test_a_foreign_target_is_chosen_for_by_accuracy_alone(
    net: Artifact, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = looked(monkeypatch, {"dynamic": 0.3, "static, best ranges": 0.9})
    report, _ = ran(Quantize(method=Auto(target="arm"), data=data), net, tmp_path)
    assert report.exit_code == 0 and seen == [] and report.details["candidate"] == "dynamic"
    assert all(row.get("speedup") is None for row in report.details["candidates"])


def test_a_candidate_that_crashes_its_tool_is_one_row(
    net: Artifact, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from modelops.errors import StageFailed

    def broken(*_: Any) -> Any:
        raise StageFailed("the tool broke")

    looked(monkeypatch, {"static, best ranges": 1.9})
    monkeypatch.setattr(Dynamic, "quantize", broken)
    report, _ = ran(Quantize(data=data), net, tmp_path)
    assert report.exit_code == 0
    row = report.details["candidates"][0]
    assert row["outcome"] == "not possible" and row["reason"] == "the tool broke"


def test_where_errors_stop_all_candidates_the_first_one_says_why(
    net: Artifact, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    def full(*_: Any) -> Any:
        raise ResourceExhausted("no space left on device")

    monkeypatch.setattr(Attempts, "made", full)
    monkeypatch.setattr(Search, "_elsewhere", lambda _: None)
    with pytest.raises(ResourceExhausted, match="no space left"):
        ran(Quantize(data=data), net, tmp_path)


def test_where_nothing_can_be_made_the_table_is_still_told(
    net: Artifact, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(*_: Any) -> Any:
        raise GateFailed("nothing to quantize: on a whim")

    for method in (Dynamic, Static):
        monkeypatch.setattr(method, "quantize", nothing)
    monkeypatch.setattr(Search, "_elsewhere", lambda _: None)
    report, _ = ran(Quantize(data=data), net, tmp_path)
    assert report.exit_code == 1 and report.details["decision"] == "refused"
    assert {row["outcome"] for row in report.details["candidates"]} == {"not possible"}
    assert any("on a whim" in note for note in report.notes)


def test_what_nodes_cost_is_measured_once(
    net: Artifact, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from modelops.quantizers import _budget

    calls: list[int] = []
    measure = _budget.costs

    def counted(model: Any, nodes: Any, *rest: Any) -> Any:
        calls.append(len(nodes))
        return measure(model, nodes, *rest)

    monkeypatch.setattr(_budget, "costs", counted)
    monkeypatch.setattr(quantize, "timed", lambda *_: Pace("pass", "runs", (Metric("speedup", 2.0, "x"),)))
    tables = []
    for _ in range(2):
        report, _ = ran(Quantize(method=Dynamic(explain=True), data=data), net, tmp_path)
        tables.append([(row["node"], row["error_db"]) for row in report.details["sensitivity"]])
    assert calls == [2] and tables[0] == tables[1]


def test_nodes_of_the_best_candidate_are_explained(
    net: Artifact, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked(monkeypatch, {"dynamic": 1.3, "static, best ranges": 1.9})
    report, _ = ran(Quantize(method=Auto(explain=True), data=data), net, tmp_path)
    (table,) = report.details["tables"]
    assert report.details["candidate"] == "static, best ranges" and {"Gemm", "MatMul"} <= {
        row[1] for row in table["rows"]
    }
    made = Attempts.made

    def full(self: Attempts, candidate: Any, place: Path) -> Any:
        if candidate.name == "explained":
            raise ResourceExhausted("no space left")
        return made(self, candidate, place)

    monkeypatch.setattr(Attempts, "made", full)
    report, _ = ran(Quantize(method=Auto(explain=True), data=data), net, tmp_path)
    assert report.exit_code == 0 and any("could not be measured: no space left" in note for note in report.notes)
    with pytest.raises(UsageError, match="--explain needs --data"):
        Auto(explain=True).plan(facts(products=2, has_data=False))


def test_accuracy_is_judged_where_the_model_will_run(
    net: Artifact, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from modelops.backends import REGISTRY
    from modelops.stages import _compare

    opened: set[tuple[str, bool]] = set()
    running = _compare.running

    def seen(model: Path, backend: Any = None) -> Any:
        opened.add((backend.name if backend is not None else "", model == net.model))
        return running(model, backend)

    monkeypatch.setattr(_compare, "running", seen)
    monkeypatch.setattr(quantize, "timed", lambda *_: Pace("pass", "runs", (Metric("speedup", 2.0, "x"),)))
    backend = REGISTRY.load("openvino-cpu").parse({})
    if backend.missing():
        pytest.skip(backend.missing())
    report, _ = ran(Quantize(method=Dynamic(), eval=data, backend=backend), net, tmp_path)
    assert report.exit_code == 0 and opened == {("onnxruntime-cpu", True), ("openvino-cpu", False)}


def test_a_candidate_that_an_error_stopped_is_tried_again_next_time(
    net: Artifact, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    def full(*_: Any) -> Any:
        raise ResourceExhausted("no space left on device")

    looked(monkeypatch, {"dynamic": 3.0, "static, best ranges": 1.9})
    with monkeypatch.context() as patch:
        patch.setattr(Dynamic, "quantize", full)
        report, _ = ran(Quantize(data=data), net, tmp_path)
        assert report.details["candidate"] == "static, best ranges"
    report, _ = ran(Quantize(data=data), net, tmp_path)
    assert report.details["candidate"] == "dynamic"


_SEARCH = """
import sys
from pathlib import Path
from modelops.core.artifact import Artifact, Draft
from modelops.stages._search import Search
from modelops.stages.quantize import Quantize
log = open(sys.argv[3], "a")
def wrapped(name):
    original = getattr(Search, name)
    def call(self, *args):
        log.write(f"{name} {args[0].name} begins\\n"); log.flush()
        result = original(self, *args)
        log.write(f"{name} {args[0].name} ends\\n"); log.flush()
        return result
    setattr(Search, name, call)
wrapped("_attempt"); wrapped("_look")
place = Path(sys.argv[4]); place.mkdir()
stage = Quantize(data=Path(sys.argv[2]), if_slower="publish", speed_budget=1.0)
report = stage.run(Artifact.open(Path(sys.argv[1])), Draft(place))
print(report.details["candidate"])
"""


def test_a_search_that_was_killed_goes_on_where_it_was(net: Artifact, data: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"

    def start(number: int) -> subprocess.Popen[str]:
        words = [sys.executable, "-c", _SEARCH.replace("\\\\", "\\"), net.path, data, log, tmp_path / f"draft-{number}"]
        return subprocess.Popen(
            [str(word) for word in words], stdout=subprocess.PIPE, text=True, start_new_session=True
        )

    first = start(0)
    end = time.monotonic() + 60
    while time.monotonic() < end and "_look dynamic ends" not in (log.read_text() if log.exists() else ""):
        time.sleep(0.02)
    time.sleep(0.1)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    before = log.read_text().splitlines()
    second = start(1)
    out, _ = second.communicate(timeout=120)
    assert second.returncode == 0 and out.strip()
    after = log.read_text().splitlines()[len(before) :]
    assert "_look dynamic begins" not in after
    assert "_look static, best ranges begins" in after
    finished = {line for line in before if line.endswith("ends")}
    again = {line for line in after if line.replace("begins", "ends") in finished and line.startswith("_look")}
    assert not again


def node(op: str, microseconds: float, macs: int | None = 0, name: str = "n") -> dict[str, Any]:
    return {"op": op, "name": name, "provider": "CPU", "microseconds": microseconds, "macs": macs}


def test_reasons_come_from_the_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    from modelops.quantizers import _kernels

    gops = {"uint8 int8": 2.0, "int8 int8": 1.0, "uint8 uint8": 1.0}
    monkeypatch.setattr(_kernels, "probed", lambda: _kernels.Kernels(gops, True, 1_000_000, None))
    nodes = [
        node("MatMul", 10, 2_000_000, "big"),
        node("MatMul", 5, 1000, "small"),
        node("MatMul", 5, 1000, "small2"),
        node("Softmax", 30),
    ]
    found = _reasons.of_float(nodes, frozenset({"big", "small"}))
    assert found[0].startswith(
        "this model spends 70% of its time outside operators that int8 makes faster (Softmax 60%"
    )
    assert found[1].startswith("1 of 2 products are below the size where int8 pays on this CPU (about 1,000,000")
    assert _reasons.of_float([node("Conv", 10, 5)], frozenset())[0].startswith("int8 convolutions of the sizes")
    converting = [node("QLinearConv", 5), node("QuantizeLinear", 3), node("DequantizeLinear", 2)]
    assert _reasons.of_quantized(converting) == [
        "2 conversions between integers and floats take 50% of the int8 model's time"
    ]


@pytest.mark.parametrize("method", ["dynamic", "float16", "auto"])
@pytest.mark.parametrize("accurate", [True, False])
def test_what_is_named_after_a_failed_gate_exists(method: str, accurate: bool) -> None:
    from modelops.core.component import options_of
    from modelops.quantizers import REGISTRY
    from modelops.stages.quantize import Quantize

    text = _reasons.remedies(method, accurate=accurate, searched=method == "auto")
    flags = {word.strip("();:,").removeprefix("--").replace("-", "_") for word in text.split() if "--" in word}
    own = {item.name for cls in (Quantize, *map(REGISTRY.load, ("dynamic", "auto"))) for item in options_of(cls)}
    assert flags and flags <= own
    assert ("float16" in text) == (not accurate and method != "float16")


def test_where_plain_int8_loses_too_much_costly_nodes_stay_float(
    net: Artifact, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = "dynamic, float where 30 dB need it"
    looked(monkeypatch, {wanted: 1.2})

    def judge(self: Any, attempt: Attempt, candidates: int = 1) -> None:
        verdict = "pass" if attempt.name == wanted else "fail"
        attempt.checks.append(Check("y.sqnr", verdict, "told"))  # type: ignore[arg-type]
        attempt.metrics.append(Metric("sqnr", 25.0, "dB"))

    monkeypatch.setattr(Attempts, "judge", judge)
    report, _ = ran(Quantize(data=data), net, tmp_path)
    assert report.details["candidate"] == wanted
    rows = {row["name"]: row for row in report.details["candidates"]}
    assert rows["dynamic"]["outcome"] == "not accurate enough"
    assert rows["dynamic, float where 20 dB need it"]["reason"] == "dynamic keeps 25 dB already"


def test_a_cache_that_is_gone_only_costs_time(net: Artifact, data: Path, tmp_path: Path, monkeypatch: Any) -> None:
    seen = looked(monkeypatch, {"dynamic": 1.3, "static, best ranges": 1.9})
    ran(Quantize(data=data), net, tmp_path)
    monkeypatch.setattr(cache, "get", lambda *_: None)
    report, _ = ran(Quantize(data=data), net, tmp_path)
    assert report.exit_code == 0 and len(seen) == 4
