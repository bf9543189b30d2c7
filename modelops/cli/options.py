"""From a component's options to flags, and back: nothing here knows any stage by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from modelops.cli.shell import Shell
from modelops.core.component import Component, Option, option, options_of
from modelops.errors import UsageError
from modelops.stages import Stage

REPORTING = "Reporting"
RUNNING = "Running"


@dataclass(frozen=True)
class Flag:
    """One flag: where its value goes, and which components it belongs to (none: the stage itself)."""

    parameter: str
    option: Option
    choice: str = ""
    owners: tuple[str, ...] = ()
    for_tests: bool = False
    everyone: bool = False
    """Whether all components that can be chosen there have it."""

    @property
    def text(self) -> str:
        return "--" + self.parameter.replace("_", "-")


def flags_of(cls: type[Stage]) -> list[Flag]:
    """Every flag of a stage: its own options, then those of the components that it can choose."""
    own = options_of(cls)
    flags = [Flag(item.name, item) for item in own]
    taken = {item.name for item in own} | set(COMMON)
    seen: set[int] = set()
    for item in own:
        if item.registry is None:
            continue
        # A second choice of the same kind (--against-backend) prefixes its components' flags (--against-threads), but
        # for those that the first one has not (--compile).
        prefix = item.name.removesuffix(item.registry.noun) if id(item.registry) in seen else ""
        seen.add(id(item.registry))
        flags += _component_flags(item, prefix, taken)
    return flags


def _component_flags(item: Option, prefix: str, taken: set[str]) -> list[Flag]:
    """The flags of all components of a kind; the same option of several components is one flag."""
    found: dict[str, Flag] = {}
    for name, cls in item.offered():
        for inner in options_of(cls):
            flag = inner.name if inner.name not in taken else prefix + inner.name
            same = found.get(flag)
            if same is not None and (same.option.type, same.option.many) == (inner.type, inner.many):
                owners = (*same.owners, name)
                found[flag] = Flag(flag, same.option, item.name, owners, same.for_tests and cls.for_tests)
                continue
            if same is not None or flag in taken:
                flag = f"{prefix}{name.replace('-', '_')}_{inner.name}"
            found[flag] = Flag(flag, inner, item.name, (name,), cls.for_tests)
    taken.update(found)
    everyone = {name for name, cls in item.offered() if not cls.for_tests}
    return [replace(flag, everyone=everyone <= set(flag.owners)) for flag in found.values()]


def panel(flag: Flag) -> str:
    """The heading of a help page under which the flag of a component stands: which choices it is for."""
    choice = f"--{flag.choice.replace('_', '-')}"
    if flag.everyone and len(flag.owners) > 1:
        return f"With every {choice}"
    *first, last = flag.owners
    others = f"{', '.join(first)} or " if first else ""
    return f"With {choice} {others}{last}"


def stage_from(cls: type[Stage], values: Mapping[str, Any]) -> Stage:
    """The stage that these flag values ask for; a flag of a component that was not chosen is refused."""
    options: dict[str, Any] = {}
    nested: dict[str, dict[str, Any]] = {}
    for flag in flags_of(cls):
        value = values.get(flag.parameter)
        if value is None or (flag.option.many and not value):
            continue
        if not flag.choice:
            options[flag.option.name] = value
            continue
        item = next(item for item in options_of(cls) if item.name == flag.choice)
        chosen = values.get(flag.choice) or item.default
        if chosen not in flag.owners:
            names = " or ".join(f"{item.flag} {name}" for name in flag.owners)
            raise UsageError(f"{flag.text} needs {names}", hint=f"add {item.flag} {flag.owners[0]}, or leave it out")
        nested.setdefault(flag.choice, {"name": chosen})[flag.option.name] = value
    return cls.parse({**options, **nested})


def parameter(flag: Flag) -> inspect.Parameter:
    """The flag as a parameter that Typer reads; its default is None, so that what was not given can be told."""
    item = flag.option
    shown: bool | str = _shown(item)
    declaration = flag.text
    if item.type is bool and item.default is not False:
        declaration = f"{flag.text}/--no-{flag.parameter.replace('_', '-')}"
    info = typer.Option(
        declaration,
        help=_help(item),
        show_default=shown,
        metavar=_metavar(item),
        rich_help_panel=panel(flag) if flag.choice else None,
        hidden=flag.for_tests,
    )
    return inspect.Parameter(
        flag.parameter, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[_annotation(item), info]
    )


def _annotation(item: Option) -> Any:
    # Numbers stay text here: the component reads them, units and limits included, and its errors name the flag.
    base: Any = bool if item.type is bool else Literal[item.choices] if item.choices else str
    return list[base] | None if item.many else base | None


def _metavar(item: Option) -> str | None:
    if item.registry is not None:
        return "NAME"
    if item.type is bool:
        return " "  # a switch takes no value; without this, Typer writes "<bool>"
    if item.choices:
        return "|".join(item.choices)
    names: dict[type, str] = {int: "INTEGER", float: "NUMBER", Path: "PATH", str: "TEXT"}
    units = {"fraction": "PERCENT", "seconds": "DURATION", "bytes": "SIZE", "ratio": "RATIO"}
    return units.get(item.unit) or names[item.type]


def _shown(item: Option) -> bool | str:
    default = item.default
    if item.required or default is None or default is False or default == ():
        return False
    if default is True:
        return "on"
    if item.many:
        return ", ".join(str(part) for part in default)
    return _number(item, default) if isinstance(default, (int, float)) else str(default)


def _number(item: Option, value: float) -> str:
    """A number as a user would write it for this option."""
    if item.unit == "fraction":
        return f"{value * 100:g}%"
    if item.unit == "seconds":
        return f"{value:g}s"
    if item.unit == "bytes":
        return f"{value / 2**20:g}m"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _help(item: Option) -> str:
    limits = [
        f"≥ {_number(item, item.min)}" if item.min is not None else "",
        f"≤ {_number(item, item.max)}" if item.max is not None else "",
    ]
    bounds = ", ".join(limit for limit in limits if limit)
    text = f"{item.help} ({bounds})" if bounds else item.help
    if item.registry is not None:
        names = [name for name, cls in item.offered() if not cls.for_tests]
        text = f"{text} One of: {', '.join(names)}."
    text = f"{text} [required]" if item.required else text
    return text.replace("[", "\\[")  # Typer reads "[batch,3,8]" as markup, and drops it


def _common(name: str, annotation: Any, default: Any, **info: Any) -> inspect.Parameter:
    if annotation is bool:
        info["metavar"] = " "
    option = typer.Option(*info.pop("names"), **info)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[annotation, option]
    )


class Limits(Component):
    """The limits that every command takes, read with their units as components read theirs."""

    time_limit: float | None = option(
        default=None, help="Stop a stage that takes longer, such as 10m.", min=0.1, unit="seconds"
    )
    memory_limit: int | None = option(
        default=None, help="Stop a stage that needs more memory, such as 6g.", min=1 << 26, unit="bytes"
    )


COMMON: dict[str, inspect.Parameter] = {
    shared.name: shared
    for shared in [
        _common("json", bool, False, names=["--json"], rich_help_panel=REPORTING, help="Print one JSON document."),
        _common(
            "report", list[str] | None, None, names=["--report"], metavar="FORMAT=PATH", rich_help_panel=REPORTING,
            help="Write a report too: json, markdown, junit, github or text. Repeatable.", show_default=False,
        ),
        _common("quiet", bool, False, names=["--quiet", "-q"], help="Print failures only.", rich_help_panel=REPORTING),
        _common("verbose", bool, False, names=["--verbose", "-v"], help="Say more.", rich_help_panel=REPORTING),
        _common(
            "debug", bool, False, names=["--debug"], rich_help_panel=REPORTING,
            help="Show what the tools below print, and tracebacks.",
        ),
        *(parameter(Flag(item.name, item)) for item in options_of(Limits)),
        _common("force", bool, False, names=["--force"], help="Replace the artifact at OUT.", rich_help_panel=RUNNING),
        _common(
            "advisory", bool, False, names=["--advisory"], rich_help_panel=RUNNING,
            help="Report everything, and exit with 0 whatever the verdict.",
        ),
    ]
}  # fmt: skip


def shell_from(command: str, values: Mapping[str, Any]) -> Shell:
    """The shell that the shared flags among these values ask for."""
    limits = Limits.parse(
        {name: values[name] for name in ("time_limit", "memory_limit") if values.get(name) is not None}
    )
    return Shell(
        command=command,
        json=bool(values.get("json")),
        report=tuple(values.get("report") or ()),
        quiet=bool(values.get("quiet")),
        verbose=bool(values.get("verbose")),
        debug=bool(values.get("debug")),
        time_limit=limits.time_limit,
        memory_limit=limits.memory_limit,
    )


def shaped(
    body: Callable[[dict[str, Any]], int], name: str, doc: str, parameters: list[inspect.Parameter]
) -> Callable[..., int]:
    """A function with these parameters, for Typer to read, that hands their values to ``body``."""

    def command(**values: Any) -> int:
        return body(values)

    command.__name__ = name
    command.__doc__ = _unwrapped(doc)
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {item.name: item.annotation for item in parameters}
    return command


def _unwrapped(doc: str) -> str:
    """Paragraphs on one line each, since the terminal's width wraps them again."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in doc.split("\n\n"))


def argument(name: str, metavar: str, text: str, *, optional: bool = False) -> inspect.Parameter:
    """A positional argument."""
    info = typer.Argument(metavar=metavar, help=text, show_default=False)
    annotation = str | None if optional else str
    default = None if optional else inspect.Parameter.empty
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[annotation, info]
    )
