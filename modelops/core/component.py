"""Components: options declared once, and read by Python, by the command line, by recipes and by manifests.

A component is a frozen dataclass whose fields are its options::

    class Static(Quantizer):
        ranges: Literal["minmax", "percentile"] = option("minmax", help="How activation ranges are found.")

``parse(to_dict(x)) == x`` holds for every component.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    Literal,
    Self,
    TypeAlias,
    Union,
    dataclass_transform,
    get_args,
    get_origin,
)
from typing import get_type_hints as hints

from modelops.errors import UsageError, unknown_name

if TYPE_CHECKING:
    from modelops.core.registry import Registry

AnyComponent: TypeAlias = "type[Component]"
Unit = Literal["", "fraction", "seconds", "bytes", "ratio"]
_SCALES: dict[str, dict[str, float]] = {
    "fraction": {"": 1.0, "%": 0.01},
    "seconds": {"": 1.0, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0},
    "bytes": {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "kb": 2**10, "mb": 2**20, "gb": 2**30},
    "ratio": {"": 1.0, "x": 1.0},
}


@dataclass(frozen=True)
class Option:
    """One declared option: its Python name, the type of one value, its limits and its help sentence."""

    name: str
    type: type
    help: str
    default: Any = MISSING
    many: bool = False
    optional: bool = False
    choices: tuple[str, ...] = ()
    min: float | None = None
    max: float | None = None
    unit: Unit = ""
    registry: Registry[Any] | None = None
    also: tuple[AnyComponent, ...] = ()
    fits: Callable[[AnyComponent], bool] | None = None

    def offered(self) -> list[tuple[str, AnyComponent]]:
        """The components that this choice is between, by name; empty where the option is no choice."""
        if self.registry is None:
            return []
        found = [(name, cls) for name, cls in self.registry.loadable() if self.fits is None or self.fits(cls)]
        return [*found, *((cls.name, cls) for cls in self.also)]

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def required(self) -> bool:
        return self.default is MISSING


def option(
    default: Any = MISSING,
    *,
    help: str,  # noqa: A002 - the word that users and Typer know
    min: float | None = None,  # noqa: A002
    max: float | None = None,  # noqa: A002
    unit: Unit = "",
) -> Any:
    """One option; type checkers see the default when it is given by keyword.

    With a ``unit``, text such as "1%", "60s", "5m", "2g" or "1.5x" is read too.
    """
    return field(default=default, metadata={"help": help, "min": min, "max": max, "unit": unit})


def choice(
    registry: Registry[Any],
    default: str | None = None,
    *,
    help: str,  # noqa: A002
    also: tuple[AnyComponent, ...] = (),
    fits: Callable[[AnyComponent], bool] | None = None,
) -> Any:
    """One option that picks a component of a kind by name; None lets the stage choose.

    ``also`` are components that this option alone offers. ``fits`` says which of the kind make sense here: help pages
    leave out the others, and the stage refuses them in its own words.
    """
    return field(default=default, metadata={"help": help, "registry": registry, "also": also, "fits": fits})


@dataclass_transform(field_specifiers=(option, choice), frozen_default=True, kw_only_default=True)
class Component:
    """Frozen options with one verb; each kind names its own verb."""

    name: ClassVar[str] = ""
    requires: ClassVar[tuple[str, ...]] = ()
    """Third-party packages beyond the light core; the install hint comes from here."""
    tools: ClassVar[tuple[str, ...]] = ()
    """Distributions whose version changes what the component makes; they enter the key of a step."""
    for_tests: ClassVar[bool] = False
    """Whether the component serves tests alone; help pages leave it out."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in cls.__dict__:
            cls.name = cls.__module__.rpartition(".")[2].replace("_", "-")
        dataclass(frozen=True, kw_only=True)(cls)

    def __post_init__(self) -> None:
        for item in options_of(type(self)):
            value = _coerced(item, getattr(self, item.name), type(self).name)
            object.__setattr__(self, item.name, value)

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Self:
        """The component with these options; UsageError names an unknown, missing or unfit one."""
        known = {item.name: item for item in options_of(cls)}
        given: dict[str, Any] = {}
        for key, value in values.items():
            name = str(key).replace("-", "_")
            if name not in known:
                raise unknown_name(f"option of {cls.name!r}", str(key), known)
            given[name] = value
        for name, item in known.items():
            if item.required and name not in given:
                raise UsageError(f"{cls.name} needs {item.flag}", hint=item.help)
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        """Every option with its resolved value, as JSON types."""
        return {item.name: _plain(getattr(self, item.name)) for item in options_of(type(self))}


def described(component: Component) -> dict[str, Any]:
    """A component as a recipe or a manifest writes it: its name, then its options."""
    return {"name": component.name, **component.to_dict()}


_OPTIONS: dict[type, tuple[Option, ...]] = {}


def options_of(cls: type[Component]) -> tuple[Option, ...]:
    """The options of a component class, in the order of their declaration."""
    if cls not in _OPTIONS:
        _OPTIONS[cls] = _declared(cls)
    return _OPTIONS[cls]


