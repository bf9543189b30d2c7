"""A component is registered by being there, and a plugin by its entry point."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from modelops.cli.commands import doctor
from modelops.cli.main import run
from modelops.core.component import Component
from modelops.core.machine import installed
from modelops.core.registry import Registry, require
from modelops.errors import EnvironmentMissing, UsageError
from modelops.quantizers import REGISTRY, Quantizer


def test_names_come_from_files_and_entry_points_without_importing_them() -> None:
    sys.modules.pop("modelops_test_plugin.halves", None)
    names = REGISTRY.names()
    assert {"static", "dynamic", "weights", "halves"} <= set(names)
    assert not any(name.startswith("_") for name in names)
    assert "modelops_test_plugin.halves" not in sys.modules


def test_a_plugin_loads_like_any_other() -> None:
    cls = REGISTRY.load("halves")
    assert issubclass(cls, Quantizer) and cls.name == "halves"
    # Another version of the plugin is another key.
    assert any(installed(tool) for tool in cls.tools)


def test_an_unknown_name_gets_the_nearest_one() -> None:
    with pytest.raises(UsageError) as caught:
        REGISTRY.load("dinamic")
    assert "dynamic" in caught.value.hint


@pytest.mark.parametrize(
    ("body", "error", "message"),
    [
        ("x = 1", UsageError, "exactly one Quantizer, found 0"),
        (
            "from modelops.quantizers import Quantizer\nclass A(Quantizer): pass\nclass B(Quantizer): pass",
            UsageError,
            "exactly one Quantizer, found 2",
        ),
        ("import no_such_package_at_all", EnvironmentMissing, "can't be imported"),
        ("1 / 0", EnvironmentMissing, "ZeroDivisionError"),
    ],
)
def test_a_plugin_that_breaks_the_contract_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, error: type[Exception], message: str
) -> None:
    install_odd_plugin(tmp_path, monkeypatch, body)
    registry: Registry[Quantizer] = Registry("modelops.quantizers", lambda: Quantizer)
    with pytest.raises(error, match=message):
        registry.load("odd")
    # Everything else of the kind goes on working.
    assert {"static", "dynamic"} <= {name for name, _ in registry.loadable()} and "odd" in registry.names()
    assert "odd" not in {name for name, _ in registry.loadable()}


def install_odd_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """A distribution on the path that names a quantizer called odd."""
    info = tmp_path / "odd-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: odd\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[modelops.quantizers]\nodd = odd_plugin\n")
    (tmp_path / "odd_plugin.py").write_text(body + "\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "odd_plugin", raising=False)


def test_a_broken_plugin_fails_where_it_is_asked_for_and_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install_odd_plugin(tmp_path, monkeypatch, "import no_such_package_at_all")
    assert run(["quantize", "--help"]) == 0
    assert run(["quantize", "in", "out", "--method", "odd"]) == 7
    assert "odd" in capsys.readouterr().err
    assert any("odd" in warning for warning in doctor.facts()["warnings"])


def test_a_missing_package_is_named_with_the_pip_command() -> None:
    class Wants(Component):
        """Wants something."""

        requires = ("no_such_package", "torch")

    with pytest.raises(EnvironmentMissing, match="no_such_package") as caught:
        require(Wants)
    assert "pip install" in caught.value.hint
