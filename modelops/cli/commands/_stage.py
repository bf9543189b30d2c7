"""The command of a stage: built from its options, run through the pipeline."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from modelops.cli.options import COMMON, argument, flags_of, parameter, shaped, shell_from, stage_from
from modelops.errors import ModelOpsError
from modelops.pipeline import run_stage
from modelops.stages import REGISTRY, Stage


def command(name: str) -> Callable[..., int]:
    """The function that Typer turns into ``modelops NAME``."""
    cls = REGISTRY.load(name)

    def body(values: dict[str, Any]) -> int:
        shell = shell_from(name, values)
        try:
            stage = stage_from(cls, values)
            with shell.surroundings() as surroundings:
                outcome = run_stage(
                    stage,
                    values["source_"],
                    values["target_"],
                    force=bool(values.get("force")),
                    advisory=bool(values.get("advisory")),
                    surroundings=surroundings,
                )
        except ModelOpsError as error:
            return shell.fail(error)
        return shell.show(outcome.document())

    return shaped(
        body, name, inspect.getdoc(cls) or "", [*_arguments(cls), *map(parameter, flags_of(cls)), *_shared(cls)]
    )


def _arguments(cls: type[Stage]) -> list[inspect.Parameter]:
    if cls.reads == "source":
        source = argument(
            "source_", "SOURCE", "The model: a Hugging Face directory, file.py:function, or an .onnx file."
        )
    else:
        source = argument("source_", "IN", "A model artifact, or a bare .onnx file.")
    if cls.writes == "evidence":
        return [
            source,
            argument("target_", "[OUT]", "Where to write the evidence; left out, none is kept.", optional=True),
        ]
    return [source, argument("target_", "OUT", "The artifact directory to write.")]


def _shared(cls: type[Stage]) -> list[inspect.Parameter]:
    return [item for name, item in COMMON.items() if name != "advisory" or cls.writes == "evidence"]
