"""Artifacts are whole or absent, and nothing altered is read."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from modelops.core import artifact as module
from modelops.core import renames
from modelops.core.artifact import Artifact, drafting
from modelops.core.manifest import Manifest
from modelops.errors import InputRefused, ModelOpsError, ResourceExhausted, UsageError

SIGNATURE = {"inputs": [{"name": "x", "dtype": "float32", "shape": ["batch", 4]}], "outputs": []}
GRAPHS = {"model": {"file": "model.onnx", "signature": SIGNATURE}}


def publish(target: Path, content: bytes = b"weights" * 100, *, force: bool = False, created: str = "now") -> Artifact:
    with drafting(target, force=force) as publication:
        publication.draft.file("model.onnx").write_bytes(content)
        publication.draft.file("tokenizer.json").write_text("{}")
        manifest = Manifest(kind="model", files=publication.files(), graphs=GRAPHS, created=created)
        return publication.publish(manifest)


def visible(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))


def test_a_published_artifact_reads_back(tmp_path: Path) -> None:
    made = publish(tmp_path / "a")
    read = Artifact.open(tmp_path / "a")
    assert read.id == made.id and read.signature.inputs[0].name == "x"
    assert {file.path: file.role for file in read.manifest.files} == {
        "model.onnx": "model",
        "tokenizer.json": "tokenizer",
    }
    assert os.listdir(tmp_path) == ["a"]


def test_the_id_tells_content_and_not_time_or_place(tmp_path: Path) -> None:
    first = publish(tmp_path / "a", created="monday")
    assert publish(tmp_path / "elsewhere" / "b", created="tuesday").id == first.id
    assert publish(tmp_path / "c", b"other").id != first.id


def test_a_failure_in_the_block_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), drafting(tmp_path / "a") as publication:
        publication.draft.file("model.onnx").write_bytes(b"x")
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == []


def test_an_existing_target_is_refused_and_force_replaces_it(tmp_path: Path) -> None:
    publish(tmp_path / "a")
    with pytest.raises(UsageError, match="exists"):
        publish(tmp_path / "a", b"other")
    replaced = publish(tmp_path / "a", b"other", force=True)
    assert Artifact.open(tmp_path / "a").id == replaced.id
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("manifest", [None, '{"name": "web application", "icons": []}'])
def test_force_never_removes_what_is_no_artifact(tmp_path: Path, manifest: str | None) -> None:
    (tmp_path / "a").mkdir()
    if manifest is not None:
        (tmp_path / "a" / "manifest.json").write_text(manifest)
    (tmp_path / "a" / "thesis.txt").write_text("years")
    with pytest.raises(UsageError, match="not an artifact"):
        publish(tmp_path / "a", force=True)
    assert (tmp_path / "a" / "thesis.txt").read_text() == "years"


ALTERATIONS: dict[str, Callable[[Path], object]] = {
    "flipped": lambda place: (place / "model.onnx").write_bytes(b"Weights" + b"weights" * 99),
    "truncated": lambda place: os.truncate(place / "model.onnx", 10),
    "grown": lambda place: (place / "model.onnx").open("ab").write(b"!"),
    "missing": lambda place: (place / "tokenizer.json").unlink(),
    "renamed": lambda place: (place / "tokenizer.json").rename(place / "tokens.json"),
    "extra": lambda place: (place / "extra.bin").write_bytes(b"x"),
    "extra folder": lambda place: ((place / "d").mkdir(), (place / "d" / "x").write_bytes(b"x")),
    "linked": lambda place: ((place / "tokenizer.json").unlink(), (place / "tokenizer.json").symlink_to("/etc/hosts")),
    "hard-linked": lambda place: os.link(place / "model.onnx", place.parent / "copy"),
    "manifest flipped": lambda place: (place / "manifest.json").write_text(
        (place / "manifest.json").read_text().replace('"size": 700', '"size": 701')
    ),
    "manifest truncated": lambda place: os.truncate(place / "manifest.json", 40),
    "manifest empty": lambda place: os.truncate(place / "manifest.json", 0),
    "manifest missing": lambda place: (place / "manifest.json").unlink(),
    "manifest linked": lambda place: (
        (place / "manifest.json").rename(place.parent / "m"),
        (place / "manifest.json").symlink_to(place.parent / "m"),
    ),
    "schema unknown": lambda place: (place / "manifest.json").write_text('{"schema": "modelops.artifact/99"}'),
    "deep": lambda place: (place / "manifest.json").write_text("[" * 100_000),
    "not a number": lambda place: (place / "manifest.json").write_text('{"schema": NaN}'),
}


@pytest.mark.parametrize("alteration", ALTERATIONS)
def test_every_alteration_is_refused_and_names_the_file(tmp_path: Path, alteration: str) -> None:
    publish(tmp_path / "a")
    Artifact.open(tmp_path / "a")
    time.sleep(0.06)  # so that the digest of the untouched file is remembered
    Artifact.open(tmp_path / "a")
    ALTERATIONS[alteration](tmp_path / "a")
    with pytest.raises(InputRefused) as caught:
        Artifact.open(tmp_path / "a")
    assert caught.value.exit_code == 4
    assert any(name in caught.value.message for name in ("model.onnx", "token", "manifest.json", "extra", "d/x"))


def test_every_single_bit_flip_of_a_manifest_is_refused_or_harmless(tmp_path: Path) -> None:
    made = publish(tmp_path / "a")
    path = tmp_path / "a" / "manifest.json"
    whole = path.read_bytes()
    for position in range(0, len(whole), 7):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1 << position % 8]) + whole[position + 1 :])
        try:
            read = Artifact.open(tmp_path / "a")
        except InputRefused:
            continue
        # What lies outside the id (a time stamp, a role) may read differently; the content may not.
        assert read.id == made.id


def test_a_path_that_leaves_the_artifact_is_refused(tmp_path: Path) -> None:
    publish(tmp_path / "a")
    path = tmp_path / "a" / "manifest.json"
    path.write_text(path.read_text().replace('"path": "tokenizer.json"', '"path": "../tokenizer.json"'))
    with pytest.raises(InputRefused, match="leaves the artifact"):
        Artifact.open(tmp_path / "a")


def test_a_draft_is_never_read_as_an_artifact(tmp_path: Path) -> None:
    with drafting(tmp_path / "a") as publication, pytest.raises(InputRefused, match="never finished"):
        Artifact.open(publication.draft.path)


# ---------------------------------------------------------------- faults

CALLS = ("mkdir", "open", "write", "fsync", "close")


class Faults:
    """Counts the system calls of publication, and does something at the Nth."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, at: int, act: Callable[[], None], *, before: bool = True
    ) -> None:
        self.count, self.at, self.act = 0, at, act
        for name in CALLS:
            monkeypatch.setattr(os, name, self._counted(getattr(os, name)))
        monkeypatch.setattr(renames, "_flagged", self._counted(renames._flagged))

    def _counted(self, call: Callable[..., object]) -> Callable[..., object]:
        def counted(*args: object, **kwargs: object) -> object:
            self.count += 1
            if self.count == self.at:
                self.act()
            return call(*args, **kwargs)

        return counted


