"""Files that are programs: never run without --allow-code, and converted with it."""

from __future__ import annotations

import io
import pickle
import re
import resource
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from modelops.core.artifact import Draft
from modelops.errors import InputRefused, StageFailed, UsageError
from modelops.graphs.describe import signature
from modelops.stages import REGISTRY


class Canary:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def convert(folder: Path, source: Path, **options):
    folder.mkdir(exist_ok=True)
    stage = REGISTRY.load("convert").parse({"exporter": "torchscript", **options})
    report = stage.run(str(source), Draft(folder))
    found = signature(folder / "model.onnx")
    return report, " ".join(map(str, found.inputs)) + " -> " + " ".join(map(str, found.outputs))


def _net() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh()).eval()


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("program") / "net.pt2"
    batch = torch.export.Dim("b", min=1, max=64)
    torch.export.save(torch.export.export(_net(), (torch.randn(2, 4),), dynamic_shapes=({0: batch},)), path)
    return path


def _poisoned(source: Path, target: Path, member: str, canary: Path) -> None:
    """The archive with the member replaced by a pickle that would write the canary."""
    payload = io.BytesIO()
    torch.save(Canary(canary), payload)
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for info in old.infolist():
            new.writestr(info.filename, payload.getvalue() if info.filename == member else old.read(info))


def test_no_member_of_an_exported_program_runs_without_leave(program, tmp_path):
    canary = tmp_path / "canary"
    with zipfile.ZipFile(program) as archive:
        members = archive.namelist()
    for number, member in enumerate(members):
        path = tmp_path / f"{number}.pt2"
        _poisoned(program, path, member, canary)
        with pytest.raises(InputRefused, match="a program") as caught:
            convert(tmp_path / "out", path)
        assert "--allow-code" in caught.value.hint and not canary.exists()
    assert any(member.endswith("sample_inputs/model.pt") for member in members)


def test_the_refusal_names_the_part_that_would_run(program, tmp_path):
    with pytest.raises(InputRefused, match=r"data/sample_inputs/model\.pt is run when it is loaded"):
        convert(tmp_path / "out", program)


def test_weights_that_a_config_says_to_unpickle_stay_unread(program, tmp_path):
    canary, path = tmp_path / "canary", tmp_path / "net.pt2"
    payload = io.BytesIO()
    torch.save(Canary(canary), payload)
    changed = 0
    with zipfile.ZipFile(program) as old, zipfile.ZipFile(path, "w") as new:
        for info in old.infolist():
            content = old.read(info)
            if info.filename.endswith("_config.json"):
                changed += len(re.findall(rb'"use_pickle": ?false', content))
                content = re.sub(rb'"use_pickle": ?false', b'"use_pickle": true', content)
            elif "/weights/weight_" in info.filename:
                content = payload.getvalue()
            new.writestr(info.filename, content)
    assert changed
    with pytest.raises(InputRefused, match="a program"):
        convert(tmp_path / "out", path)
    assert not canary.exists()


@pytest.mark.parametrize("member", ["archive/data/aotinductor/model/m.so", "archive/data/aotinductor/model/m.cpp"])
def test_compiled_code_is_named_and_not_loaded(tmp_path, member):
    with zipfile.ZipFile(tmp_path / "net.pt2", "w") as archive:
        archive.writestr(member, b"\x7fELF")
    with pytest.raises(InputRefused, match=f"{member} is run when it is loaded"):
        convert(tmp_path / "out", tmp_path / "net.pt2")


@pytest.mark.parametrize("suffix", [".pt2", ".pt", ".pth", ".joblib"])
def test_a_program_that_would_grow_is_not_unpacked_without_leave(tmp_path, suffix):
    path = tmp_path / f"net{suffix}"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("archive/data/0", bytes(200 << 20))
    (tmp_path / "out").mkdir()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputRefused, match="a program"):
        REGISTRY.load("convert").parse({}).run(str(path), Draft(tmp_path / "out"))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".pkl", ".pt2", ".torchscript"])
