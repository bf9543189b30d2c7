"""prune tells what was removed, what that cost, and what it could not do."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "pruners"))

from prunable_models import Build, chain, feed_forward, outputs

from modelops.core.artifact import Artifact, drafting
from modelops.core.report import Report
from modelops.errors import EnvironmentMissing, InputRefused, StageFailed, UsageError
from modelops.graphs.wrap import wrap
from modelops.stages.prune import Prune


def artifact(model: onnx.ModelProto, folder: Path) -> Artifact:
    onnx.save(model, folder / "source.onnx")
    return wrap(folder / "source.onnx", folder / "source")


@contextmanager
def pruned(source: Artifact, **options: Any) -> Iterator[tuple[Report, Path]]:
    with drafting(source.path.parent / "out") as publication:
        report = Prune.parse({"speed_budget": 0, **options}).run(source, publication.draft)
        yield report, publication.draft.path / "model.onnx"


def verdicts(report: Report) -> dict[str, str]:
    return {check.name: check.verdict for check in report.checks}


def labelled(source: Artifact, rows: int = 400) -> Path:
    """Images with the classes that the source gives them."""
    images = np.random.default_rng(3).normal(size=(rows, 3, 8, 8)).astype(np.float32)
    labels = outputs(source.model, {"x": images})[0].argmax(1)
    place = source.path.parent / "labelled.npz"
    np.savez(place, x=images, labels=labels)
    return place


def spare(seed: int = 0) -> onnx.ModelProto:
    """A classifier of which half the channels are nearly nothing."""
    b = Build(seed=seed)
    filters = b.random.normal(size=(16, 3, 3, 3)).astype(np.float32)
    filters[::2] *= 1e-4
    x = b.node("Relu", b.node("Conv", b.input("batch", 3, 8, 8), b.const(filters), pads=[1, 1, 1, 1]))
    return b.model(b.head(x, 16))


def test_report_tells_what_was_removed_and_that_the_cut_is_right(tmp_path: Path) -> None:
    source = artifact(chain(), tmp_path)
    with pruned(source) as (report, model):
        values = {metric.name: metric.value for metric in report.metrics}
        assert report, report.worst()
        assert verdicts(report)["surgery"] == "pass"
        assert verdicts(report)["removed"] == "pass"
        assert values["channels"] <= values["channels_before"] / 2  # type: ignore[operator]
        assert values["model_bytes"] == model.stat().st_size < source.size
        assert values["parameters"] < values["parameters_before"]  # type: ignore[operator]
        assert any("agreement with the float model, not accuracy" in note for note in report.notes)


def test_asked_for_more_than_can_go_fails_unless_best_effort(tmp_path: Path) -> None:
    source = artifact(feed_forward(), tmp_path)
    with pruned(source) as (report, _):
        assert report.exit_code == 1
        check = report.worst()
        assert check is not None and check.name == "removed"
        assert "asked to remove 50.0%" in check.message
        assert "LayerNormalization" in check.message
    with pruned(source, best_effort=True) as (report, _):
        assert verdicts(report)["removed"] == "pass"


def test_labels_judge_the_drop(tmp_path: Path) -> None:
    source = artifact(spare(), tmp_path)
    with pruned(source, eval=str(labelled(source))) as (report, _):
        assert verdicts(report)["top1.drop"] == "pass"
        assert report.metric("top1") is not None
    most = {"name": "channels", "channels": 0.9, "round_to": 1}
    with pruned(source, method=most, eval=str(tmp_path / "labelled.npz")) as (report, _):
        assert verdicts(report)["top1.drop"] == "fail"
        assert report.exit_code == 1


def test_agreement_without_labels_is_told_and_not_judged(tmp_path: Path) -> None:
    source = artifact(chain(), tmp_path)
    np.savez(tmp_path / "data.npz", x=np.random.default_rng(0).normal(size=(400, 3, 8, 8)).astype(np.float32))
    with pruned(source, data=str(tmp_path / "data.npz")) as (report, _):
        agreement = [check for check in report.checks if check.name.endswith(".top1")]
        assert [check.verdict for check in agreement] == ["not-evaluated"]
        assert report


def test_gain_in_speed_is_measured(tmp_path: Path) -> None:
    source = artifact(chain(), tmp_path)
    with pruned(source, speed_budget=2.0) as (report, _):
        metric = report.metric("speedup")
        assert metric is not None and metric.unit == "x"


def test_zeros_are_counted_and_speed_not_promised(tmp_path: Path) -> None:
    source = artifact(chain(), tmp_path)
    with pruned(source, method={"name": "magnitude", "zeros": 0.6}) as (report, _):
        assert verdicts(report)["removed"] == "pass"
        assert "surgery" not in verdicts(report)
        assert any("no speed" in note for note in report.notes)


def test_same_options_give_the_same_bytes(tmp_path: Path) -> None:
    source = artifact(chain(), tmp_path)
    found = []
    for _ in range(2):
        with pruned(source, method={"name": "channels", "macs": 0.5}) as (_, model):
            found.append(model.read_bytes())
    assert found[0] == found[1]


def test_wrong_cut_would_be_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A surgeon that takes the wrong channels out of every filter: sizes fit, outputs do not.
    import onnx_ir as ir

    from modelops.pruners import _surgery

    real = _surgery.Surgeon._slice_weights

    def rolled(self: Any) -> None:
        real(self)
        for value in self.graph.initializers.values():
            array = value.const_value.numpy()
            if array.ndim == 4:
                value.const_value = ir.tensor(np.roll(array, 1, axis=0), name=value.name)

    monkeypatch.setattr(_surgery.Surgeon, "_slice_weights", rolled)
    with pruned(artifact(chain(), tmp_path)) as (report, _):
        assert verdicts(report)["surgery"] == "fail"


def test_nothing_to_prune_is_a_clear_failure(tmp_path: Path) -> None:
    b = Build()
    source = artifact(b.model(b.node("Relu", b.input("batch", 4))), tmp_path)
    with pytest.raises(StageFailed, match="nothing to prune"), pruned(source):
        pass
    assert not list(tmp_path.glob(".out*"))


def test_metric_without_labels_is_a_usage_error(tmp_path: Path) -> None:
    source = artifact(chain(), tmp_path)
    with pytest.raises(UsageError, match="--metric needs labelled samples"), pruned(source, metric="f1"):
        pass


def test_data_of_another_shape_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", x=np.zeros((40, 5, 8, 8), np.float32))
    with pytest.raises(InputRefused), pruned(artifact(chain(), tmp_path), data=str(tmp_path / "data.npz")):
        pass


def half_spare() -> onnx.ModelProto:
    """A classifier of which exactly half the channels are nothing."""
    b = Build()
    filters = b.random.normal(size=(16, 3, 3, 3)).astype(np.float32)
    filters[::2] = 0
    x = b.node("Relu", b.node("Conv", b.input("batch", 3, 8, 8), b.const(filters), pads=[1, 1, 1, 1]))
    return b.model(b.head(x, 16))


def test_drop_without_a_target_is_the_target(tmp_path: Path) -> None:
    source = artifact(half_spare(), tmp_path)
    fine = {"name": "channels", "round_to": 1}
    with pruned(source, method=fine, eval=str(labelled(source)), max_drop=0.05) as (report, _):
        assert report, report.worst()
        check = next(check for check in report.checks if check.name == "removed")
        assert "as far as a drop of 0.05 lets it go" in check.message
        assert check.value is not None and check.value >= 0.45, "the channels that are nothing cost nothing"
        trials = report.details["search"]
        assert len(trials) == 6
        assert {trial["fits"] for trial in trials} == {True, False}
        # Six cuts were judged on the same rows: the bound has to hold for all of them together.
        drop = next(metric for metric in report.metrics if metric.name == "top1_drop")
        assert drop.confidence == pytest.approx(1 - 2 * 0.05 / 6)


def test_drop_beside_a_target_is_only_a_gate(tmp_path: Path) -> None:
    source = artifact(half_spare(), tmp_path)
    given = {"name": "channels", "round_to": 1, "channels": 0.25}
    with pruned(source, method=given, eval=str(labelled(source)), max_drop=0.05) as (report, _):
        assert "search" not in report.details
        assert report.details["asked"] == {"what": "channels", "removed": 0.25, "reached": 0.25}


def test_drop_that_is_allowed_is_a_gate_on_labels_of_data_too(tmp_path: Path) -> None:
    source = artifact(spare(), tmp_path)
    given: dict[str, Any] = {"name": "channels", "channels": 0.95, "round_to": 1, "recover": "none"}
    data = str(labelled(source))
    with pruned(source, method=given, data=data, max_drop=0.01) as (report, _):
        assert verdicts(report)["top1.drop"] == "fail"
        assert report.exit_code == 1
    with pruned(source, method=given, data=data) as (report, _):
        assert verdicts(report)["top1.drop"] == "fail"


def test_drop_on_labels_that_were_refitted_to_can_fail_and_not_pass(tmp_path: Path) -> None:
    source = artifact(spare(), tmp_path)
    with pruned(
        source, method={"name": "channels", "channels": 0.1, "round_to": 1}, data=str(labelled(source))
    ) as done:
        report = done[0]
        assert verdicts(report)["top1.drop"] == "not-evaluated" and report.exit_code == 0


def test_drop_that_is_allowed_needs_labels_beside_a_target_too(tmp_path: Path) -> None:
    source = artifact(spare(), tmp_path)
    given = {"name": "channels", "channels": 0.5}
    wanted = pytest.raises(UsageError, match="--max-drop needs samples with labels")
    with wanted, pruned(source, method=given, max_drop=0.01):
        pass


def test_drop_that_nothing_fits_into_fails(tmp_path: Path) -> None:
    source = artifact(chain(), tmp_path)
    with pruned(source, eval=str(labelled(source)), max_drop=0.0) as (report, _):
        assert report.exit_code == 1
        assert "not even" in next(check.message for check in report.checks if check.name == "removed")


def test_drop_as_a_target_needs_labels(tmp_path: Path) -> None:
    source = artifact(chain(), tmp_path)
    with pytest.raises(UsageError, match="only be the target where samples have labels"), pruned(source, max_drop=0.01):
        pass


def test_figures_before_refitting_stand_beside_those_after(tmp_path: Path) -> None:
    source = artifact(chain(), tmp_path)
    place = labelled(source)
    with pruned(source, data=str(place), eval=str(place), best_effort=True) as (report, _):
        values = {metric.name: metric.value for metric in report.metrics}
        assert values["top1"] > values["top1_unrefitted"]  # type: ignore[operator]
        assert values["sqnr"] > values["sqnr_unrefitted"]  # type: ignore[operator]
        assert "top1_before_unrefitted" not in values


def test_groups_tell_what_they_lost_and_gained(tmp_path: Path) -> None:
    source = artifact(chain(), tmp_path)
    with pruned(source, speed_budget=2.0) as (report, _):
        for group in report.details["groups"]:
            share = group["removed"] / (group["removed"] + group["kept"])
            assert 0 < group["importance_lost"] < share, "those of least importance go"
            assert group["macs_saved"] > 0
            assert isinstance(group["microseconds_gained"], float)


def test_tables_show_groups_and_what_was_left_alone(tmp_path: Path) -> None:
    with pruned(artifact(feed_forward(), tmp_path), best_effort=True) as (report, _):
        groups, skipped = report.details["tables"]
        assert groups["columns"][:4] == ["group", "of", "kept", "removed"]
        assert groups["rows"][0][1:4] == ["channels", 32, 32]
        assert any("LayerNormalization" in row[2] for row in skipped["rows"])


def test_curve_is_data_and_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    from modelops.stages import _curve

    monkeypatch.setattr(_curve, "POINTS", 3)
    source = artifact(spare(), tmp_path)
    options = {"eval": str(labelled(source)), "best_effort": True, "max_drop": None, "speed_budget": 3.0}
    fine = {"name": "channels", "round_to": 1, "macs": 0.6}
    with pruned(source, method=fine, curve="0.1..0.7", **options) as (report, model):
        assert report, report.worst()
        import json

        found = json.loads((model.parent / "curve.json").read_text())
        assert [point["removed"] for point in found["points"]] == [0.1, 0.4, 0.7]
        assert (found["quality"], found["source"]) == ("top1", 1.0)
        assert all(point["speedup"] > 0 and 0 <= point["quality"] <= 1 for point in found["points"])
        assert (model.parent / "curve.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (model.parent / "curve.svg").read_text()


def test_curve_without_matplotlib_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from modelops.stages import _pictures

    monkeypatch.setattr(_pictures, "find_spec", lambda name: None)
    with (
        pytest.raises(EnvironmentMissing, match="matplotlib") as caught,
        pruned(artifact(chain(), tmp_path), curve="0.1..0.7"),
    ):
        pass
    assert "pip install" in caught.value.hint and "plots" in caught.value.hint


@pytest.mark.parametrize("text", ["", "0.1", "0.7..0.1", "0..0.5", "0.1..0.99", "a..b"])
def test_curve_of_no_range_is_a_usage_error(text: str) -> None:
    from modelops.stages._curve import shares

    with pytest.raises(UsageError, match="--curve"):
        shares(text)


def test_curve_reads_percent() -> None:
    from modelops.stages._curve import shares

    assert shares("10%..70%") == shares("0.1..0.7") == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]


def test_time_as_a_target_has_to_be_timed(tmp_path: Path) -> None:
    source = artifact(chain(), tmp_path)
    with (
        pytest.raises(UsageError, match="--latency is judged by timing"),
        pruned(source, method={"name": "channels", "latency": 0.5}),
    ):
        pass


def test_curve_is_kept_where_the_model_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    from modelops.stages import _curve

    monkeypatch.setattr(_curve, "POINTS", 2)
    source = artifact(feed_forward(), tmp_path)
    options = {"method": {"name": "channels", "round_to": 1}, "curve": "0.1..0.3", "speed_budget": 2.0}
    with pruned(source, curve_to=str(tmp_path / "kept"), **options) as (report, _):
        assert report.exit_code == 1, "half of the channels can't go"
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["curve.json", "curve.png", "curve.svg"]
    with pruned(source, **options) as (report, _):
        assert any("--curve-to FOLDER keeps them" in note for note in report.notes)


def test_curve_that_could_not_be_timed_well_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    from modelops.stages import _curve, _gain

    monkeypatch.setattr(_curve, "POINTS", 2)
    monkeypatch.setattr(_gain, "_FEWEST", 99)
    source = artifact(feed_forward(), tmp_path)
    options = {"method": {"name": "channels", "round_to": 1}, "curve": "0.1..0.3", "speed_budget": 1.0}
    with pruned(source, **options) as (report, _):
        assert all(point["interval"] is None for point in report.details["curve"])
        assert any(note.startswith("curve.json: ") for note in report.notes), "few launches, or a busy machine"


def test_place_for_a_curve_inside_the_target_is_refused_at_the_start(tmp_path: Path) -> None:
    from modelops.pipeline import load_stage, run_stage

    source = artifact(chain(), tmp_path)
    stage = load_stage("prune", {"curve": "0.1..0.3", "curve_to": str(tmp_path / "out" / "curve")})
    with pytest.raises(UsageError, match="lies inside"):
        run_stage(stage, str(source.path), tmp_path / "out")


def test_place_for_a_curve_without_a_curve_is_a_usage_error(tmp_path: Path) -> None:
    with (
        pytest.raises(UsageError, match="--curve-to is where a curve goes"),
        pruned(artifact(chain(), tmp_path), curve_to=str(tmp_path / "kept")),
    ):
        pass