def _calls_of_one_publication(tmp_path: Path, force: bool) -> int:
    with pytest.MonkeyPatch.context() as monkeypatch:
        faults = Faults(monkeypatch, -1, lambda: None)
        publish(tmp_path / "count", b"counted", force=force)
        return faults.count


@pytest.mark.parametrize("force", [False, True], ids=["new", "force"])
def test_killed_at_every_call_the_target_is_absent_or_whole(tmp_path: Path, force: bool) -> None:
    if force:
        publish(tmp_path / "count", b"before")
    total = _calls_of_one_publication(tmp_path, force)
    assert total > 10
    for at in range(1, total + 1):
        target = tmp_path / f"t{at}" / "a"
        target.parent.mkdir()
        before = publish(target, b"before").id if force else None
        pid = os.fork()
        if pid == 0:
            with pytest.MonkeyPatch.context() as monkeypatch:
                Faults(monkeypatch, at, lambda: os.kill(os.getpid(), signal.SIGKILL))
                publish(target, b"after", force=force)
            os._exit(0)
        status = os.waitpid(pid, 0)[1]
        assert os.WIFSIGNALED(status)
        found = Artifact.open(target).id if target.exists() else None
        after = publish(tmp_path / "after", b"after").id if at == 1 else Artifact.open(tmp_path / "after").id
        assert found in ({before, after} if force else {None, after})
        assert set(visible(target.parent)) <= {"a"}
        # A rerun succeeds, and clears what the killed process left.
        assert publish(target, b"after", force=target.exists()).id == after
        assert os.listdir(target.parent) == ["a"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=["ENOSPC", "EIO"])
