"""Recipes reuse what is unchanged, say why they ran what they ran, and own only what they made."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from modelops.core.artifact import Artifact
from modelops.errors import InputRefused, ModelOpsError, UsageError
from modelops.pipeline import run_recipe, run_stage
from modelops.recipe import Recipe
from modelops.stages._table import Table

RECIPE = """
source = "m.onnx"

[table]
budget = 0
samples = 8

[[step]]
stage = "copy-model"
label = "one"

[[step]]
stage = "look"

[[step]]
stage = "copy-model"
label = "two"
data = "data.bin"

[[step]]
stage = "look"
against = "@copy-model"
"""


@pytest.fixture
def folder(tmp_path: Path, write_perceptron: Callable[..., Path]) -> Path:
    write_perceptron(tmp_path / "m.onnx")
    (tmp_path / "data.bin").write_bytes(b"data")
    (tmp_path / "recipe.toml").write_text(RECIPE)
    return tmp_path


def run(folder: Path) -> list[tuple[str, str]]:
    """(stage, why it ran, or "reused") of every step that was reached."""
    outcome = run_recipe(Recipe.read(folder / "recipe.toml"), folder / "out")
    if outcome.error is not None:
        raise outcome.error
    return [(step.stage, "reused" if step.reused else step.ran_because) for step in outcome.steps]


def edit(folder: Path, before: str, after: str) -> None:
    text = (folder / "recipe.toml").read_text()
    assert before in text
    (folder / "recipe.toml").write_text(text.replace(before, after))


def test_a_recipe_makes_a_directory_for_every_step_and_then_reuses_all(folder: Path) -> None:
    assert run(folder) == [(stage, "not made yet") for stage in ("copy-model", "look", "copy-model", "look")]
    names = ["01-copy-model", "02-look", "03-copy-model", "04-look"]
    assert sorted(entry for entry in os.listdir(folder / "out") if not entry.startswith(".")) == [*names, "run.json"]
    third = Artifact.open(folder / "out" / "03-copy-model")
    assert [step.stage for step in third.manifest.history] == ["copy-model", "copy-model"]
    assert Artifact.open(folder / "out" / "02-look").manifest.kind == "evidence"
    ids = {name: Artifact.open(folder / "out" / name).id for name in names}
    assert [why for _, why in run(folder)] == ["reused"] * 4
    assert ids == {name: Artifact.open(folder / "out" / name).id for name in names}


def test_one_changed_option_runs_from_there_on_and_says_so(folder: Path) -> None:
    run(folder)
    edit(folder, '"two"', '"three"')
    ran = run(folder)
    assert ran[0][1] == ran[1][1] == "reused"
    assert ran[2][1] == "options changed: label two → three"
    # The model that the step made is the same, so what is measured on it need not be measured again.
    assert ran[3][1] == "reused"


def test_one_changed_byte_of_data_runs_from_there_on(folder: Path) -> None:
    run(folder)
    (folder / "data.bin").write_bytes(b"date")
    assert [why for _, why in run(folder)][:3] == ["reused", "reused", "data changed"]


def test_a_changed_source_runs_everything(folder: Path, write_perceptron: Callable[..., Path]) -> None:
    run(folder)
    write_perceptron(folder / "m.onnx", seed=3)
    assert {why for _, why in run(folder)} == {"its source changed"}


def test_a_damaged_step_is_made_again(folder: Path) -> None:
    run(folder)
    place = folder / "out" / "01-copy-model" / "model.onnx"
    place.write_bytes(place.read_bytes()[:-1] + b"?")
    ran = run(folder)
    assert "can't be used" in ran[0][1] and [why for _, why in ran[1:]] == ["reused"] * 3


def test_a_failed_gate_stops_and_leaves_nothing_stale(folder: Path) -> None:
    run(folder)
    (folder / "data.bin").write_bytes(b"x")
    outcome = run_recipe(Recipe.read(folder / "recipe.toml"), folder / "out")
    assert outcome.exit_code == 1 and [step.stage for step in outcome.steps] == ["copy-model", "look", "copy-model"]
    assert not (folder / "out" / "03-copy-model").exists() and not (folder / "out" / "04-look").exists()
    assert [row[0] for row in outcome.table["rows"]] == ["01-copy-model"]


def test_a_directory_that_the_run_did_not_make_is_refused(folder: Path) -> None:
    shutil.copytree(folder, folder / "out" / "01-copy-model")
    with pytest.raises(UsageError, match="not made by this run"):
        run(folder)
    assert (folder / "out" / "01-copy-model" / "m.onnx").exists()


def test_an_artifact_is_no_folder_for_a_run(folder: Path) -> None:
    run(folder)
    made = folder / "out" / "01-copy-model"
    with pytest.raises(UsageError, match="is an artifact"):
        run_recipe(Recipe.read(folder / "recipe.toml"), made)
    Artifact.open(made).verify()
    assert not (made / ".run.lock").exists()


def test_a_fresh_result_is_named_as_it_was_asked_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    for _ in range(2):  # made, then reused
        outcome = run_recipe(Recipe.read(Path("recipe.toml")), Path("out"))
        assert outcome.steps[0].document()["target"]["path"] == "out/01-copy-model"


def test_steps_that_left_the_recipe_are_removed(folder: Path) -> None:
    run(folder)
    edit(folder, '[[step]]\nstage = "look"\nagainst = "@copy-model"\n', "")
    run(folder)
    assert not (folder / "out" / "04-look").exists()


def test_a_second_run_on_the_same_folder_is_refused(folder: Path) -> None:
    import fcntl

    (folder / "out").mkdir()
    with open(folder / "out" / ".run.lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match="another run"):
            run(folder)


def test_a_history_replays_on_another_source(folder: Path, write_perceptron: Callable[..., Path]) -> None:
    run(folder)
    other = write_perceptron(folder / "other.onnx", seed=5)
    made = Artifact.open(folder / "out" / "03-copy-model")
    recipe = Recipe.like(made.manifest, str(other)).with_table(Table.parse({"budget": 0}))
    outcome = run_recipe(recipe, folder / "replay")
    assert outcome.exit_code == 0
    replayed = Artifact.open(folder / "replay" / "02-copy-model")
    assert [step.options for step in replayed.manifest.history] == [step.options for step in made.manifest.history]
    assert replayed.id != made.id


@pytest.mark.parametrize(
    ("before", "after", "message", "hint"),
    [
        ('source = "m.onnx"', "", "needs source", "source"),
        ('label = "one"', 'labels = "one"', "step 1 (copy-model)", "label"),
        ('stage = "look"\nagainst', 'stage = "lok"\nagainst', "step 4 (lok)", "look"),
        ('"@copy-model"', '"@copy-modle"', "@copy-modle", "@copy-model"),
        ("[table]", "[tabel]", "tabel", "table"),
        ("budget = 0", "budget = -1", "--budget", ""),
        ('label = "one"', "advisory = true", "can't be advisory", "validate and bench"),
    ],
)
def test_a_wrong_recipe_is_one_usage_error(folder: Path, before: str, after: str, message: str, hint: str) -> None:
    edit(folder, before, after)
    with pytest.raises(UsageError) as caught:
        Recipe.read(folder / "recipe.toml")
    assert message in caught.value.message and hint in caught.value.hint


@pytest.mark.parametrize("content", [b"source = ", b"\xff\xfe", b"a" * (2 << 20), b"source = " + b"9" * 5000])
def test_a_file_that_is_no_recipe_is_refused(folder: Path, content: bytes) -> None:
    (folder / "recipe.toml").write_bytes(content)
    with pytest.raises(InputRefused):
        Recipe.read(folder / "recipe.toml")


def test_a_rerun_of_a_stage_finds_its_result_in_place(folder: Path) -> None:
    from modelops.stages import REGISTRY

    stage = REGISTRY.load("copy-model").parse({"label": "a"})
    first = run_stage(stage, str(folder / "m.onnx"), folder / "made")
    assert run_stage(stage, str(folder / "m.onnx"), folder / "made").reused
    other = REGISTRY.load("copy-model").parse({"label": "b"})
    with pytest.raises(UsageError, match="label a → b"):
        run_stage(other, str(folder / "m.onnx"), folder / "made")
    assert not run_stage(other, str(folder / "m.onnx"), folder / "made", force=True).reused
    assert first.artifact is not None and Artifact.open(folder / "made").id == first.artifact.id


@pytest.mark.parametrize("target", [".", "inside", ".."])
def test_a_target_over_or_under_its_source_is_refused(folder: Path, target: str) -> None:
    from modelops.stages import REGISTRY

    stage = REGISTRY.load("copy-model").parse({})
    made = folder / "deep" / "made"
    run_stage(stage, str(folder / "m.onnx"), made)
    with pytest.raises(ModelOpsError) as caught:
        run_stage(stage, str(made), made / target)
    assert caught.value.exit_code == 2
    assert Artifact.open(made).verify() is None


def test_the_creation_time_is_the_one_that_was_asked_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from modelops.stages import REGISTRY

    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    outcome = run_stage(REGISTRY.load("copy-model").parse({}), str(folder / "m.onnx"), folder / "made")
    assert outcome.artifact is not None
    manifest = json.loads((folder / "made" / "manifest.json").read_text())
    assert manifest["created"] == "2023-11-14T22:13:20Z" and manifest["id"] == outcome.artifact.id


def test_a_run_that_was_killed_after_a_step_was_made_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from modelops.pipeline import _run

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(_run._Run, "record", killed)
        with pytest.raises(KeyboardInterrupt):
            run(folder)
    assert (folder / "out" / "01-copy-model").is_dir()
    assert [why for _, why in run(folder)] == ["reused", *["not made yet"] * 3]


@pytest.mark.parametrize("name", ["../precious", "precious", "/precious", "01-../../precious"])
def test_a_run_manifest_never_has_anything_else_removed(folder: Path, name: str) -> None:
    run(folder)
    (folder / "precious").mkdir()
    (folder / "out" / "precious").mkdir()
    path = folder / "out" / "run.json"
    values = json.loads(path.read_text())
    values["steps"].append({"directory": name, "stage": "copy-model", "key": "", "id": ""})
    path.write_text(json.dumps(values))
    with pytest.raises(InputRefused, match="precious"):
        run(folder)
    assert (folder / "precious").is_dir() and (folder / "out" / "precious").is_dir()


def test_an_inconclusive_timing_is_tried_again_unless_it_is_advisory(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from modelops.stages import REGISTRY

    monkeypatch.setattr(REGISTRY.load("look"), "machine_dependent", True)
    edit(folder, 'stage = "look"\n\n', 'stage = "look"\nadvisory = true\n\n')
    run(folder)
    for name in ("02-look", "04-look"):  # reports lie outside of the id
        manifest = folder / "out" / name / "manifest.json"
        manifest.write_text(manifest.read_text().replace('"verdict": "pass"', '"verdict": "inconclusive"'))
    reasons = [why for _, why in run(folder)]
    assert reasons[:3] == ["reused"] * 3 and "inconclusive" in reasons[3]


def test_a_chosen_form_of_source_is_part_of_the_key(folder: Path) -> None:
    from modelops.pipeline._work import bind, difference
    from modelops.stages import REGISTRY

    source = str(folder / "m.onnx")
    told, chosen = (bind(REGISTRY.load("convert").parse(options), source) for options in ({}, {"source": "onnx-file"}))
    assert told.key != chosen.key
    made = run_stage(told.stage, source, folder / "made").artifact
    assert made is not None and difference(told, made) == ""
    assert difference(chosen, made).startswith("options changed: source")


def test_the_table_of_a_model_with_a_fixed_batch_counts_every_sample_once(folder: Path) -> None:
    import numpy as np
    import onnx

    model = onnx.load(folder / "m.onnx")
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 4
    onnx.save(model, folder / "m.onnx")
    x = np.random.default_rng(0).normal(size=(10, 8)).astype(np.float32)
    np.savez(folder / "held_out.npz", x=x, labels=np.zeros(10, np.int64))
    (folder / "recipe.toml").write_text(
        'source = "m.onnx"\n[table]\nbudget = 1\ndata = "held_out.npz"\nmetric = "top1"\n'
        '[[step]]\nstage = "copy-model"\n'
    )
    outcome = run_recipe(Recipe.read(folder / "recipe.toml"), folder / "out")
    assert outcome.error is None
    assert "top1 (n=10)" in outcome.table["columns"] and outcome.table["rows"][0][3] > 0


def test_a_step_whose_code_may_have_read_unseen_files_runs_again_and_says_so(folder: Path) -> None:
    from dataclasses import replace

    from modelops.pipeline._work import bind, difference
    from modelops.stages import REGISTRY

    stage = REGISTRY.load("copy-model").parse({})
    run_stage(stage, str(folder / "m.onnx"), folder / "first")
    outcome = run_stage(stage, str(folder / "first"), folder / "second")
    assert outcome.artifact is not None
    work = bind(stage, Artifact.open(folder / "first"))
    assert difference(work, outcome.artifact) == ""
    step = outcome.artifact.manifest.history[-1]
    told = replace(step, report=replace(step.report, details={"unseen_readers": ["h5py"]}))
    manifest = replace(outcome.artifact.manifest, history=(told,))
    assert "h5py" in difference(work, replace(outcome.artifact, manifest=manifest))


def test_a_failed_gate_is_told_with_its_check(folder: Path) -> None:
    from modelops.stages import REGISTRY

    (folder / "data.bin").write_bytes(b"x")
    stage = REGISTRY.load("copy-model").parse({"data": folder / "data.bin"})
    outcome = run_stage(stage, str(folder / "m.onnx"), folder / "made")
    assert outcome.document()["error"]["message"] == "first byte: the first byte is judged"
