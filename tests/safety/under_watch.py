"""Runs the command line as an attacker's victim would: in a process of its own, with everything it starts watched."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from modelops.core import worker
from modelops.core.artifact import drafting
from modelops.core.manifest import Manifest

SECONDS = 60.0
BYTES = 8 << 30

#: Every way in which a stage reads a model, by a name for tables; IN and OUT stand in front of the options.
READERS: dict[str, tuple[str, ...]] = {
    "convert": ("convert",),
    "simplify, auto": ("simplify",),
    "simplify, onnxsim": ("simplify", "--engine", "onnxsim"),
    "simplify, onnxslim": ("simplify", "--engine", "onnxslim"),
    "simplify, onnxscript": ("simplify", "--engine", "onnxscript"),
    "simplify, onnxruntime": ("simplify", "--engine", "onnxruntime"),
    "quantize, dynamic": ("quantize", "--method", "dynamic"),
    "quantize, weights": ("quantize", "--method", "weights"),
    "quantize, static": ("quantize", "--method", "static", "--data", "random:64"),
    "prune, magnitude": ("prune", "--method", "magnitude"),
    "prune, channels": ("prune", "--method", "channels"),
    "validate": ("validate", "--against", "@harmless"),
    "validate, the other": ("validate", "--against", "@bomb"),
    "bench": ("bench",),
    "bench, the other": ("bench", "--against", "@bomb"),
}


@dataclass(frozen=True)
class Seen:
    """What a command did: how it ended, what it took, and what of it is still there."""

    code: int | None
    seconds: float
    peak_bytes: int
    output: str
    left: tuple[str, ...]
    alive: tuple[int, ...]

    def problems(self) -> list[str]:
        """Every promise that was broken, in words."""
        found = []
        if self.code is None:
            found.append(f"did not end within {self.seconds:.0f} s")
        elif self.code not in (4, 6):
            found.append(f"exit {self.code}")
        if self.seconds > SECONDS:
            found.append(f"took {self.seconds:.0f} s")
        if self.peak_bytes > BYTES:
            found.append(f"took {self.peak_bytes / 2**30:.1f} GiB")
        if "Traceback" in self.output:
            found.append("a traceback")
        if self.left:
            found.append(f"left {', '.join(self.left)}")
        if self.alive:
            found.append(f"processes {self.alive} live on")
        return found


def words(reader: str, model: Path, harmless: Path, out: Path) -> list[str]:
    """The command line that has a model read by one reader."""
    verb, *options = READERS[reader]
    other = {"@bomb": str(model), "@harmless": str(harmless)}
    read = harmless if "@bomb" in options else model
    return [verb, str(read), str(out), *(other.get(word, word) for word in options)]


def watch(arguments: list[str], folder: Path, *, longest: float = 2 * SECONDS) -> Seen:
    """Run ``modelops`` with these arguments in a folder that must stay as it is."""
    mark = uuid.uuid4().hex
    before = set(folder.rglob("*"))
    started, peak = time.monotonic(), 0
    with tempfile.TemporaryFile() as printed:
        process = subprocess.Popen(
            [sys.executable, "-m", "modelops.cli.main", *arguments],
            cwd=folder,
            env={**os.environ, "MODELOPS_TEST_MARK": mark},
            stdin=subprocess.DEVNULL,
            stdout=printed,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            while process.poll() is None and time.monotonic() - started < longest:
                peak = max(peak, sum(worker.resident_bytes(pid) for pid in worker.tree(process.pid)))
                time.sleep(0.05)
            seconds, code = time.monotonic() - started, process.poll()
        finally:
            alive = tuple(pid for pid in _marked(mark) if pid != process.pid)
            for pid in (process.pid, *alive):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        process.wait()
        printed.seek(0)
        output = printed.read(1 << 20).decode(errors="replace")
    left = tuple(sorted(str(path.relative_to(folder)) for path in set(folder.rglob("*")) - before))
    return Seen(code, seconds, peak, output, left, alive if code is not None else ())


_DRIVER = """
import contextlib, io, json, sys
from modelops.cli.main import run
for words in json.load(sys.stdin):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        code = run(words)
    print(json.dumps([code, out.getvalue()]), flush=True)
"""


def commands(lines: list[list[str]], folder: Path) -> list[tuple[int, str]]:
    """(exit code, all that was printed) of several command lines, one after the other in one process.

    Scratch files go below ``folder/tmp``, which must be there.
    """
    done = subprocess.run(
        [sys.executable, "-c", _DRIVER],
        input=json.dumps(lines),
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "TMPDIR": str(folder / "tmp")},
        timeout=300,
        check=True,
    )
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def _marked(mark: str) -> list[int]:
    """The processes that inherited the mark."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                if mark.encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
    return found


def forged(content: bytes, target: Path, **files: bytes) -> Path:
    """An artifact whose manifest is right in every digest, around a model that never passed a check."""
    from modelops.graphs.wrap import describe

    with drafting(target) as publication:
        for name, data in {"model.onnx": content, **files}.items():
            publication.draft.file(name).write_bytes(data)
        graphs, model = describe(publication.draft.path)
        manifest = Manifest(kind="model", files=publication.files(), graphs=graphs, created="", model=model)
        publication.publish(manifest)
    return target