@pytest.mark.parametrize("form", ["zip", "pickle"])
def test_no_pickle_runs_without_leave(tmp_path, suffix, form):
    path, canary = tmp_path / f"net{suffix}", tmp_path / "canary"
    if form == "zip":
        torch.save(Canary(canary), path)
    else:
        path.write_bytes(pickle.dumps(Canary(canary)))
    with pytest.raises(InputRefused, match="a program"):
        convert(tmp_path / "out", path, input=["x:float32[batch,4]"])
    assert not canary.exists()


def test_no_member_of_a_torchscript_archive_runs_without_leave(tmp_path):
    torch.jit.script(_net()).save(tmp_path / "net.pt")
    with zipfile.ZipFile(tmp_path / "net.pt") as archive:
        members = archive.namelist()
    for number, member in enumerate(members):
        path, canary = tmp_path / f"{number}.pt", tmp_path / "canary"
        _poisoned(tmp_path / "net.pt", path, member, canary)
        with pytest.raises(InputRefused, match="TorchScript, or a pickle, a program"):
            convert(tmp_path / "out", path, input=["x:float32[batch,4]"])
        assert not canary.exists()
    assert any("/code/" in member for member in members)


def test_an_exported_program_keeps_its_inputs_and_bounds(program, tmp_path):
    report, form = convert(tmp_path / "out", program, allow_code=True, exporter="auto")
    assert report.verdict == "pass" and form == "input:float32[batch,4] -> output:float32[batch,3]"
    assert report.details["dimensions"]["batch"]["bounds"] == [1, 64]
    assert report.details["code_executed"][0]["path"] == str(program)


def test_torchscript_goes_through_its_own_exporter(tmp_path):
    path = tmp_path / "net.pt"
    torch.jit.script(_net()).save(path)
    report, form = convert(tmp_path / "out", path, allow_code=True, exporter="auto", input=["x:float32[batch,4]"])
    assert report.verdict == "pass" and form == "x:float32[batch,4] -> output:float32[batch,3]"
    assert report.details["rung"] == "torchscript"
    with pytest.raises(UsageError, match="dynamo exporter can't read this form"):
        convert(tmp_path / "out", path, allow_code=True, exporter="dynamo", input=["x:float32[batch,4]"])
    with pytest.raises(UsageError, match="gives no example inputs"):
        convert(tmp_path / "out", path, allow_code=True)


def test_a_pickled_module_is_converted_when_it_is_trusted(tmp_path):
    path = tmp_path / "net.pth"
    torch.save(_net(), path)
    report, form = convert(tmp_path / "out", path, allow_code=True, input=["x:float32[batch,4]"])
    assert report.verdict == "pass" and form == "x:float32[batch,4] -> output:float32[batch,3]"
    import onnxruntime

    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    with torch.no_grad():
        wanted = _net()(torch.ones(3, 4)).numpy()
    np.testing.assert_allclose(session.run(None, {"x": np.ones((3, 4), np.float32)})[0], wanted, rtol=1e-5)


def test_what_is_in_the_file_is_said_where_it_is_no_module(tmp_path):
    torch.save(_net().state_dict(), tmp_path / "net.pth")
    with pytest.raises(StageFailed, match="holds OrderedDict, not a torch module") as caught:
        convert(tmp_path / "out", tmp_path / "net.pth", allow_code=True)
    assert "--weights" in caught.value.hint
    torch.save(_net(), tmp_path / "net.pt")
    with pytest.raises(StageFailed, match="is no TorchScript archive") as caught:
        convert(tmp_path / "out", tmp_path / "net.pt", allow_code=True)
    assert "--source pickled-module" in caught.value.hint
    (tmp_path / "net.pt2").write_bytes(b"nonsense")
    with pytest.raises(StageFailed, match=r"torch\.export can't load it"):
        convert(tmp_path / "out", tmp_path / "net.pt2", allow_code=True)


def test_leave_to_run_code_means_nothing_for_other_sources(tmp_path, perceptron):
    with pytest.raises(UsageError, match="--allow-code means nothing"):
        convert(tmp_path / "out", perceptron, allow_code=True, exporter="auto")
