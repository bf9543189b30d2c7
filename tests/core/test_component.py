"""Options are declared once, checked once, and survive the manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest

from modelops.core.component import Component, option, options_of
from modelops.errors import UsageError


class Brew(Component):
    strength: Literal["weak", "strong"] = option(default="weak", help="How strong.")
    cups: int = option(default=2, help="How many.", min=1, max=9)
    sugar: float = option(default=0.01, help="How sweet.", unit="fraction")
    wait: float = option(default=60.0, help="How long.", unit="seconds")
    faster: float | None = option(default=None, help="Speed-up.", unit="ratio")
    room: int = option(default=1024, help="Space.", unit="bytes")
    beans: Path | None = option(default=None, help="Where from.")
    extras: tuple[str, ...] = option(default=(), help="What else.")
    iced: bool = option(default=False, help="Cold.")


def test_options_survive_their_dictionary() -> None:
    brew = Brew(strength="strong", cups=3, beans=Path("b"), extras=("milk",), faster=1.5)
    assert Brew.parse(brew.to_dict()) == brew
    assert Brew.parse(Brew().to_dict()) == Brew()


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("sugar", "1%", 0.01), ("sugar", "0.2", 0.2), ("wait", "5m", 300.0), ("wait", "250ms", 0.25),
        ("faster", "1.5x", 1.5), ("room", "2k", 2048), ("cups", "3", 3), ("wait", 7, 7.0),
    ],
)  # fmt: skip
def test_values_are_read_with_their_units(name: str, text: object, value: float) -> None:
    assert getattr(Brew.parse({name: text}), name) == value


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"cups": 0}, "least"), ({"cups": 10}, "most"), ({"cups": "many"}, "--cups"), ({"cups": 1.5}, "whole"),
        ({"cups": True}, "number"), ({"sugar": "1s"}, "--sugar"), ({"sugar": float("nan")}, "finite"),
        ({"strength": "stron"}, "stron"), ({"iced": "yes"}, "true or false"), ({"beans": ""}, "path"),
        ({"cups": 10**400}, "finite"), ({"cups": "9" * 400}, "finite"), ({"wait": "9" * 5000}, "finite"),
        ({"cup": 1}, "cup"), ({"strength": 3}, "text"), ({"cups": None}, "needs a value"),
    ],
)  # fmt: skip
def test_a_bad_value_is_one_usage_error_that_names_the_option(values: dict[str, object], word: str) -> None:
    with pytest.raises(UsageError, match=word):
        Brew.parse(values)


def test_an_unknown_option_names_the_nearest_one() -> None:
    with pytest.raises(UsageError) as caught:
        Brew.parse({"strengt": "weak"})
    assert "strength" in caught.value.hint


def test_components_are_frozen() -> None:
    with pytest.raises(AttributeError):
        Brew().cups = 4  # type: ignore[misc]


def test_every_option_is_described_in_the_order_of_its_declaration() -> None:
    assert [item.name for item in options_of(Brew)][:3] == ["strength", "cups", "sugar"]
    assert options_of(Brew)[0].choices == ("weak", "strong")
