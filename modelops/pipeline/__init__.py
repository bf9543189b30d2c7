"""The pipeline: the only place that drafts, times, hashes, records and reuses."""

from __future__ import annotations

from modelops.pipeline._run import run_recipe
from modelops.pipeline._stage import Outcome, Surroundings, load_stage, opened, run_stage

__all__ = ["Outcome", "Surroundings", "load_stage", "opened", "run_recipe", "run_stage"]
