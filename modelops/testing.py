"""What authors of plugins call: the promises that every component keeps, checked."""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path

from modelops.core.component import Component, Option, described, options_of
from modelops.errors import ModelOpsError, UsageError

_HEAVY = [
    "numpy",
    "onnx",
    "onnx_ir",
    "onnxruntime",
    "onnxscript",
    "onnxsim",
    "onnxslim",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "openvino",
    "sklearn",
    "skl2onnx",
    "PIL",
    "matplotlib",
]


def check_component(cls: type[Component]) -> None:
    """AssertionError, with the promise that is broken, unless the component keeps them all.

    It has a docstring and a verb of its own; every option has a help sentence; its options survive a manifest; an
    unknown option is refused; its module imports no heavy package before it is used.
    """
    assert inspect.getdoc(cls), f"{cls.__name__} needs a docstring"
    verbs = [name for name, value in vars(cls).items() if inspect.isfunction(value) and not name.startswith("_")]
    assert verbs, f"{cls.__name__} defines no method of its kind"
    for item in options_of(cls):
        _check_option(cls, item)
    required = {item.name: _example(item) for item in options_of(cls) if item.required}
    component = cls.parse(required)
    assert cls.parse(component.to_dict()) == component, f"{cls.__name__} does not survive its own dictionary"
    assert described(component)["name"] == cls.name
    try:
        cls.parse({**required, "no_such_option": 1})
    except UsageError:
        pass
    else:
        raise AssertionError(f"{cls.__name__} accepts an unknown option")
    assert not (heavy := _heavy_imports(cls)), f"{cls.__module__} imports {', '.join(heavy)} at module level"


def _check_option(cls: type[Component], item: Option) -> None:
    where = f"{cls.__name__}.{item.name}"
    assert item.help, f"{where} needs a help sentence"
    assert item.help.rstrip()[-1] in ".?", f"the help of {where} is no sentence: {item.help!r}"
    if item.min is not None:
        try:
            cls.parse({item.name: item.min - 1})
        except ModelOpsError:
            return
        raise AssertionError(f"{where} accepts less than its least value")


def _example(item: Option) -> object:
    if item.choices:
        return item.choices[0]
    if item.type in (int, float):
        return item.min if item.min is not None else 1
    return "example"


def _heavy_imports(cls: type[Component]) -> list[str]:
    source = Path(inspect.getfile(importlib.import_module(cls.__module__))).read_text(encoding="utf-8")
    found: set[str] = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return sorted(found & set(_HEAVY))
