"""What a task metric may drop by: told by the user, else by the step before; functions of the user's count too."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from test_validate import artifact, bare, classes, data, measure, run_numpy, step, validate, verdicts

from modelops.errors import StageFailed, UsageError
from modelops.measures.drops import drop, judge_drop
from modelops.pipeline._work import bind
from modelops.stages._user_metric import user_metric
from modelops.stages.validate import Validate

METRIC = """
def share(outputs, labels):
    return (outputs.argmax(axis=1) == labels).mean()

def error(outputs, labels):
    return (outputs.argmax(axis=1) != labels).mean()

error.higher_is_better = False

def broken(outputs, labels):
    return outputs[99]["no"]
"""


def test_drop_that_quantize_was_given_is_the_one_that_validate_judges_by(tmp_path: Path) -> None:
    history = [step("convert"), step("quantize", method={"name": "static"}, max_drop=1.0)]
    before = artifact(tmp_path, "", [step("convert")])
    after = artifact(tmp_path, "swap", history)
    labelled = data(tmp_path, 300, classes)
    report, saved = measure(after, against=before, data=labelled)
    assert saved["judged_by"]["max_drop"] == 1.0
    assert verdicts(report)["top1.drop"] == "pass"
    assert any("allowed by the quantize step's --max-drop" in note for note in report.notes)
    own = validate(after, against=before, data=labelled, max_drop=0.01)
    assert verdicts(own)["top1.drop"] == "fail"


def test_max_drop_is_a_point_where_no_step_says_more(tmp_path: Path) -> None:
    _, saved = measure(bare(tmp_path), against=bare(tmp_path))
    assert (saved["judged_by"]["max_drop"], saved["judged_by"]["max_drop_from"]) == (0.01, "the default")


def test_max_drop_is_never_without_effect(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--max-drop needs labelled samples"):
        validate(bare(tmp_path), against=bare(tmp_path), max_drop=0.02)
    report = validate(bare(tmp_path), against=bare(tmp_path), max_drop=0.02, data=data(tmp_path, 64))
    assert verdicts(report)["max-drop"] == "inconclusive" and report.exit_code == 3
    alone = validate(artifact(tmp_path, "", [step("convert")]), max_drop=0.02, data=data(tmp_path, 64, classes))
    assert verdicts(alone)["max-drop"] == "inconclusive"


@pytest.mark.parametrize("function", ["share", "error"])
def test_functions_of_the_users_are_metrics(tmp_path: Path, function: str) -> None:
    code = tmp_path / "metrics.py"
    code.write_text(METRIC)
    options = {
        "against": bare(tmp_path),
        "data": data(tmp_path, 300, classes),
        "metric": f"{code}:{function}",
        "transition": "prune",
        "max_drop": 0.05,
    }
    good, bad = validate(bare(tmp_path, "scale"), **options), validate(bare(tmp_path, "swap"), **options)
    assert verdicts(good)[f"{function}.drop"] == "pass"
    assert verdicts(bad)[f"{function}.drop"] == "fail"
    assert [Path(entry["path"]).name for entry in good.details["code_executed"]] == ["metrics.py"]


def test_a_function_named_like_a_metric_of_ours_is_judged_by_what_it_returns(tmp_path: Path) -> None:
    """One row in ten counts: what ours would make of the other nine proves nothing."""
    code = tmp_path / "rare.py"
    code.write_text("def top1(outputs, labels):\n    return float((outputs == labels)[labels > 0].mean())\n")
    labels = np.arange(1000) % 10 // 9
    after = np.where(np.arange(1000) % 100 == 9, 0, labels)  # a tenth of those that count
    with user_metric(f"{code}:top1") as rule:
        assert rule is not None
        found = drop(labels, after, labels, rule)
    assert found.drop == pytest.approx(0.1) and found.bound > found.drop
    assert judge_drop(found, 0.12).verdict == "inconclusive"


def test_a_metric_that_changes_is_other_work(tmp_path: Path) -> None:
    code, source = tmp_path / "metrics.py", bare(tmp_path)
    keys = []
    for text in (METRIC, METRIC + "\n"):
        code.write_text(text)
        keys.append(bind(Validate(metric=f"{code}:share"), source).key)
    assert keys[0] != keys[1]


def test_metrics_that_fail_or_are_not_there_say_so(tmp_path: Path) -> None:
    code = tmp_path / "metrics.py"
    code.write_text(METRIC)
    options = {"against": bare(tmp_path), "data": data(tmp_path, 64, classes)}
    with pytest.raises(StageFailed, match="broken failed in line"):
        validate(bare(tmp_path), metric=f"{code}:broken", **options)
    with pytest.raises(UsageError, match="has no function 'shares'"):
        validate(bare(tmp_path), metric=f"{code}:shares", **options)
    with pytest.raises(UsageError, match=r"unknown metric .top2."):
        validate(bare(tmp_path), metric="top2", **options)


def test_worst_element_names_the_inputs_that_gave_it(tmp_path: Path) -> None:
    report, saved = measure(bare(tmp_path, "swap"), against=bare(tmp_path), data=data(tmp_path, 70, run_numpy))
    worst = saved["outputs"]["y"]["worst"]
    number = worst["row"] // 32
    assert worst["input"] == f"batch {number} of the data" and worst["input_row"] == worst["row"] - 32 * number
    failed = next(check for check in report.checks if check.name == "y.sqnr")
    assert f"(row {worst['input_row']} of batch {number} of the data)" in failed.message
