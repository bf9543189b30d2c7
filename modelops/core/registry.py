"""Registries: the components of a kind are the files in its folder, and the entry points of plugins."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Generic, TypeVar

from modelops.core.component import Component
from modelops.core.extras import pip_hint
from modelops.errors import EnvironmentMissing, UsageError, unknown_name

C = TypeVar("C", bound=Component)


class Registry(Generic[C]):
    """The components of one kind, by name. Listing names imports nothing."""

    def __init__(self, group: str, contract: Callable[[], type[C]]) -> None:
        self.group = group
        self._contract = contract
        self._loaded: dict[str, type[C]] = {}

    @property
    def noun(self) -> str:
        """What one component of the kind is called: "quantizer"."""
        return self._contract().__name__.lower()

    def builtin(self) -> list[str]:
        """The names that come with modelops, from the files of the kind's folder."""
        folders = sys.modules[self.group].__path__
        files = (file.stem for folder in folders for file in Path(folder).glob("*.py"))
        return sorted(stem.replace("_", "-") for stem in files if not stem.startswith("_"))

    def plugins(self) -> dict[str, EntryPoint]:
        """The entry points of the kind; this reads every installed distribution, which takes about 35 ms."""
        return {point.name: point for point in entry_points(group=self.group)}

    def names(self) -> list[str]:
        """Every name, those of plugins included; imports nothing."""
        return sorted({*self.builtin(), *self.plugins()})

    def loadable(self) -> list[tuple[str, type[C]]]:
        """Every component that can be imported, by name: a broken plugin is an error only where it is asked for."""
        found = []
        for name in self.names():
            try:
                found.append((name, self.load(name)))
            except (EnvironmentMissing, UsageError):
                if name in self.builtin():
                    raise
        return found

    def load(self, name: str) -> type[C]:
        """The component class of that name; UsageError when there is none, with the nearest one."""
        if name not in self._loaded:
            if name in self.builtin():
                module = importlib.import_module(f"{self.group}.{name.replace('-', '_')}")
            else:
                module = self._import_plugin(name)
            cls = self._only_component(module)
            cls.name = name
            if name not in self.builtin() and (owner := self.plugins()[name].dist) is not None:
                cls.tools = (*cls.tools, owner.name)  # another version of a plugin may make another result
            self._loaded[name] = cls
        return self._loaded[name]

    def ready(self, name: str) -> type[C]:
        """The component class of that name; EnvironmentMissing when a package that it needs is not installed."""
        cls = self.load(name)
        require(cls)
        return cls

    def _import_plugin(self, name: str) -> ModuleType:
        point = self.plugins().get(name)
        if point is None:
            raise unknown_name(self.noun, name, self.names())
        try:
            return importlib.import_module(point.module)
        except Exception as error:  # a plugin's own code runs here
            raise EnvironmentMissing(
                f"the plugin {name!r} ({point.value}) can't be imported: {type(error).__name__}: {error}",
                hint="reinstall or remove the distribution that provides it",
            ) from error

    def _only_component(self, module: ModuleType) -> type[C]:
        contract = self._contract()
        found = [
            value
            for value in vars(module).values()
            if isinstance(value, type)
            and issubclass(value, contract)
            and value is not contract
            and value.__module__ == module.__name__
            and not value.__name__.startswith("_")
        ]
        if len(found) != 1:
            raise UsageError(f"{module.__name__} must define exactly one {contract.__name__}, found {len(found)}")
        return found[0]


def require(cls: type[Component]) -> None:
    """EnvironmentMissing, with the pip command, when a package that the component needs is not installed."""
    missing = [package for package in cls.requires if importlib.util.find_spec(package) is None]
    if missing:
        raise EnvironmentMissing(f"{cls.name} needs {', '.join(missing)}, not installed here", hint=pip_hint(missing))
