"""onnx's own backend suite through simplify: does every model still give the outputs that the suite ships?

    python benchmarks/onnx_suite.py [--seconds 1200] [--engines auto,onnxsim,...] [--bare onnxsim,onnxslim]
        [--sample N] [--seed 0] [--fresh] [--report] [--cold]

Every case that onnxruntime passes as it is goes through ``simplify`` with each engine, and through the bare libraries
beside it (called as their documentation says, in a process of their own). What comes out must still match the shipped
outputs::

    kept      a result, and it matches (for simplify: or the source was kept)
    refused   a documented exit code 1 to 7, and nothing was written
    changed   a result that does not match, or that onnxruntime can't load
    crashed   the process died, or raised where no exit code is documented
    hung      no end within --limit seconds (simplify has limits of its own)

The tools are imported once, and every worker is forked from there (--cold starts each anew, as the command line does:
four times slower). Cases come in a seeded random order; each is a line of results/onnx_suite.jsonl, and a run goes on
where the last one ended. --report prints the table of what is there, with 95 % Wilson intervals, and runs nothing. The
exit code is 1 when simplify has changed an output, crashed or hung.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import onnx
from _onnx_cases import Case, load
from _warm import warm_up

RESULTS = Path(__file__).with_name("results")
ENGINES = ("auto", "onnxscript", "onnxslim", "onnxsim", "onnxruntime")
BARE = ("onnxsim", "onnxslim")
OUTCOMES = ("kept", "refused", "changed", "crashed", "hung")
WORST = ("changed", "crashed", "hung")


def apart(work: Callable[..., Any], arguments: tuple[Any, ...], limit: float) -> tuple[str, Any]:
    """What the work gives when it runs in a forked process: ("ended", value), ("raised", text), ("died", signal)."""
    context = multiprocessing.get_context("fork")
    reader, writer = context.Pipe(duplex=False)

    def child() -> None:
        os.setsid()
        if os.environ.get("ONNX_SUITE_DEBUG") is None:
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1)
            os.dup2(quiet, 2)
        try:
            writer.send(("ended", work(*arguments)))
        except BaseException as error:
            writer.send(("raised", f"{type(error).__name__}: {str(error)[:300]}"))
        os._exit(0)

    process = context.Process(target=child)
    process.start()
    writer.close()
    try:
        if not reader.poll(limit):
            return "hung", f"no end within {limit:.0f} s"
        return reader.recv()  # type: ignore[no-any-return]
    except EOFError:
        process.join()
        return "died", f"exit status {process.exitcode}"
    finally:
        if process.is_alive():
            os.killpg(process.pid, 9)
        process.join()


def baseline(case: Case, path: Path) -> str:
    onnx.save(case.model, path)
    return case.problem(path)


def ours(case: Case, engine: str, source: Path, place: Path) -> tuple[str, str]:
    from modelops.errors import ModelOpsError
    from modelops.pipeline import run_stage
    from modelops.stages.simplify import Simplify

    try:
        outcome = run_stage(Simplify.parse({"engine": engine}), str(source), place)
    except ModelOpsError as error:
        return ("crashed" if (place.exists()) else "refused"), f"exit {error.exit_code}: {error.message[:200]}"
    if outcome.exit_code != 0:
        worst = outcome.report.worst()
        text = f"exit {outcome.exit_code}: {worst.name}: {worst.message[:160]}" if worst else ""
        return ("changed" if place.exists() else "refused"), text
    problem = case.problem(place / "model.onnx")
    nodes = {metric.name: metric.value for metric in outcome.report.metrics}
    said = f"{nodes['nodes_before']} → {nodes['nodes']} nodes"
    return ("changed", problem) if problem else ("kept", said)


def bare(case: Case, engine: str, source: Path, place: Path) -> tuple[str, str]:
    if engine == "onnxsim":
        import onnxsim

        model, _ = onnxsim.simplify(str(source))
    else:
        import onnxslim

        model = onnxslim.slim(str(source))
    if model is None:
        return "crashed", "gave no model"
    onnx.save(model, place)
    try:
        problem = case.problem(place)
    except Exception as error:
        problem = f"onnxruntime: {str(error)[:200]}"
    return ("changed", problem) if problem else ("kept", f"{len(model.graph.node)} nodes")


def judged(case: Case, tool: str, limit: float) -> dict[str, Any]:
    """What came of one case with one tool."""
    how, _, engine = tool.partition(":")
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="onnx-suite-") as folder:
        source = Path(folder) / "source.onnx"
        onnx.save(case.model, source)
        work, place = (ours, Path(folder) / "out") if how == "simplify" else (bare, Path(folder) / "out.onnx")
        end, value = apart(work, (case, engine, source, place), limit)
    outcome, text = value if end == "ended" else ("hung" if end == "hung" else "crashed", str(value))
    seconds = round(time.monotonic() - started, 2)
    return {"case": case.name, "tool": tool, "outcome": outcome, "text": text, "seconds": seconds}


def wilson(hits: int, n: int) -> tuple[float, float]:
    from modelops.measures.distributions import wilson as interval

    return interval(hits, n)


def report(rows: list[dict[str, Any]], passing: int, total: int) -> int:
    by_tool: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        by_tool[row["tool"]].append(row)
    print(f"{passing} of {total} cases pass in onnxruntime as they are")
    print(f"{'tool':<22} {'n':>5} " + " ".join(f"{name:>8}" for name in OUTCOMES) + "   spoiled, 95 % interval")
    spoiled_by_us = 0
    for tool, found in sorted(by_tool.items(), reverse=True):
        counts = Counter(row["outcome"] for row in found)
        spoiled = sum(counts[name] for name in WORST)
        spoiled_by_us += spoiled if tool.startswith("simplify:") else 0
        low, high = wilson(spoiled, len(found))
        print(
            f"{tool:<22} {len(found):>5} "
            + " ".join(f"{counts[name]:>8}" for name in OUTCOMES)
            + f"   {100 * spoiled / len(found):.2f} % ({100 * low:.2f}…{100 * high:.2f} %)"
        )
    for row in rows:
        if row["outcome"] in WORST:
            print(f"  {row['tool']:<22} {row['outcome']:<8} {row['case']}: {row['text']}")
    return spoiled_by_us


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--bare", default=",".join(BARE))
    parser.add_argument("--sample", type=int, default=10**9, help="so many passing cases at most")
    parser.add_argument("--seconds", type=float, default=1200.0)
    parser.add_argument("--limit", type=float, default=120.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fresh", action="store_true", help="begin anew")
    parser.add_argument("--cold", action="store_true", help="start every worker anew, as the command line does")
    parser.add_argument("--report", action="store_true", help="print what is there, run nothing")
    options = parser.parse_args()
    os.environ.setdefault("LC_ALL", "C.UTF-8")
    RESULTS.mkdir(exist_ok=True)
    log, passes = RESULTS / "onnx_suite.jsonl", RESULTS / "onnx_suite_passing.json"
    if options.fresh:
        log.unlink(missing_ok=True)
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    cases = load()
    known = passing_names(cases, passes, options.limit)
    if not options.report:
        if not options.cold:
            warm_up()
        chosen = [case for case in cases if case.name in known]
        random.Random(options.seed).shuffle(chosen)
        tools = [f"simplify:{name}" for name in options.engines.split(",") if name]
        tools += [f"bare:{name}" for name in options.bare.split(",") if name]
        rows += campaign(chosen[: options.sample], tools, rows, log, options.seconds, options.limit)
    spoiled = report(rows, len(known), len(cases))
    return 1 if spoiled else 0


def passing_names(cases: list[Case], place: Path, limit: float) -> set[str]:
    """The cases that onnxruntime passes as they are: found once for each version of both."""
    import onnxruntime

    version = f"onnx {onnx.__version__}, onnxruntime {onnxruntime.__version__}"
    if place.exists() and (known := json.loads(place.read_text()))["version"] == version:
        return set(known["passing"])
    found, failing = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for number, case in enumerate(cases):
            end, value = apart(baseline, (case, Path(folder) / f"{number}.onnx"), limit)
            if end == "ended" and not value:
                found.append(case.name)
            else:
                failing[case.name] = str(value)
            (Path(folder) / f"{number}.onnx").unlink(missing_ok=True)
    place.write_text(json.dumps({"version": version, "passing": found, "failing": failing}, indent=1) + "\n")
    return set(found)


def campaign(
    cases: list[Case], tools: list[str], done: list[dict[str, Any]], log: Path, seconds: float, limit: float
) -> list[dict[str, Any]]:
    """Case after case through every tool, until the time is over; each line is on disk at once."""
    ends = time.monotonic() + seconds
    known = {(row["case"], row["tool"]) for row in done}
    rows: list[dict[str, Any]] = []
    with log.open("a") as file:
        for case in cases:
            for tool in tools:
                if (case.name, tool) in known:
                    continue
                if time.monotonic() > ends:
                    return rows
                row = judged(case, tool, limit)
                rows.append(row)
                file.write(json.dumps(row) + "\n")
                file.flush()
                if row["outcome"] in WORST:
                    print(f"{row['tool']:<22} {row['outcome']:<8} {row['case']}: {row['text']}", flush=True)
    return rows


if __name__ == "__main__":
    sys.exit(main())
