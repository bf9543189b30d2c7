"""Weights that a model says lie elsewhere are refused with exit 4, the file named, and nothing of them read."""

from __future__ import annotations

import json
from pathlib import Path

import hostile_models as hostile
import onnx
import pytest
from onnx import TensorProto
from under_watch import commands, forged

#: The bytes of the secret: a pattern that no model here holds otherwise.
CANARY = b"never-to-be-seen"

#: Which trick is tried in which place: each of both at least once. Every pair is in tests/graphs.
CASES = (
    ("absolute", "initializer"),
    ("parent", "sparse_values"),
    ("parent inside", "constant"),
    ("symbolic link outside", "subgraph"),
    ("hard link", "function"),
    ("linked directory", "sparse_attribute"),
    ("NUL", "function_default"),
    ("length too short", "training"),
    ("range beyond the file", "list"),
    ("absolute", "sparse_indices"),
    ("device", "mislabelled_attribute"),
)


def files_with(canary: bytes, folder: Path) -> list[str]:
    """The files below a folder that hold these bytes, links not followed."""
    return [
        str(path.relative_to(folder))
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.is_symlink() and path.stat().st_nlink == 1 and canary in path.read_bytes()
    ]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a secret outside of the model's folder, and with all that points there."""
    hostile.locations(tmp_path)
    (tmp_path / "secret" / "key").write_bytes(CANARY * 4)
    (tmp_path / "tmp").mkdir()
    return tmp_path


def hostile_model(trick: str, where: str, place: Path) -> onnx.ModelProto:
    plain: dict[str, object] = {"location": "plain"}
    keys: dict[str, object] = {
        "absolute": {"location": str(place / "secret" / "key")},
        "parent": {"location": "../secret/key"},
        "parent inside": {"location": "sub/../../secret/key"},
        "symbolic link outside": {"location": "out"},
        "hard link": {"location": "hard"},
        "linked directory": {"location": "linked/key"},
        "NUL": {"location": "../secret/key\0.safe"},
        "length too short": {**plain, "length": 4},
        "range beyond the file": {**plain, "offset": 56, "length": 16},
        "device": {"location": "/dev/zero"},
    }[trick]  # type: ignore[assignment]
    tensor = hostile.external("t", **keys)  # type: ignore[arg-type]
    if where == "sparse_indices":
        tensor.data_type = TensorProto.INT32
    return hostile.PLACES[where](tensor)


def test_every_place_is_tried() -> None:
    assert {where for _, where in CASES} == set(hostile.PLACES)


def test_bare_file_is_refused_and_nothing_outside_is_read(place: Path) -> None:
    lines, models = [], []
    for number, (trick, where) in enumerate(CASES):
        model = place / "model" / f"case-{number}.onnx"
        model.write_bytes(hostile_model(trick, where, place).SerializeToString())
        verb = ["convert", "simplify"][number % 2]
        lines.append([verb, str(model), str(place / "out"), "--json", "--report", f"json={place}/report-{number}"])
        models.append(model)
    first = hostile.external("t", "plain", offset=0, length=16)
    second = hostile.external("u", "plain", offset=8, length=16)
    overlapping = place / "model" / "overlapping.onnx"
    overlapping.write_bytes(hostile.add_to_x([], "t", first, second).SerializeToString())
    lines.append(["quantize", str(overlapping), str(place / "out"), "--method", "dynamic", "--json"])
    for model, case, (code, said) in zip(
        [*models, overlapping], [*CASES, "overlap"], commands(lines, place), strict=True
    ):
        error = json.loads(said)["error"]
        assert code == 4 and error["code"] == "input-refused", (case, said)
        assert model.name in error["message"], (case, said)
        assert CANARY.decode() not in said
    assert not (place / "out").exists()
    assert files_with(CANARY, place) == []  # the secret itself has two names, and is passed over
    assert list((place / "tmp").iterdir()) == []


def test_artifact_that_points_outside_is_refused(place: Path) -> None:
    lines = []
    for number, (trick, where) in enumerate([("parent", "initializer"), ("absolute", "subgraph"), ("NUL", "constant")]):
        model = hostile_model(trick, where, place).SerializeToString()
        lines.append(["validate", "--against", str(forged(model, place / f"made-{number}"))])
    harmless = forged(hostile.in_constant(hostile.constant("t", [1.0], float)).SerializeToString(), place / "harmless")
    lines = [[verb, str(harmless), *rest] for verb, *rest in lines]
    lines.append(["simplify", str(place / "made-0"), str(place / "out"), "--engine", "onnxruntime"])
    for code, said in commands(lines, place):
        assert code == 4 and "made-" in said and "external data" in said, said
        assert CANARY.decode() not in said
    assert not (place / "out").exists()
    assert files_with(CANARY, place) == []


def test_what_lies_beside_the_model_is_read(place: Path) -> None:
    """So that the tests above would see it if the secret were read."""
    (place / "model" / "plain").write_bytes(CANARY)
    model = place / "model" / "honest.onnx"
    model.write_bytes(hostile.in_initializer(hostile.external("t", "plain")).SerializeToString())
    [(code, said)] = commands([["convert", str(model), str(place / "out")]], place)
    assert code == 0, said
    assert files_with(CANARY, place) == ["model/plain", "out/model.onnx"]
