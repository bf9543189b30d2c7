"""JUnit XML for Jenkins, GitLab and their like: a test suite for each stage, a test case for each check.

=============  ===================================================================
failure        a check failed, or could not be decided
error          the stage ended in an error before it could judge
skipped        a check was not evaluated, or did not hold in an advisory run
=============  ===================================================================

Figures are properties of their suite.
"""

from __future__ import annotations

from xml.etree import ElementTree

from modelops.renderers import Renderer
from modelops.renderers._common import (
    Document,
    checks,
    figure,
    is_run,
    measured,
    metrics,
    notes,
    outcome,
    own_error,
    sentence,
    steps,
    visible,
)


class Junit(Renderer):
    """JUnit XML in the form that Jenkins' schema describes."""

    def render(self, document: Document) -> str:
        """One document; every name in it is printable text, so no character in it is illegal in XML."""
        root = ElementTree.Element("testsuites", name="modelops")
        for step in steps(document):
            root.append(_suite(step))
        error = own_error(document)
        if error and is_run(document):
            suite = ElementTree.SubElement(root, "testsuite", name=visible(document.get("command") or "modelops"))
            _crash(suite, document, error)
            _count(suite)
        _count(root)
        ElementTree.indent(root)
        text = ElementTree.tostring(root, encoding="unicode")
        return f'<?xml version="1.0" encoding="UTF-8"?>\n{text}\n'


def _suite(document: Document) -> ElementTree.Element:
    suite = ElementTree.Element("testsuite", name=visible(document.get("command") or "modelops"))
    if document.get("seconds") is not None:
        suite.set("time", f"{document['seconds']:.3f}")
    _properties(suite, document)
    for check in checks(document):
        _case(suite, document, check)
    error = document.get("error")
    if error and outcome(document) != "fail":
        _crash(suite, document, error)
    elif not checks(document):
        ElementTree.SubElement(suite, "testcase", _named(document, "completed"))
    lines = [*notes(document)]
    if document.get("reused"):
        lines.insert(0, f"reused: {document['reused']}")
    if lines:
        ElementTree.SubElement(suite, "system-out").text = "\n".join(f"- {visible(line)}" for line in lines)
    _count(suite)
    return suite


def _properties(suite: ElementTree.Element, document: Document) -> None:
    found = [(str(item["name"]), " ".join(part for part in measured(item) if part)) for item in metrics(document)]
    for end in ("source", "target"):
        if document.get(end):
            found += [(f"{end}_{key}", document[end][key]) for key in ("path", "id") if document[end].get(key)]
    if document.get("peak_memory_bytes") is not None:
        found.append(("peak_memory", figure(document["peak_memory_bytes"], "bytes")))
    if found:
        properties = ElementTree.SubElement(suite, "properties")
        for name, value in found:
            ElementTree.SubElement(properties, "property", name=visible(name), value=visible(value))


def _case(suite: ElementTree.Element, document: Document, check: Document) -> None:
    case = ElementTree.SubElement(suite, "testcase", _named(document, check["name"]))
    verdict, told = str(check.get("verdict")), sentence(check)
    if verdict == "pass":
        return
    if verdict == "not-evaluated":
        ElementTree.SubElement(case, "skipped", message=told or "not evaluated")
    elif document.get("advisory"):
        ElementTree.SubElement(case, "skipped", message=f"advisory: {verdict}: {told}")
    else:
        ElementTree.SubElement(case, "failure", type=verdict, message=told).text = _facts(check)


def _facts(check: Document) -> str:
    parts = [f"{key}: {visible(check[key])}" for key in ("value", "threshold", "n") if check.get(key) not in (None, "")]
    return "\n".join(parts)


def _crash(suite: ElementTree.Element, document: Document, error: Document) -> None:
    code = str(error.get("code") or "error")
    case = ElementTree.SubElement(suite, "testcase", _named(document, code))
    message = visible(error.get("message") or code)
    found = ElementTree.SubElement(case, "error", type=visible(code), message=message)
    found.text = visible(error.get("hint") or "")


def _named(document: Document, name: object) -> dict[str, str]:
    return {"classname": f"modelops.{visible(document.get('command') or 'modelops')}", "name": visible(name)}


def _count(element: ElementTree.Element) -> None:
    cases = list(element.iter("testcase"))
    for count, tag in (("tests", None), ("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
        element.set(count, str(sum(1 for case in cases if tag is None or case.find(tag) is not None)))
    if element.tag == "testsuites":
        del element.attrib["skipped"]  # Jenkins' schema knows it on suites alone
