"""Run a recipe: every stage in turn, reusing what is unchanged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from modelops.cli.options import COMMON, argument, shaped, shell_from
from modelops.core.artifact import Artifact
from modelops.errors import ModelOpsError, UsageError
from modelops.pipeline import Outcome, run_recipe
from modelops.recipe import Recipe

_DOC = """Run a recipe: each step into a directory of its own, reusing every step whose work is unchanged.

Stops at the first failed gate, and ends with one table over the whole chain. With --like, the history of an artifact
is the recipe, and SOURCE what it is replayed on.
"""


def command() -> Callable[..., int]:
    """The function that Typer turns into ``modelops run``."""
    import inspect

    def flag(name: str, names: list[str], metavar: str, text: str) -> inspect.Parameter:
        info = typer.Option(*names, metavar=metavar, help=text, show_default=False)
        return inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[str | None, info]
        )

    own = [
        argument("recipe", "RECIPE.toml", "The recipe; with --like, the source to replay the history on."),
        flag("out", ["--out"], "DIR", "Where the steps are written. Default: the folder out beside the recipe."),
        flag("like", ["--like"], "ARTIFACT", "Replay this artifact's history on the source given as argument."),
    ]
    shared = [item for name, item in COMMON.items() if name not in ("force", "advisory")]
    return shaped(_body, "run", _DOC, [*own, *shared])


def _body(values: dict[str, Any]) -> int:
    shell = shell_from("run", values)
    try:
        recipe, out = _recipe(values)

        def on_step(outcome: Outcome) -> None:
            if shell.verbose and not shell.json:
                typer.echo(f"{outcome.stage}: {outcome.reused or outcome.report.verdict}", err=True)

        with shell.surroundings() as surroundings:
            outcome = run_recipe(recipe, out, surroundings=surroundings, on_step=on_step)
    except ModelOpsError as error:
        return shell.fail(error)
    return shell.show(outcome.document())


def _recipe(values: dict[str, Any]) -> tuple[Recipe, Path]:
    if values["like"] is not None:
        if values["out"] is None:
            raise UsageError("--like needs --out", hint="modelops run --like ARTIFACT SOURCE --out DIR")
        return Recipe.like(Artifact.open(values["like"]).manifest, values["recipe"]), Path(values["out"])
    path = Path(values["recipe"])
    recipe = Recipe.read(path)
    return recipe, Path(values["out"]) if values["out"] else path.absolute().parent / "out"
