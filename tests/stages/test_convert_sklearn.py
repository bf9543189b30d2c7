from __future__ import annotations

import importlib.util
import zipfile
from pathlib import Path

import joblib
import numpy as np
import onnxruntime
import pytest
from sklearn.cluster import KMeans
from sklearn.datasets import load_breast_cancer, load_diabetes, load_iris
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from sklearn.svm import LinearSVC

from modelops.core.artifact import Draft
from modelops.errors import EnvironmentMissing, InputRefused, StageFailed, UsageError
from modelops.graphs import reference
from modelops.graphs.describe import signature
from modelops.stages import REGISTRY

SKOPS = importlib.util.find_spec("skops") is not None


def convert(folder: Path, source: Path, **options):
    folder.mkdir(exist_ok=True)
    report = REGISTRY.load("convert").parse(options).run(str(source), Draft(folder))
    found = signature(folder / "model.onnx")
    return report, " ".join(map(str, found.inputs)) + " -> " + " ".join(map(str, found.outputs))


def _saved(path: Path, model) -> Path:
    joblib.dump(model, path)
    return path


def _run(folder: Path, rows: np.ndarray) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, {"x": rows.astype(np.float32)}), strict=True))


@pytest.fixture(scope="module")
def cancer():
    x, y = load_breast_cancer(return_X_y=True)
    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=500)).fit(x, y), x


def test_a_linear_regression_predicts_what_it_did(tmp_path):
    x, y = load_diabetes(return_X_y=True)
    model = LinearRegression().fit(x, y)
    source = _saved(tmp_path / "m.joblib", model)
    report, form = convert(tmp_path / "out", source, allow_code=True)
    assert report.verdict == "pass" and form == "x:float32[batch,10] -> prediction:float32[batch,1]"
    wanted = model.predict(x)
    assert np.abs(_run(tmp_path / "out", x)["prediction"][:, 0] - wanted).max() <= 2e-5 * np.abs(wanted).max()
    assert report.details["code_executed"][0]["path"] == str(source)


def test_a_classifier_behind_a_scaler_gives_labels_and_probabilities(tmp_path, cancer):
    model, x = cancer
    report, form = convert(tmp_path / "out", _saved(tmp_path / "m.joblib", model), allow_code=True)
    assert report.verdict == "pass"
    assert form == "x:float32[batch,30] -> label:int64[batch] probabilities:float32[batch,2]"
    found = _run(tmp_path / "out", x)
    assert (found["label"] == model.predict(x)).mean() > 0.998
    assert np.abs(found["probabilities"] - model.predict_proba(x)).max() <= 2e-5
    rows = reference.read(tmp_path / "out" / "reference.npz")[0]
    assert 0.2 < rows.outputs["label"].mean() < 0.8  # the samples lie on both sides


def test_classes_with_names_leave_the_probabilities(tmp_path):
    x, y = load_iris(return_X_y=True)
    names = np.array(["setosa", "versicolor", "virginica"])
    model = LogisticRegression(max_iter=500).fit(x, names[y])
    report, form = convert(tmp_path / "out", _saved(tmp_path / "m.joblib", model), allow_code=True)
    assert report.verdict == "pass" and form == "x:float32[batch,4] -> probabilities:float32[batch,3]"
    assert any("in the order setosa, versicolor, virginica" in note for note in report.notes)


def test_classes_in_floating_point_leave_the_probabilities(tmp_path):
    model = LogisticRegression().fit(np.eye(4), [0.0, 2.0, 0.0, 2.0])
    report, _ = convert(tmp_path / "out", _saved(tmp_path / "m.joblib", model), allow_code=True)
    assert any("no integers" in note and "in the order 0.0, 2.0" in note for note in report.notes)


def test_the_same_estimator_gives_the_same_bytes(tmp_path, cancer):
    source = _saved(tmp_path / "m.joblib", cancer[0])
    for name in ("a", "b"):
        convert(tmp_path / name, source, allow_code=True)
    for file in ("model.onnx", "reference.npz"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


class Canary:
    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_joblib_never_runs_without_leave(tmp_path):
    source = _saved(tmp_path / "m.joblib", Canary(tmp_path / "canary"))
    with pytest.raises(InputRefused, match="a pickle, a program") as caught:
        convert(tmp_path / "out", source)
    assert "skops" in caught.value.hint and not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({"a": 1}, "not a scikit-learn model"),
        (LinearRegression(), "is not fitted"),
        (KMeans(2, n_init=1).fit(np.eye(4)), "neither a classifier nor a regressor"),
        (LinearSVC().fit(np.eye(4), [0, 1, 0, 1]), "gives no probabilities"),
        (KNeighborsClassifier(1).fit(np.eye(4), np.eye(4, 2, dtype=int)), "on several labels at once"),
        (
            make_pipeline(FunctionTransformer(np.sin, validate=True), LinearRegression()).fit(np.eye(4), np.arange(4)),
            "skl2onnx failed",
        ),
    ],
    ids=["dict", "unfitted", "clusters", "svc", "labels", "function"],
)
def test_what_can_not_be_converted_is_said(tmp_path, model, said):
    with pytest.raises(StageFailed, match=said):
        convert(tmp_path / "out", _saved(tmp_path / "m.joblib", model), allow_code=True)


def test_options_for_modules_mean_nothing_for_estimators(tmp_path, cancer):
    source = _saved(tmp_path / "m.joblib", cancer[0])
    with pytest.raises(UsageError, match="--static means nothing for a source of the form sklearn"):
        convert(tmp_path / "out", source, allow_code=True, static=True)


@pytest.mark.skipif(SKOPS, reason="skops is installed")
def test_skops_files_need_skops(tmp_path):
    (tmp_path / "m.skops").write_bytes(b"")
    with pytest.raises(EnvironmentMissing, match="needs skops") as caught:
        convert(tmp_path / "out", tmp_path / "m.skops")
    assert "pip install" in caught.value.hint


@pytest.mark.skipif(not SKOPS, reason="skops is not installed")
def test_skops_files_are_data_unless_they_name_other_types(tmp_path, cancer, monkeypatch):
    import skops.io

    skops.io.dump(cancer[0], tmp_path / "m.skops")
    report, _ = convert(tmp_path / "out", tmp_path / "m.skops")
    assert report.verdict == "pass" and report.details["code_executed"] == []
    skops.io.dump(make_pipeline(FunctionTransformer(Canary), LinearRegression()), tmp_path / "odd.skops")
    with pytest.raises(InputRefused, match=r"names types that could run code: .*Canary"):
        convert(tmp_path / "out", tmp_path / "odd.skops")
    monkeypatch.setattr("modelops.sources.sklearn._LARGEST", 1 << 20)
    with zipfile.ZipFile(tmp_path / "bomb.skops", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("schema.json", bytes(4 << 20))
    with pytest.raises(InputRefused, match="looks like a zip bomb"):
        convert(tmp_path / "out", tmp_path / "bomb.skops")
    (tmp_path / "broken.skops").write_bytes(b"PK")
    with pytest.raises(InputRefused, match="is not a skops file"):
        convert(tmp_path / "out", tmp_path / "broken.skops")
