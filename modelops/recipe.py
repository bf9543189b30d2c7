"""Recipes: ordered stages from a TOML file, or from the history of an artifact.

::

    source = "model.py:build"

    [table]                     # optional: what the closing table measures
    data = "data/held_out.npz"
    metric = "top1"

    [[step]]
    stage = "convert"

    [[step]]
    stage = "quantize"
    method = {name = "static", ranges = "minmax"}
    data = "data/calibration.npz"

    [[step]]
    stage = "bench"
    against = "@convert"        # what an earlier step made
    advisory = true             # report everything, never stop here

Paths are relative to the recipe's folder.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from modelops.core.component import Component, options_of
from modelops.core.manifest import Manifest
from modelops.errors import InputRefused, UsageError, from_os_error, missing_path, unknown_name
from modelops.stages import REGISTRY as STAGES
from modelops.stages import Stage
from modelops.stages._table import Table

LARGEST_BYTES = 1 << 18
# tomllib takes time by the square of a key's dots, and a key does not span lines.
_MOST_DOTS = 500


@dataclass(frozen=True)
class RecipeStep:
    """One stage of a recipe. ``against`` and other options may name an earlier step as ``@name``."""

    stage: Stage
    advisory: bool = False

    @property
    def references(self) -> tuple[str, ...]:
        """The earlier steps that the options name, without the ``@``."""
        return tuple(path[1:] for path in _paths(self.stage) if path.startswith("@"))

    def bound(self, places: Mapping[str, Path]) -> Stage:
        """The stage with its references turned into the directories of earlier steps."""
        stage: Stage = _mapped(self.stage, lambda text: str(places[text[1:]]) if text.startswith("@") else text)
        return stage


@dataclass(frozen=True)
class Recipe:
    """A source and what is to be done with it, in order."""

    source: str
    steps: tuple[RecipeStep, ...]
    table: Table = field(default_factory=lambda: Table.parse({}))
    name: str = "recipe"

    @classmethod
    def read(cls, path: Path) -> Recipe:
        """The recipe in a TOML file; UsageError or InputRefused names the step and key that is wrong."""
        if not path.is_file():
            if path.exists():
                raise InputRefused(f"{path} is not a file", hint="give a recipe in TOML")
            raise missing_path("recipe", path)
        if path.stat().st_size > LARGEST_BYTES:
            raise InputRefused(f"{path} has more than {LARGEST_BYTES} bytes: not a recipe")
        try:
            text = path.read_text(encoding="utf-8")
            if any(line.count(".") > _MOST_DOTS for line in text.split("\n")):
                raise InputRefused(f"{path} has a line with more than {_MOST_DOTS} dots: not a recipe")
            values = tomllib.loads(text)
        except (ValueError, RecursionError) as error:  # no TOML, no UTF-8, or a number of thousands of digits
            raise InputRefused(f"{path} is not valid TOML: {error}", hint="mend the line that it names") from error
        except OSError as error:
            raise from_os_error(error, "reading the recipe") from error
        base = path.absolute().parent
        for key in values:
            if key not in ("source", "step", "table"):
                raise unknown_name(f"key in {path.name}", key, ("source", "step", "table"))
        source = values.get("source")
        if not isinstance(source, str) or not source:
            raise UsageError(f'{path.name} needs source = "..."', hint='such as source = "model.py:build"')
        steps = values.get("step")
        if not isinstance(steps, list) or not steps or not all(isinstance(step, dict) for step in steps):
            raise UsageError(f"{path.name} needs one [[step]] or more")
        parsed = tuple(_step(number, step, base) for number, step in enumerate(steps, 1))
        _check_references(parsed)
        table = values.get("table", {})
        if not isinstance(table, dict):
            raise UsageError(f"table in {path.name} is a [table], not {table!r}")
        return cls(
            _located(source, base), parsed, _mapped(Table.parse(table), lambda text: _located(text, base)), path.stem
        )

    @classmethod
    def like(cls, manifest: Manifest, source: str) -> Recipe:
        """The recipe that an artifact's history is, for another source."""
        if not manifest.history:
            raise UsageError("the artifact has no history to replay", hint="give one that modelops made")
        steps = tuple(RecipeStep(STAGES.load(step.stage).parse(step.options)) for step in manifest.history)
        return cls(source, steps, name="replay")

    def with_table(self, table: Table) -> Recipe:
        return replace(self, table=table)


def _step(number: int, values: Mapping[str, Any], base: Path) -> RecipeStep:
    name = values.get("stage")
    if not isinstance(name, str):
        raise UsageError(f'step {number} needs stage = "..."', hint=f"stages: {', '.join(STAGES.builtin())}")
    advisory = values.get("advisory", False)
    options = {key: value for key, value in values.items() if key not in ("stage", "advisory")}
    try:
        cls = STAGES.load(name)
        if not isinstance(advisory, bool):
            raise UsageError(f"advisory is true or false, not {advisory!r}")
        if advisory and cls.writes != "evidence":
            raise UsageError(
                f"{name} makes a model, so it can't be advisory", hint="advisory is for validate and bench"
            )
        stage = cls.parse(options)
    except UsageError as error:
        raise UsageError(f"step {number} ({name}): {error.message}", hint=error.hint) from error
    return RecipeStep(_mapped(stage, lambda text: text if text.startswith("@") else _located(text, base)), advisory)


def directory_name(number: int, stage: str) -> str:
    """The directory of a step below the run's folder: 01-convert."""
    return f"{number:02d}-{stage}"


def _check_references(steps: tuple[RecipeStep, ...]) -> None:
    known: set[str] = set()
    for number, step in enumerate(steps, 1):
        for name in step.references:
            if name not in known:
                raise unknown_name(
                    f"earlier step in step {number} ({step.stage.name})", "@" + name, {"@" + k for k in known}
                )
        if step.stage.writes == "model":
            known |= {step.stage.name, directory_name(number, step.stage.name)}


def _located(text: str, base: Path) -> str:
    """A path of the recipe as an absolute one; what names no file (a package, a generator) stays as it is."""
    head, colon, rest = text.rpartition(":")
    if colon and (base / head).is_file():
        return f"{base / head}:{rest}"
    if (base / text).exists() or Path(text).suffix or "/" in text:
        return str(base / text)
    return text


def _paths(component: Component) -> list[str]:
    """The text of every option of type Path, those of chosen components included."""
    found: list[str] = []
    for item in options_of(type(component)):
        value = getattr(component, item.name)
        if isinstance(value, Component):
            found += _paths(value)
        elif item.type is Path and value is not None:
            found += [str(path) for path in (value if item.many else (value,))]
    return found


def _mapped(component: Any, change: Any) -> Any:
    """The component with every option of type Path changed, those of chosen components included."""
    changes: dict[str, Any] = {}
    for item in options_of(type(component)):
        value = getattr(component, item.name)
        if isinstance(value, Component):
            changes[item.name] = _mapped(value, change)
        elif item.type is Path and value is not None:
            changes[item.name] = (
                tuple(Path(change(str(path))) for path in value) if item.many else Path(change(str(value)))
            )
    return replace(component, **changes)
