"""Renderers: how a report is written. Every file here is one format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from modelops.core.component import Component
from modelops.core.registry import Registry


class Renderer(Component):
    """One format."""

    def render(self, document: Mapping[str, Any]) -> str:
        """The text of a document (see ``modelops.pipeline.document``) in this format."""
        raise TypeError(f"{type(self).__name__} does not define render")


REGISTRY: Registry[Renderer] = Registry("modelops.renderers", lambda: Renderer)
