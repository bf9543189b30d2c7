"""The hostile models are those of the tests of ``modelops.graphs``."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "graphs"))