@pytest.mark.parametrize("force", [False, True], ids=["new", "force"])
def test_an_error_at_every_call_leaves_what_was_there_and_exits_with_6(tmp_path: Path, code: int, force: bool) -> None:
    if force:
        publish(tmp_path / "count", b"before")
    total, swallowed = _calls_of_one_publication(tmp_path, force), 0
    for at in range(1, total + 1):
        target = tmp_path / f"t{at}" / "a"
        target.parent.mkdir()
        before = publish(target, b"before").id if force else None

        def fail() -> None:
            raise OSError(code, os.strerror(code))

        failed = False
        with pytest.MonkeyPatch.context() as monkeypatch:
            Faults(monkeypatch, at, fail)
            try:
                publish(target, b"after", force=force)
            except ResourceExhausted as error:
                failed = error.exit_code == 6
        harmless = "making a parent that exists, or removing what was replaced"
        assert failed or Artifact.open(target).manifest.files[0].size == 5, harmless
        swallowed += not failed
        if failed and force:
            assert Artifact.open(target).id == before
        assert os.listdir(target.parent) == (["a"] if force or not failed else [])
    # Three folders that exist already are made again; with force, two calls remove what was replaced.
    assert swallowed <= (5 if force else 3)


WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_artifact import publish
publish(Path(sys.argv[1]), sys.argv[2].encode())
"""


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
@pytest.mark.parametrize("call", ["mkdir", "write", "fsync", "renameat2"])
def test_killed_at_every_system_call_the_target_is_absent_or_whole(tmp_path: Path, call: str) -> None:
    script = tmp_path / "writer.py"
    script.write_text(WRITER.format(tests=str(Path(__file__).parent)))
    expected = publish(tmp_path / "expected", b"x").id
    for at in range(1, 40):
        target = tmp_path / f"{call}{at}" / "a"
        target.parent.mkdir()
        done = subprocess.run(
            ["strace", "-qq", "-o", os.devnull, "-e", f"trace={call}", "-e", f"inject={call}:signal=SIGKILL:when={at}",
             sys.executable, "-B", str(script), str(target), "x"],
            capture_output=True, check=False,
        )  # fmt: skip
        if b"ptrace" in done.stderr or b"PTRACE" in done.stderr:
            pytest.skip("ptrace is not allowed here")
        if target.exists():
            assert Artifact.open(target).id == expected
        assert set(visible(target.parent)) <= {"a"}
        if done.returncode == 0:
            assert target.exists()
            return
    pytest.fail(f"40 kills at {call} and never done")


@pytest.mark.parametrize("equal", [True, False], ids=["equal", "different"])
def test_of_four_writers_one_publishes_and_the_rest_find_it_or_are_refused(tmp_path: Path, equal: bool) -> None:
    script = tmp_path / "writer.py"
    script.write_text(
        WRITER.format(tests=str(Path(__file__).parent)).replace(
            "publish(Path", "from modelops.errors import ModelOpsError\ntry: publish(Path"
        )
        + "except ModelOpsError as error: sys.exit(error.exit_code)\n"
    )
    target = tmp_path / "out" / "a"
    target.parent.mkdir()
    writers = [
        subprocess.Popen([sys.executable, str(script), str(target), "same" if equal else str(number)])
        for number in range(4)
    ]
    codes = sorted(writer.wait() for writer in writers)
    # A writer that comes when all is done sees an existing target: refused, with no look at what it would have made.
    assert codes[0] == 0 and set(codes) <= {0, 2}
    if not equal:
        assert codes == [0, 2, 2, 2]
    Artifact.open(target)
    assert os.listdir(target.parent) == ["a"]


def test_two_writers_of_the_same_result_both_succeed(tmp_path: Path) -> None:
    with drafting(tmp_path / "a") as slow:
        publish(tmp_path / "a")
        slow.draft.file("model.onnx").write_bytes(b"weights" * 100)
        slow.draft.file("tokenizer.json").write_text("{}")
        manifest = Manifest(kind="model", files=slow.files(), graphs=GRAPHS, created="later")
        assert slow.publish(manifest).manifest.created == "now"
    assert os.listdir(tmp_path) == ["a"]


def test_two_writers_of_different_results_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="exists"), drafting(tmp_path / "a") as slow:
        winner = publish(tmp_path / "a")
        slow.draft.file("model.onnx").write_bytes(b"something else")
        slow.publish(Manifest(kind="model", files=slow.files(), graphs=GRAPHS, created="later"))
    assert Artifact.open(tmp_path / "a").id == winner.id
    assert os.listdir(tmp_path) == ["a"]


def test_a_live_writers_draft_is_not_swept(tmp_path: Path) -> None:
    with drafting(tmp_path / "a") as first:
        with drafting(tmp_path / "a"):
            assert first.draft.path.exists()
        assert first.draft.path.exists()


def test_errors_are_modelops_errors(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in ("nothing", "file"):
        with pytest.raises(ModelOpsError):
            Artifact.open(tmp_path / path)
    assert module.role_of("model.onnx.data") == "external-data"
