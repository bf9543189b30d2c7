"""JSON for scripts: the document, exactly, in characters that no terminal or log viewer interprets."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from modelops.core.component import option
from modelops.renderers import Renderer


class Json(Renderer):
    """One JSON document; numbers are numbers, and what JSON has no number for (NaN, infinity) is null."""

    indent: int = option(default=2, help="Blanks to indent each level with; 0 writes one line.", min=0, max=8)

    def render(self, document: Mapping[str, Any]) -> str:
        """The document as strict JSON, with a line end."""
        text = json.dumps(_strict(document), indent=self.indent or None, ensure_ascii=True, allow_nan=False)
        # "##[" and "##vso[" are commands to some CI systems wherever they stand; the escape means the same character.
        return text.replace("##", "#\\u0023") + "\n"


def _strict(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    return value
