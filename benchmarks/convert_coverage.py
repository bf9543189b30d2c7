"""Of transformers' model types, how many does `modelops convert` turn into ONNX that holds at every shape tried?

    python benchmarks/convert_coverage.py --sample 60 --seed 0        a seeded sample, with its 95 % interval
    python benchmarks/convert_coverage.py --all                       every type, which takes hours
    python benchmarks/convert_coverage.py --types bert,gpt2 --columns modelops
    python benchmarks/convert_coverage.py --build                     which types build and run at all; minutes
    python benchmarks/convert_coverage.py --show --sample 60          the table of what is there

Every type becomes a tiny model with random weights (_tiny_models.py), saved as a Hugging Face directory, and goes three
ways with a dynamic batch, and a dynamic sequence where it takes text:

=======================  ===============================================================================================
column                   what is done
=======================  ===============================================================================================
modelops                 the command `modelops convert DIRECTORY OUT`, in a process; its exit code and its report decide
torch.onnx               torch.onnx.export(dynamo=True, dynamic_shapes=…), then run at four shapes against eager
transformers.exporters   OnnxExporter().export(…) of transformers itself, likewise; says why not where it is not there
=======================  ===============================================================================================

Right is: exit code 0 (or no exception), every dimension that was asked for takes at least three sizes, and at each the
outputs are those of eager PyTorch: SQNR of 100 dB, error of 2e-5 of the output's scale, integers equal. A shape that
the model itself refuses counts for nobody. Where transformers can't save or load the type, its directory is replaced
by a Python function, and the line says so.

Every result is added to benchmarks/results/convert_coverage.jsonl at once: interrupt it, and go on with the same
command. --again takes failed results of a column as not there.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import _tiny_models
from _tiny_models import NotBuilt, Tiny

from modelops.measures.distributions import wilson

RESULTS = Path(__file__).with_name("results") / "convert_coverage.jsonl"
COLUMNS = ("modelops", "torch.onnx", "transformers.exporters")
LIMIT_SECONDS = 600.0
# On a machine with other work a second of processor time may take as many seconds as this.
WAITING = 6
# (batch, sequence) to run exported models at; the first is traced.
SHAPES = ((_tiny_models.BATCH, _tiny_models.SEQUENCE), (1, 5), (3, 7), (5, 24))
LEAST_SHAPES = 3

Line = dict[str, Any]


def isolated(function: Callable[..., Line], *args: Any, seconds: float = LIMIT_SECONDS) -> Line:
    """What a function gives, run in a process of its own that may take so much processor time."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_sending, args=(sender, function, args, seconds), daemon=False)
    process.start()
    sender.close()
    late: Line = {"verdict": "failed", "cause": "timeout", "message": f"more than {seconds:.0f} s"}
    found: Line | None = None
    with contextlib.suppress(EOFError):
        if receiver.poll(WAITING * seconds):
            found = receiver.recv()
        else:
            process.kill()
    process.join()
    if found is None and process.exitcode not in (-signal.SIGXCPU, -signal.SIGKILL):
        return {"verdict": "failed", "cause": "crash", "message": "the process died"}
    return found or late


def _sending(sender: Any, function: Callable[..., Line], args: tuple[Any, ...], seconds: float) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(seconds), math.ceil(seconds) + 5))
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    try:
        sender.send(function(*args))
    except BaseException as error:  # a panic of a library below, too, is a result
        sender.send(_failed(error))


def _failed(error: BaseException) -> Line:
    from modelops.stages._causes import classify

    cause = classify(error)
    trace = "".join(traceback.format_exception(error))[-1500:]
    return {"verdict": "failed", "cause": cause.kind, "message": cause.text, "trace": trace}