def _declared(cls: type[Component]) -> tuple[Option, ...]:
    annotations = hints(cls)
    found = []
    for item in dataclasses.fields(cls):  # type: ignore[arg-type]
        info = dict(item.metadata)
        base, many, optional, choices = _unpack(annotations[item.name])
        found.append(
            Option(
                name=item.name,
                type=base,
                help=info["help"],
                default=item.default,
                many=many,
                optional=optional or (info.get("registry") is not None and item.default is None),
                choices=choices,
                min=info.get("min"),
                max=info.get("max"),
                unit=info.get("unit", ""),
                registry=info.get("registry"),
                also=info.get("also", ()),
                fits=info.get("fits"),
            )
        )
    return tuple(found)


def _unpack(annotation: Any) -> tuple[type, bool, bool, tuple[str, ...]]:
    """(type of one value, many, optional, choices) of an annotation."""
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        inner = [arg for arg in get_args(annotation) if arg is not type(None)]
        if len(inner) != 1:
            raise TypeError(f"an option has one type, or one type and None: {annotation}")
        base, many, _, choices = _unpack(inner[0])
        return base, many, True, choices
    if origin is tuple:
        base, _, _, choices = _unpack(get_args(annotation)[0])
        return base, True, False, choices
    if origin is Literal:
        return str, False, False, tuple(get_args(annotation))
    if isinstance(annotation, type):
        return annotation, False, False, ()
    raise TypeError(f"no option can have the type {annotation}")


def _plain(value: Any) -> Any:
    if isinstance(value, Component):
        return described(value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


def _coerced(item: Option, value: Any, owner: str) -> Any:
    """The value as its declared type; UsageError says what is wrong with it."""
    if value is None:
        if item.optional:
            return None
        raise UsageError(f"{item.flag} of {owner} needs a value", hint=item.help)
    if item.registry is not None:
        return _component(item.registry, value, item.also)
    if item.many:
        if isinstance(value, str) or not isinstance(value, (list, tuple)):
            value = (value,)
        if item.type in (int, float):  # several numbers may be one text: "1,2,4"
            value = [part for entry in value for part in (entry.split(",") if isinstance(entry, str) else (entry,))]
        return tuple(_single(item, entry) for entry in value)
    return _single(item, value)


def _component(registry: Registry[Any], value: Any, also: tuple[AnyComponent, ...] = ()) -> Component:
    if isinstance(value, Component):
        return value
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        raise UsageError(f"a choice of {registry.noun} is a name, or a table with a name, not {value!r}")
    rest = {key: entry for key, entry in value.items() if key != "name"}
    own = next((cls for cls in also if cls.name == value["name"]), None)
    parsed: Component = (own or registry.load(value["name"])).parse(rest)
    return parsed


def _single(item: Option, value: Any) -> Any:
    if item.type is bool:
        if not isinstance(value, bool):
            raise UsageError(f"{item.flag} is true or false, not {value!r}")
        return value
    if item.type in (int, float):
        return _number(item, value)
    if item.type is Path:
        if not isinstance(value, (str, Path)) or not str(value) or "\0" in str(value):
            raise UsageError(f"{item.flag} is a path, not {value!r}")
        return Path(value)
    if not isinstance(value, str):
        raise UsageError(f"{item.flag} is a text, not {value!r}")
    if item.choices and value not in item.choices:
        raise unknown_name(f"value for {item.flag}", value, item.choices)
    return value


def _number(item: Option, value: Any) -> float:
    if isinstance(value, str):
        value = _measured(item, value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UsageError(f"{item.flag} is a number, not {value!r}")
    if not _finite(value):
        raise UsageError(f"{item.flag} is a finite number, not {value if isinstance(value, float) else 'one so large'}")
    if item.type is int and not float(value).is_integer():
        raise UsageError(f"{item.flag} is a whole number, not {value!r}")
    number: float = int(value) if item.type is int else float(value)
    if item.min is not None and number < item.min:
        raise UsageError(f"{item.flag} is {number}; the least is {item.min}")
    if item.max is not None and number > item.max:
        raise UsageError(f"{item.flag} is {number}; the most is {item.max}")
    return number


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that no float can hold
        return False


def _measured(item: Option, text: str) -> float | int:
    """A number with its unit: "1%", "60s", "2g", "1.5x"."""
    match = re.fullmatch(r"\s*([-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?)\s*([a-zA-Z%]*)\s*", text)
    scales = _SCALES.get(item.unit, {"": 1.0})
    if match is None or match[2].lower() not in scales:
        units = ", ".join(unit for unit in scales if unit)
        hint = f"write a number{f', with one of these units if you like: {units}' if units else ''}"
        raise UsageError(f"{item.flag} can't be {text!r}", hint=hint)
    if not match[2] and re.fullmatch(r"[-+]?\d{1,400}", match[1]):
        return int(match[1])
    # 1% is the float nearest to 0.01, not 1 * 0.01 with its rounding, so that a manifest shows what was meant.
    return round(float(match[1]) * scales[match[2].lower()], 12)
