"""A stage of a plugin: the model as it is."""

from __future__ import annotations

from pathlib import Path

from modelops.core.artifact import Artifact, Draft
from modelops.core.component import option
from modelops.core.report import Check, Metric, Report
from modelops.stages import Stage


class CopyModel(Stage):
    """Copy the model, byte for byte."""

    label: str = option(default="", help="Free text that the report repeats.")
    data: Path | None = option(default=None, help="A file whose first byte decides: x fails the gate.")

    def run(self, source: Artifact, draft: Draft) -> Report:
        """Copy, and judge the data."""
        draft.copy(source.model, "model.onnx")
        failed = self.data is not None and self.data.read_bytes()[:1] == b"x"
        check = Check("first byte", "fail" if failed else "pass", "the first byte is judged")
        return Report((Metric("label", self.label),), (check,))