def prepared(model_type: str, folder: str) -> Line:
    """Build the type and save it as a user would have it; ``function`` says why that was not possible."""
    try:
        tiny = _tiny_models.build(model_type)
    except NotBuilt as error:
        return {"verdict": "not built", "message": str(error)[:600]}
    line: Line = {
        "verdict": "built",
        "family": tiny.family,
        "class": type(tiny.model).__name__,
        "parameters": sum(parameter.numel() for parameter in tiny.model.parameters()),
        "inputs": {name: list(value.shape) for name, value in tiny.inputs.items()},
        "dynamic": {name: {str(axis): dim for axis, dim in axes.items()} for name, axes in tiny.dynamic.items()},
    }
    try:
        tiny.model.save_pretrained(folder)
    except Exception as error:
        line["unsaved"] = f"{type(error).__name__}: {str(error)[:200]}"
    return line


def by_modelops(model_type: str, built: Line, directory: Path, seconds: float) -> Line:
    """The verdict of the command itself."""
    wanted = {dim for axes in built["dynamic"].values() for dim in axes.values()}
    with tempfile.TemporaryDirectory() as folder:
        if "unsaved" not in built:
            line = _command(str(directory), [], Path(folder) / "out", wanted, seconds)
            if line["cause"] != "the directory can't be loaded":
                return {**line, "source": "directory"}
        source = Path(folder) / "source.py"
        shutil.copy(_tiny_models.__file__, folder)
        source.write_text(
            "import _tiny_models\n\n\ndef build():\n"
            f"    tiny = _tiny_models.build({model_type!r})\n    return tiny.module, (), tiny.inputs\n"
        )
        options = []
        for name, shape in built["inputs"].items():
            dims = [built["dynamic"][name].get(str(axis), size) for axis, size in enumerate(shape)]
            dtype = "float32" if not _is_integer(name) else "int64"
            options += ["--input", f"{name}:{dtype}[{','.join(map(str, dims))}]"]
        line = _command(f"{source}:build", options, Path(folder) / "function", wanted, seconds)
        return {**line, "source": "function"}


def _is_integer(name: str) -> bool:
    return name in ("input_ids", "decoder_input_ids", "attention_mask", "bbox")


def _command(source: str, options: list[str], out: Path, wanted: set[str], seconds: float) -> Line:
    program = Path(sys.executable).with_name("modelops")
    limits = ["--time-limit", str(int(seconds)), "--json", "--quiet"]
    started = time.monotonic()
    try:
        done = subprocess.run(
            [program, "convert", source, str(out), *options, *limits],
            capture_output=True,
            text=True,
            timeout=seconds + 60,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
        )
        document = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        return {"verdict": "failed", "cause": "timeout", "message": f"more than {seconds:.0f} s"}
    except ValueError:
        return {"verdict": "failed", "cause": "crash", "message": (done.stderr or done.stdout)[-500:]}
    return {
        **_judged(document, wanted),
        "exit_code": document["exit_code"],
        "command_seconds": time.monotonic() - started,
    }


def _judged(document: Mapping[str, Any], wanted: set[str]) -> Line:
    """What the command's document says, as verdict and cause; ``wanted`` are the dimensions that must be dynamic."""
    report, error = document["report"] or {}, document["error"]
    details = report.get("details", {})
    shapes = [row for row in details.get("shapes", ()) if row["verdict"] == "pass"]
    facts = {
        "rung": details.get("rung"),
        "opset": details.get("opset"),
        "shapes": len(shapes),
        "failed_rungs": [f"{row['rung']}: {row['cause']}: {row['message']}" for row in details.get("failed_rungs", ())],
    }
    if document["exit_code"] == 0:
        fixed = sorted(wanted - set(details.get("dimensions", ())))
        if len(shapes) < LEAST_SHAPES or fixed:
            text = f"not dynamic: {', '.join(fixed)}" if fixed else f"only {len(shapes)} shapes"
            return {**facts, "verdict": "failed", "cause": "too few shapes", "message": text}
        return {**facts, "verdict": "validated", "cause": "", "message": ""}
    if error is not None:
        return {**facts, "verdict": "failed", "cause": _cause(error["message"]), "message": error["message"][:600]}
    wrong = next((check for check in report["checks"] if check["verdict"] not in ("pass", "not-evaluated")), None)
    text = f"{wrong['name']}: {wrong['message']}" if wrong else "no check failed"
    kind = "wrong numbers" if document["exit_code"] == 1 else "inconclusive"
    return {**facts, "verdict": "failed", "cause": kind, "message": text[:600]}


