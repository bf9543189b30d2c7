"""A measuring stage of a plugin: counts bytes."""

from __future__ import annotations

from pathlib import Path

from modelops.core.artifact import Artifact, Draft
from modelops.core.component import option
from modelops.core.report import Check, Metric, Report
from modelops.stages import Stage


class Look(Stage):
    """Count the bytes of a model, and judge them against another's."""

    writes = "evidence"

    against: Path | None = option(default=None, help="The artifact to compare with.")

    def run(self, source: Artifact, draft: Draft) -> Report:
        """Count."""
        size = source.size
        draft.file("bytes.txt").write_text(f"{size}\n")
        other = Artifact.open(self.against).size if self.against is not None else size
        verdict = "pass" if size <= other else "fail"
        return Report(
            (Metric("bytes", size, "bytes"),),
            (Check("bytes", verdict, f"{size} bytes against {other}", size, f"<= {other}"),),
            details={"measured": {"model": source.id}},
        )
