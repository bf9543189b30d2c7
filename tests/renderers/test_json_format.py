from __future__ import annotations

import json
from math import inf, nan

from report_documents import FAILED, document, hostile

from modelops.renderers.json import Json


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


def test_the_document_comes_back_exactly() -> None:
    value = document(FAILED)
    assert json.loads(Json.parse({}).render(value)) == value


def test_numbers_that_json_does_not_have_are_null() -> None:
    text = Json.parse({}).render({"values": [nan, inf, -inf, 1.5], "nested": {"a": nan}})
    assert json.loads(text, parse_constant=refuse) == {"values": [None, None, None, 1.5], "nested": {"a": None}}


def test_only_ascii_is_written_and_every_string_survives() -> None:
    text = Json.parse({}).render(hostile())
    assert text.isascii()
    assert "\x1b" not in text
    names = [step["report"]["checks"][0]["name"] for step in json.loads(text)["steps"]]
    assert names == [step["report"]["checks"][0]["name"] for step in hostile()["steps"]]


def test_one_line_can_be_asked_for() -> None:
    assert Json.parse({"indent": 0}).render(document(FAILED)).count("\n") == 1