def _cause(message: str) -> str:
    if "no example inputs are known" in message or "running the module on" in message:
        return "inputs unknown"
    if "transformers can't load it" in message or "do not fit its config.json" in message:
        return "the directory can't be loaded"
    if "no exporter could convert" in message:
        return message.split(": ")[2] if message.count(": ") > 1 else "not understood"
    return "refused"


def by_torch(model_type: str, folder: str) -> Line:
    """torch.onnx.export as its documentation shows it."""
    import torch

    tiny = _tiny_models.build(model_type)
    target = Path(folder) / "torch.onnx"
    program = torch.onnx.export(
        tiny.module, (), kwargs=dict(tiny.inputs), dynamic_shapes=tiny.dynamic, dynamo=True, verbose=False
    )
    program.save(str(target))
    return _held(tiny, target)


def by_transformers(model_type: str, folder: str) -> Line:
    """transformers' own exporter."""
    import torch

    try:
        from transformers.exporters import OnnxConfig, OnnxExporter
    except ImportError as error:
        return {"verdict": "not installed", "cause": "not installed", "message": str(error)}
    tiny = _tiny_models.build(model_type)
    shapes = {name: dict.fromkeys(axes, torch.export.Dim.AUTO) for name, axes in tiny.dynamic.items()}
    exporter = OnnxExporter()
    exported = exporter.export(tiny.module, dict(tiny.inputs), config=OnnxConfig(dynamic=True, dynamic_shapes=shapes))
    target = Path(folder) / "transformers.onnx"
    exporter.save_program(exported.program, target)
    return _held(_tiny_models.build(model_type), target)


