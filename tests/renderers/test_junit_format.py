from __future__ import annotations

from xml.etree import ElementTree

from report_documents import FAILED, GOOD, HOSTILE, document, error, hostile

from modelops.renderers.junit import Junit

# What Jenkins' schema (junit-10.xsd) allows: attributes, and children in their order.
SCHEMA: dict[str, tuple[set[str], list[str]]] = {
    "testsuites": ({"name", "time", "tests", "failures", "disabled", "errors"}, ["testsuite"]),
    "testsuite": (
        {
            "name",
            "tests",
            "failures",
            "errors",
            "time",
            "disabled",
            "skipped",
            "timestamp",
            "hostname",
            "id",
            "package",
        },
        ["properties", "testcase", "system-out", "system-err"],
    ),
    "properties": (set(), ["property"]),
    "property": ({"name", "value"}, []),
    "testcase": (
        {"name", "assertions", "time", "classname", "status"},
        ["skipped", "error", "failure", "system-out", "system-err"],
    ),
    "skipped": ({"type", "message"}, []),
    "error": ({"type", "message"}, []),
    "failure": ({"type", "message"}, []),
    "system-out": (set(), []),
}


def render(value: object) -> ElementTree.Element:
    root = ElementTree.fromstring(Junit.parse({}).render(value))  # type: ignore[arg-type]
    conforms(root)
    return root


def conforms(element: ElementTree.Element) -> None:
    attributes, children = SCHEMA[element.tag]
    assert set(element.attrib) <= attributes
    ranks = [children.index(child.tag) for child in element]
    assert ranks == sorted(ranks)
    for child in element:
        conforms(child)


def outcomes(root: ElementTree.Element) -> dict[str, str]:
    return {case.get("name", ""): case[0].tag if len(case) else "pass" for case in root.iter("testcase")}


def test_each_verdict_has_its_element() -> None:
    root = render(document(FAILED))
    assert outcomes(root) == {"first": "pass", "numerics": "failure", "speed": "failure", "labels": "skipped"}
    suite = root[0]
    assert [suite.get(key) for key in ("tests", "failures", "errors", "skipped")] == ["4", "2", "0", "1"]


def test_an_error_is_no_failure() -> None:
    root = render(document(exit_code=4, error=error()))
    assert outcomes(root) == {"input-refused": "error"}
    assert root.get("errors") == "1"


def test_a_failed_gate_is_no_error() -> None:
    root = render(document(FAILED, error=error("gate-failed", 1)))
    assert root.get("errors") == "0"


def test_an_advisory_run_fails_no_test_case() -> None:
    root = render(document(FAILED, advisory=True, exit_code=0))
    assert outcomes(root)["speed"] == "skipped"
    assert root.get("failures") == "0"


def test_a_stage_without_checks_is_one_passed_test_case() -> None:
    assert outcomes(render(document())) == {"completed": "pass"}


def test_figures_are_properties() -> None:
    found = {item.get("name"): item.get("value") for item in render(document(GOOD)).iter("property")}
    assert found["ratio"] == "1.214x 1.180x to 1.250x at 99 %, n=8"
    assert found["target_id"] == "b" * 64


def test_a_run_has_a_suite_for_each_stage_and_one_for_its_own_error() -> None:
    run = document(command="run", exit_code=2, error=error("usage", 2), steps=[document(GOOD), document(FAILED)])
    root = render(run)
    assert [suite.get("name") for suite in root] == ["quantize", "quantize", "run"]
    assert (root.get("tests"), root.get("failures"), root.get("errors")) == ("6", "2", "1")


def test_hostile_text_is_well_formed_xml() -> None:
    assert len(render(hostile())) == len(HOSTILE) + 1
