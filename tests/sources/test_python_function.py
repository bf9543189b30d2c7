from __future__ import annotations

import hashlib
import sys

import pytest
import torch

from modelops.errors import StageFailed, UsageError
from modelops.sources import Request, detect
from modelops.sources._user_code import locate
from modelops.sources.python_function import PythonFunction

NET = "import torch\n\ndef build():\n    return torch.nn.Linear(4, 2), torch.ones(2, 4)\n"


@pytest.fixture(autouse=True)
def _fresh_imports(monkeypatch, tmp_path):
    """Modules and paths that a test's sources bring in go with the test."""
    before = set(sys.modules)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", sys.dont_write_bytecode)
    monkeypatch.chdir(tmp_path)
    yield
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def _open(spec: str, **request):
    return PythonFunction().open(spec, Request(**request))


def _returning(tmp_path, expression: str) -> str:
    (tmp_path / "net.py").write_text(
        f"import torch\nclass Net(torch.nn.Module):\n    def forward(self, x, scale=1): return x\n"
        f"    ...\nx = torch.ones(2, 4)\ndef build(): return {expression}\n"
    )
    return "net.py:build"


def test_a_function_in_a_file_gives_the_module_and_its_inputs(tmp_path):
    (tmp_path / "net.py").write_text(NET)
    loaded = _open("net.py:build")
    assert isinstance(loaded.module, torch.nn.Linear) and not loaded.module.training
    assert loaded.args[0].shape == (2, 4)
    assert loaded.notes == ("the module was in training mode: it was put in eval mode",)
    (entry,) = loaded.code_executed
    assert entry == {"path": str(tmp_path / "net.py"), "sha256": hashlib.sha256(NET.encode()).hexdigest()}


@pytest.mark.parametrize(
    ("expression", "args", "kwargs"),
    [
        ("Net()", 0, set()),
        ("Net(), x", 1, set()),
        ("Net(), (x, x)", 2, set()),
        ("Net(), [x]", 1, set()),
        ("Net(), {'x': x}", 0, {"x"}),
        ("Net(), {'image': x}", 1, set()),
        ("(Net(), (x,), {'scale': 2})", 1, {"scale"}),
    ],
)
def test_what_a_function_may_return(tmp_path, expression, args, kwargs):
    loaded = _open(_returning(tmp_path, expression))
    assert (len(loaded.args), set(loaded.kwargs)) == (args, kwargs)


@pytest.mark.parametrize("expression", ["3", "None", "()", "(x, Net())", "(Net(), x, x, x)", "(Net(), x, {})"])
def test_what_a_function_may_not_return_is_said(tmp_path, expression):
    with pytest.raises(StageFailed, match="returned") as caught:
        _open(_returning(tmp_path, expression))
    assert caught.value.hint == "return a torch module, (module, inputs), or (module, args, kwargs)"


def test_a_module_object_is_taken_as_it_is(tmp_path):
    (tmp_path / "net.py").write_text("import torch\nmodel = torch.nn.Linear(4, 2)\n")
    assert isinstance(_open("net.py:model").module, torch.nn.Linear)


def test_a_package_is_found_from_the_current_folder(tmp_path):
    package = tmp_path / "zoo" / "nets"
    package.mkdir(parents=True)
    (tmp_path / "zoo" / "__init__.py").write_text("")
    (package / "__init__.py").write_text("from .parts import layer\n")
    (package / "parts.py").write_text("import torch\ndef layer(): return torch.nn.Linear(4, 2)\n")
    loaded = _open("zoo.nets:layer")
    assert isinstance(loaded.module, torch.nn.Linear)
    executed = {entry["path"] for entry in loaded.code_executed}
    assert executed == {str(tmp_path / "zoo" / name) for name in ("__init__.py", "nets/__init__.py", "nets/parts.py")}


def test_the_key_covers_what_is_imported_from_beside_the_file_without_running_it(tmp_path):
    (tmp_path / "train.py").write_text("import helpers\nfrom parts import blocks\nimport torch, json\n1/0\n")
    (tmp_path / "helpers.py").write_text("def late():\n    import deep\n")
    (tmp_path / "deep.py").write_text("")
    (tmp_path / "unrelated.py").write_text("")
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "__init__.py").write_text("")
    (tmp_path / "parts" / "blocks.py").write_text("from . import more\n")
    (tmp_path / "parts" / "more.py").write_text("")
    found = PythonFunction().inputs("train.py:build")
    assert found.pop("source") == tmp_path / "train.py"
    names = {"helpers.py", "deep.py", "parts/__init__.py", "parts/blocks.py", "parts/more.py"}
    assert found == {f"source module {name}": tmp_path / name for name in names}


def test_a_file_may_be_called_like_a_module_that_is_loaded(tmp_path):
    (tmp_path / "json.py").write_text(NET)
    assert isinstance(_open("json.py:build").module, torch.nn.Linear)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "def build():\n    raise ValueError('no data set')\n",
            r"ValueError: no data set \(net.py, line 2, in build\)",
        ),
        ("def build():\n    import nowhere\n", r"No module named 'nowhere' \(net.py, line 2, in build\)"),
        ("def build(:\n", r"SyntaxError: .*\(net.py, line 1\)"),
        ("raise SystemExit(3)\n", r"SystemExit: 3 \(net.py, line 1, in <module>\)"),
        ("import json\ndef build():\n    json.loads('{')\n", r"JSONDecodeError: .*\(net.py, line 3, in build\)"),
        ("def build(size): pass\n", "missing 1 required positional argument: 'size'"),
    ],
)
def test_a_failure_in_user_code_names_its_last_line_there(tmp_path, text, said):
    (tmp_path / "net.py").write_text(text)
    with pytest.raises(StageFailed, match=said):
        _open("net.py:build")


def test_names_that_are_not_there_are_usage_errors(tmp_path):
    (tmp_path / "net.py").write_text(NET)
    with pytest.raises(UsageError) as caught:
        _open("net.py:biuld")
    assert caught.value.hint == "did you mean 'build'?"
    with pytest.raises(UsageError, match=r"no such file: ne\.py") as caught:
        locate("ne.py:build")
    assert caught.value.hint == "did you mean net.py?"
    with pytest.raises(UsageError, match=r"no module 'nowhere\.at_all'"):
        locate("nowhere.at_all:build")
    (tmp_path / "data.py").write_text("table = {}\n")
    with pytest.raises(UsageError, match="is dict, not a function"):
        _open("data.py:table")


@pytest.mark.parametrize("spec", ["net.py:build", "sub/net.py:build", "zoo.nets:layer", "zoo:layer"])
def test_functions_are_detected_by_their_form(spec):
    assert detect(spec).name == "python-function"


@pytest.mark.parametrize("around", ["torch.compile", "torch.nn.DataParallel"])
def test_a_module_is_taken_out_of_what_is_around_it(tmp_path, around):
    (tmp_path / "net.py").write_text(f"import torch\ndef build(): return {around}(torch.nn.Linear(4, 2))\n")
    loaded = _open("net.py:build")
    assert type(loaded.module) is torch.nn.Linear
    assert any(around.rpartition(".")[2] in note for note in loaded.notes)