def _held(tiny: Tiny, path: Path) -> Line:
    """Run the exported model at every shape that the source takes, against the source."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        return {"verdict": "failed", "cause": "graph that onnxruntime refuses", "message": str(error)[:400]}
    good, facts = 0, {"dims": {value.name: value.shape for value in session.get_inputs()}}
    for number, (batch, sequence) in enumerate(SHAPES):
        feed = tiny.feed(batch, sequence, 100 + number)
        where = f"batch {batch}, sequence {sequence}"
        try:
            expected = _outputs(tiny, feed)
        except Exception:
            continue
        names = {value.name.removeprefix("input."): value.name for value in session.get_inputs()}
        arrays = {names[name]: value.numpy() for name, value in feed.items() if name in names}
        try:
            actual = session.run(None, arrays)
        except Exception as error:
            kind = "frozen dimension" if good else "graph that onnxruntime refuses"
            return {**facts, "verdict": "failed", "cause": kind, "message": f"{where}: {str(error)[:300]}"}
        wrong = _differ(expected, actual)
        if wrong:
            return {**facts, "verdict": "failed", "cause": "wrong numbers", "message": f"{where}: {wrong}"}
        good += 1
    if good < LEAST_SHAPES:
        return {**facts, "verdict": "failed", "cause": "too few shapes", "message": f"only {good} shapes"}
    return {**facts, "verdict": "validated", "cause": "", "message": "", "shapes": good}


def _outputs(tiny: Tiny, feed: Mapping[str, Any]) -> list[Any]:
    import torch

    with torch.no_grad():
        return [value.numpy() for value in _tiny_models.flat(tiny.module(**feed))]


def _differ(expected: list[Any], actual: list[Any]) -> str:
    """In what the outputs differ, empty if they agree.

    Of outputs that hold one tensor twice, one may be left out; more after all of them, such as a cache, are no fault.
    """
    import numpy as np

    if len(actual) < len(expected):
        kept: list[Any] = []
        for value in expected:
            if not any(value.shape == other.shape and np.array_equal(value, other) for other in kept):
                kept.append(value)
        expected = kept
    actual = actual[: len(expected)]
    if len(actual) != len(expected):
        return f"{len(actual)} outputs, not {len(expected)}"
    for number, (one, two) in enumerate(zip(expected, actual, strict=True)):
        if one.shape != two.shape:
            return f"output {number} has shape {list(two.shape)}, not {list(one.shape)}"
        if one.dtype.kind != "f":
            if not np.array_equal(one, two):
                return f"output {number}: integers differ"
            continue
        scale = float(np.abs(one).max(initial=0.0)) or 1.0
        delta = (one.astype("f8") - two.astype("f8")).ravel()
        power = float(np.linalg.norm(one.astype("f8")))
        sqnr = 20 * math.log10(power / max(float(np.linalg.norm(delta)), 1e-300)) if power else math.inf
        worst = float(np.abs(delta).max(initial=0.0)) / scale
        if not (worst <= 2e-5 and sqnr >= 100):
            return f"output {number}: error {worst:.1e} of scale, SQNR {sqnr:.0f} dB"
    return ""


def measure(model_type: str, columns: Iterable[str], known: Mapping[str, Line], seconds: float) -> Iterable[Line]:
    """The missing results of one type."""
    wanted = [column for column in columns if column not in known]
    if not wanted or known.get("build", {}).get("verdict") == "not built":
        return
    with tempfile.TemporaryDirectory(prefix="coverage-") as folder:
        directory = Path(folder) / "model"
        started = time.monotonic()
        built = isolated(prepared, model_type, str(directory))
        if built["verdict"] == "failed":
            built = {**built, "verdict": "not built"}
        if "build" not in known:
            yield {"type": model_type, "column": "build", **built, "seconds": round(time.monotonic() - started, 2)}
        if built["verdict"] != "built":
            return
        for column in wanted:
            if column == "build":
                continue
            started = time.monotonic()
            if column == "modelops":
                line = by_modelops(model_type, built, directory, seconds)
            else:
                function = by_torch if column == "torch.onnx" else by_transformers
                line = isolated(function, model_type, folder, seconds=seconds)
            took = round(time.monotonic() - started, 2)
            yield {"type": model_type, "column": column, "family": built["family"], **line, "seconds": took}


def show(lines: Mapping[str, Mapping[str, Line]], types: Iterable[str], tried: int) -> None:
    """Success by family, and causes of failure, for the types that were asked for."""
    chosen = [name for name in types if lines.get(name, {}).get("build", {}).get("verdict") == "built"]
    print(f"{len(chosen)} types build and run forward, of {tried} tried")
    families = sorted({lines[name]["build"]["family"] for name in chosen})
    print(f"\n{'family':<22} {'types':>5}  " + "  ".join(f"{column:>22}" for column in COLUMNS))
    for family in [*families, ""]:
        mine = [name for name in chosen if not family or lines[name]["build"]["family"] == family]
        cells = []
        for column in COLUMNS:
            found = [lines[name][column] for name in mine if column in lines[name]]
            good = sum(line["verdict"] == "validated" for line in found)
            cells.append(f"{f'{good} of {len(found)}':>22}")
        print(f"{family or 'all':<22} {len(mine):>5}  " + "  ".join(cells))
    for column in COLUMNS:
        found = {name: lines[name][column] for name in chosen if column in lines[name]}
        if not found:
            continue
        good = sum(line["verdict"] == "validated" for line in found.values())
        low, high = wilson(good, len(found))
        print(f"\n{column}: {good} of {len(found)} = {good / len(found):.1%}, 95 % interval {low:.1%} to {high:.1%}")
        functions = sum(line.get("source") == "function" for line in found.values())
        if functions:
            print(f"  {functions} of them by a Python function: transformers can't load what it saved")
        rungs = Counter(line["rung"] for line in found.values() if line.get("rung") and line["verdict"] == "validated")
        if rungs:
            print("  validated by " + ", ".join(f"{rung} {count}" for rung, count in rungs.most_common()))
        causes = defaultdict(list)
        for name, line in found.items():
            if line["verdict"] != "validated":
                causes[line["cause"]].append((name, line["message"]))
        for cause, cases in sorted(causes.items(), key=lambda item: -len(item[1])):
            print(f"  {len(cases):>3} {cause}")
            for name, message in cases:
                print(f"        {name}: {' '.join(message.split())[:110]}")


def read() -> dict[str, dict[str, Line]]:
    """The last result of every type and column."""
    found: dict[str, dict[str, Line]] = defaultdict(dict)
    if RESULTS.exists():
        for text in RESULTS.read_text().splitlines():
            line = json.loads(text)
            found[line["type"]][line["column"]] = line
    return found


def append(line: Line) -> None:
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--sample", type=int, help="that many types of those that build, drawn at random")
    which.add_argument("--all", action="store_true", help="every type")
    which.add_argument("--types", help="these types, by comma")
    which.add_argument("--build", action="store_true", help="only build every type, and count")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--columns", default=",".join(COLUMNS), help="by comma")
    parser.add_argument("--seconds", type=float, default=math.inf, help="start nothing after this time")
    parser.add_argument(
        "--limit", type=float, default=LIMIT_SECONDS, help="seconds of one conversion: of the peers, of processor time"
    )
    parser.add_argument("--again", choices=[*COLUMNS, "build"], action="append", default=[], help="failures once more")
    parser.add_argument("--show", action="store_true", help="only print the table of what is there")
    options = parser.parse_args()

    columns = ["build"] if options.build else options.columns.split(",")
    unknown = [column for column in columns if column not in (*COLUMNS, "build")]
    if unknown:
        parser.error(f"no column {unknown[0]!r}")
    lines = read()
    types = options.types.split(",") if options.types else _tiny_models.model_types()
    if options.sample:
        random.Random(options.seed).shuffle(types)
    started = time.monotonic()
    tried = _walk(types, columns, lines, options, started)
    chosen = list(types[:tried])
    show(lines, chosen, tried)
    return 0


def _walk(types: list[str], columns: list[str], lines: Any, options: argparse.Namespace, started: float) -> int:
    """Measure one type after the other; how many were tried."""
    built = tried = 0
    once_more = {(name, column) for name in types for column in options.again
                 if lines[name].get(column, {}).get("verdict") not in (None, "validated", "built")}  # fmt: skip
    if not options.show:
        _import_once()
    for name in types:
        if options.sample and built >= options.sample:
            break
        known = {column: line for column, line in lines[name].items() if (name, column) not in once_more}
        if not options.show and time.monotonic() - started < options.seconds:
            for line in measure(name, columns, known, options.limit):
                append(line)
                lines[name][line["column"]] = line
                print(f"{name} {line['column']}: {line['verdict']} {line.get('cause', '')} "
                      f"{line.get('message', '')[:120]} in {line['seconds']:.0f} s", file=sys.stderr)  # fmt: skip
        tried += "build" in lines[name]
        built += lines[name].get("build", {}).get("verdict") == "built"
        if "build" not in lines[name]:
            break
    return tried


def _import_once() -> None:
    """What every process needs is read before it is forked, on one thread, so that forking is safe."""
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", OMP_NUM_THREADS="1")
    import onnxruntime  # noqa: F401
    import onnxscript  # noqa: F401
    import torch
    import transformers

    torch.set_num_threads(1)
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(torch.nn.Linear(2, 2), (torch.ones(2, 2),), dynamo=True, verbose=False)
    gc.collect()
    gc.freeze()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


if __name__ == "__main__":
    sys.exit(main())
