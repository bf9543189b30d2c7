"""From a scikit-learn estimator: converted by skl2onnx, and held against the estimator's own predictions."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from modelops.core.artifact import Draft
from modelops.core.report import Metric, Report
from modelops.core.tensors import Signature, TensorSpec
from modelops.errors import StageFailed, tool
from modelops.graphs import reference
from modelops.graphs.files import save
from modelops.graphs.reference import ROWS, Case
from modelops.sources import Loaded
from modelops.stages._effort import ROWS as MOST_ROWS
from modelops.stages._trial import Layout, try_out

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

    from modelops.stages.convert import Convert

_INPUT, _BATCH = "x", "batch"
_OPSET = 18
_CORNERS = {"minimum": 1, "minimum+1": 2, "odd": 3}


def convert(loaded: Loaded, stage: Convert, draft: Draft) -> Report:
    """Write model.onnx and reference.npz into the draft, and report what was checked."""
    import numpy as np
    import onnx_ir

    estimator = loaded.module
    _refuse_unknown(estimator)
    random = np.random.default_rng(stage.seed)
    given = stage.given(loaded)
    found = given.samples(_signature(estimator)) if given is not None else None
    rows = [next(found.feeds(len(found)))[_INPUT]] if found is not None else []
    if (left := (stage.rows or MOST_ROWS) - sum(map(len, rows))) > 0:
        rows.append(samples(estimator, left, random))
    cases = [_case(ROWS, estimator, np.concatenate(rows))]
    cases += [_case(name, estimator, samples(estimator, count, random)) for name, count in _CORNERS.items()]
    model, notes = _converted(estimator, stage.opset or _OPSET)
    target = draft.file("model.onnx")
    save(onnx_ir.serde.deserialize_model(model), target)
    layout = Layout(_BATCH, {name: (_BATCH, *array.shape[1:]) for name, array in cases[0].outputs.items()})
    trial = try_out(target, cases, layout, stage.gates)
    checks = trial.checks()
    reference.write(draft.file(reference.FILE_NAME), cases)
    opset = next(entry.version for entry in model.opset_import if not entry.domain)
    details: dict[str, Any] = {
        "exporter": "skl2onnx",
        "opset": opset,
        "estimator": type(estimator).__name__,
        "shapes": [{"case": case.name, "inputs": {_INPUT: list(case.feed[_INPUT].shape)}} for case in cases],
        "code_executed": [dict(entry) for entry in loaded.code_executed],
    }
    if given is not None and found is not None:
        notes += found.notes
        details["code_executed"] = [*details["code_executed"], *map(dict, given.code_executed())]
    return Report((Metric("opset", opset),), tuple(checks), (*loaded.notes, *notes), details)


def _signature(estimator: Any) -> Signature:
    return Signature((TensorSpec(_INPUT, "float32", (_BATCH, int(estimator.n_features_in_))),), ())


def _refuse_unknown(estimator: Any) -> None:
    from sklearn.base import is_classifier, is_regressor

    name = type(estimator).__name__
    if getattr(estimator, "n_features_in_", None) is None:
        raise StageFailed(f"{name} is not fitted, or not on a table of numbers", hint="fit it on a numeric array")
    if is_classifier(estimator):
        if not hasattr(estimator, "predict_proba"):
            raise StageFailed(f"{name} gives no probabilities", hint="use a classifier with predict_proba")
        if isinstance(estimator.classes_, list):
            raise StageFailed(f"{name} was fitted on several labels at once", hint="convert one classifier for each")
    elif not is_regressor(estimator):
        raise StageFailed(f"{name} is neither a classifier nor a regressor", hint="convert the model that predicts")


def _converted(estimator: Any, opset: int) -> tuple[onnx.ModelProto, list[str]]:
    """The graph with named inputs, outputs and batch; its opset is the one asked for."""
    from skl2onnx import convert_sklearn
    from skl2onnx.common.data_types import FloatTensorType
    from sklearn.base import is_classifier

    classifier = is_classifier(estimator)
    options = {id(estimator): {"zipmap": False}} if classifier else None
    types = [(_INPUT, FloatTensorType([None, int(estimator.n_features_in_)]))]
    hint = "skl2onnx.supported_converters() lists the estimators that it knows"
    with tool("skl2onnx", hint=hint), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = convert_sklearn(estimator, initial_types=types, options=options, target_opset=opset)
    notes = []
    if classifier and not _numbered(estimator):
        kept = [value for value in model.graph.output if value.name != "label"]
        del model.graph.output[:]
        model.graph.output.extend(kept)
        classes = ", ".join(map(str, estimator.classes_[:20]))
        notes.append(f"the classes are no integers: probabilities alone are converted, in the order {classes}")
    if not classifier:
        _rename_output(model, "prediction")
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = _BATCH
    model.graph.name = "main"  # skl2onnx names graphs by chance
    return model, notes


def _numbered(estimator: Any) -> bool:
    """Whether the classes are integers, which a graph can give as labels."""
    return bool(estimator.classes_.dtype.kind in "iub")


def _rename_output(model: onnx.ModelProto, name: str) -> None:
    (output,) = model.graph.output
    for node in model.graph.node:
        node.output[:] = [name if value == output.name else value for value in node.output]
        node.input[:] = [name if value == output.name else value for value in node.input]
    output.name = name


def _case(name: str, estimator: Any, rows: NDArray[Any]) -> Case:
    """What the estimator itself predicts for these rows; it computes in float64."""
    import numpy as np
    from sklearn.base import is_classifier

    if is_classifier(estimator):
        exact = {"probabilities": np.asarray(estimator.predict_proba(rows), dtype=np.float64)}
        labels = {"label": np.asarray(estimator.predict(rows), dtype=np.int64)} if _numbered(estimator) else {}
    else:
        exact = {"prediction": np.asarray(estimator.predict(rows), dtype=np.float64).reshape(len(rows), -1)}
        labels = {}
    return Case(name, {_INPUT: rows}, {**labels, **{key: value.astype(np.float32) for key, value in exact.items()}})


def samples(estimator: Any, count: int, random: Any) -> NDArray[Any]:
    """Seeded rows on which a linear model decides both ways, in the scale of what it was fitted on.

    Rows are drawn around the decision boundary of the last step, and taken back through the scalers before it.
    """
    import numpy as np

    steps = [step for _, step in estimator.steps] if hasattr(estimator, "steps") else [estimator]
    last = steps[-1]
    rows = random.standard_normal((count, int(getattr(last, "n_features_in_", estimator.n_features_in_))))
    weights = getattr(last, "coef_", None)
    if weights is not None and hasattr(last, "classes_"):
        weights = np.atleast_2d(np.asarray(weights, dtype=np.float64))
        length = float(np.linalg.norm(weights, axis=1).mean()) or 1.0
        rows = 2.0 * rows / length - np.linalg.pinv(weights) @ np.atleast_1d(last.intercept_)
    for step in reversed(steps[:-1]):
        if not hasattr(step, "inverse_transform"):
            rows = random.standard_normal((count, int(estimator.n_features_in_)))
            break
        rows = step.inverse_transform(rows)
    result: NDArray[Any] = np.asarray(rows, dtype=np.float32)
    return result
