"""Every component of every kind keeps the same promises: a new file is tested by being there."""

from __future__ import annotations

import importlib

import pytest

from modelops.core.component import Component, options_of
from modelops.core.registry import Registry
from modelops.testing import check_component

KINDS = ("stages", "sources", "datasets", "simplifiers", "quantizers", "pruners", "backends", "renderers")


def registry(kind: str) -> Registry[Component]:
    found: Registry[Component] = importlib.import_module(f"modelops.{kind}").REGISTRY
    return found


EVERY = [(kind, name) for kind in KINDS for name in registry(kind).names()]


@pytest.mark.parametrize(("kind", "name"), EVERY, ids=[f"{kind}/{name}" for kind, name in EVERY])
def test_the_component_keeps_every_promise(kind: str, name: str) -> None:
    cls = registry(kind).load(name)
    check_component(cls)
    assert cls.name == name


def test_every_kind_has_components_and_the_plugin_is_among_them() -> None:
    assert {kind for kind, _ in EVERY} == set(KINDS)
    assert ("quantizers", "halves") in EVERY


@pytest.mark.parametrize("name", registry("stages").names())
def test_no_flag_of_a_stage_hides_another(name: str) -> None:
    from modelops.cli.options import COMMON, flags_of

    cls = registry("stages").load(name)
    flags = flags_of(cls)  # type: ignore[arg-type]
    names = [flag.parameter for flag in flags]
    assert len(set(names)) == len(names)
    assert not set(names) & set(COMMON)
    assert {item.name for item in options_of(cls)} <= set(names)
