"""A source opened for the backends that run source models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from modelops.backends import Module
from modelops.core.registry import require
from modelops.errors import UsageError
from modelops.sources import Request, detect


def open_module(spec: str) -> tuple[Module, Sequence[Mapping[str, str]]]:
    """The model that the text names, and the user's files that ran to build it.

    Its inputs and outputs have the names that ``convert`` gives them. UsageError for a source without example inputs,
    and for one of another framework.
    """
    from modelops.stages._eager import Eager

    source = detect(spec)
    if source.framework != "torch":
        raise UsageError(f"{spec} is no torch model but a source of the form {source.name}", hint="convert it first")
    require(type(source))
    loaded = source.open(spec, Request())
    if not loaded.args and not loaded.kwargs:
        raise UsageError(f"{spec} gives no example inputs", hint="return (module, inputs) from the function")
    eager = Eager(loaded.module, loaded.args, loaded.kwargs, loaded.input_names)
    eager.probe(eager.feed())
    flat, names = eager.flat, tuple(eager.input_names)
    module = Module(flat, lambda feed: flat(*(feed[name] for name in names)), names, tuple(eager.output_names))
    return module, loaded.code_executed
